"""Crops, flips and colours are torchvision's, image by image; squares are squares."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import functional as T

from rmprune.augmentation import Augmentation, crop_and_flip, cut_out, draw, jitter


@given(st.integers(0, 3), st.booleans(), st.integers(0, 1000))
def test_augmentation_is_torchvisions_pad_crop_and_flip(padding, flip, seed):
    images = torch.randint(0, 256, (4, 3, 7, 5), dtype=torch.uint8)

    augmentation = Augmentation(padding, flip)
    draws = draw(4, augmentation, torch.Generator().manual_seed(seed))
    found = crop_and_flip(images, augmentation, draws)

    for image, result in zip(images, found, strict=True):
        padded = T.pad(image, padding)
        shifts = range(2 * padding + 1)
        crops = [T.crop(padded, top, left, 7, 5) for top in shifts for left in shifts]
        crops += [T.hflip(crop) for crop in crops] if flip else []
        assert any(torch.equal(result, crop) for crop in crops)


def test_every_crop_and_both_directions_occur():
    image = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4) + 1
    images = image.expand(2000, 1, 3, 4)
    draws = draw(2000, Augmentation(1), torch.Generator().manual_seed(0))
    found = crop_and_flip(images, Augmentation(1), draws)
    different, counts = torch.unique(found.flatten(1), dim=0, return_counts=True)
    assert len(different) == 3 * 3 * 2
    assert counts.min() > 60  # 111 expected of each


@given(st.integers(0, 1000), st.floats(0, 1))
def test_colours_are_torchvisions(seed, strength):
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (3, 3, 5, 4)).double()
    augmentation = Augmentation(color_jitter=strength)
    factors = draw(3, augmentation, torch.Generator().manual_seed(seed)).factors
    if not strength:
        assert factors is None
        return
    assert ((factors - 1).abs() <= strength + 1e-6).all()
    found = jitter(images, factors)
    for image, (brightness, contrast, saturation), result in zip(
        images, factors.double().tolist(), found, strict=True
    ):
        expected = T.adjust_brightness(image / 255, brightness)
        expected = T.adjust_contrast(expected, contrast)
        expected = T.adjust_saturation(expected, saturation)
        torch.testing.assert_close(result / 255, expected, rtol=0, atol=1e-6)


@given(st.integers(1, 6), st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True))
def test_a_square_is_hidden_and_nothing_else(size, row, column):
    images = torch.ones(1, 2, 7, 9)
    found = cut_out(images, size, torch.tensor([[row, column]], dtype=torch.float64))
    hidden = [(y, x) for y in range(7) for x in range(9) if found[0, 0, y, x] == 0]
    top, left = int(row * 7) - size // 2, int(column * 9) - size // 2
    expected = [
        (y, x)
        for y in range(max(top, 0), min(top + size, 7))
        for x in range(max(left, 0), min(left + size, 9))
    ]
    assert hidden == expected
    assert torch.equal(found[:, 0], found[:, 1])
    assert set(found.unique().tolist()) <= {0.0, 1.0}


def test_what_is_not_wanted_is_not_drawn():
    # Or results of earlier versions would change with every augmentation that is new.
    draws = draw(4, Augmentation(), torch.Generator().manual_seed(0))
    assert draws.factors is None
    assert draws.centres is None
