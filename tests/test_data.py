"""Images as they are in the files; augmentation against torchvision; every way to be wrong."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as T

from rmprune import data as module
from rmprune.data import (
    Augmentation,
    Split,
    augment,
    batch_count,
    draw,
    eval_batches,
    load_data,
    train_batches,
)
from rmprune.errors import DataError, UsageError

CPU = torch.device("cpu")


def write(path, size=(6, 5), mode="RGB", value=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(abs(hash(path.name)) % 1000 if value is None else value)
    pixels = rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode if mode != "RGBA" else None).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "images"
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for index in range(2):
                write(root / split / name / f"{index}.png")
    return root


def refuse(spec, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        load_data(spec, **options)
    assert "\n" not in str(caught.value)


def test_digits_are_scikit_learns_and_split_evenly():
    data = load_data("digits")
    assert data.train.images.shape == (1437, 3, 32, 32)
    assert data.test.images.shape == (360, 3, 32, 32)
    assert data.image_shape == (3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.test.labels.bincount().tolist() in ([36, 36, 35, 37, 36, 37, 36, 36, 35, 36],)
    assert not data.augmentation.flip
    again = load_data("digits")
    assert torch.equal(data.train.images, again.train.images)


def test_image_size_resizes():
    assert load_data("digits", image_size=16).image_shape == (3, 16, 16)


def test_folder_is_read_pixel_for_pixel(folder):
    data = load_data(f"folder:{folder}")
    assert data.classes == ("cat", "dog")
    assert data.train.labels.tolist() == [0, 0, 1, 1]
    for index, (name, file) in enumerate([("cat", "0"), ("cat", "1"), ("dog", "0"), ("dog", "1")]):
        with Image.open(folder / "train" / name / f"{file}.png") as image:
            expected = torch.tensor(np.asarray(image)).permute(2, 0, 1)
        assert torch.equal(data.train.images[index], expected)


def test_second_load_decodes_nothing(folder, monkeypatch):
    first = load_data(f"folder:{folder}")

    def forbidden(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(module, "_read_image", forbidden)
    second = load_data(f"folder:{folder}")
    assert torch.equal(first.train.images, second.train.images)


def test_changed_folder_is_decoded_again(folder):
    load_data(f"folder:{folder}")
    pixels = write(folder / "train" / "cat" / "0.png", value=77)
    os.utime(folder / "train" / "cat" / "0.png", (time.time() + 5, time.time() + 5))
    data = load_data(f"folder:{folder}")
    assert torch.equal(data.train.images[0], torch.from_numpy(pixels).permute(2, 0, 1))


def test_damaged_cache_is_decoded_again(folder):
    expected = load_data(f"folder:{folder}").train.images.clone()
    for cached in module.cache_folder().iterdir():
        cached.write_bytes(cached.read_bytes()[:140])
    assert torch.equal(load_data(f"folder:{folder}").train.images, expected)


def test_images_can_be_changed_without_harm_to_the_cache(folder):
    load_data(f"folder:{folder}")
    data = load_data(f"folder:{folder}")
    before = data.train.images.clone()
    data.train.images.zero_()
    assert torch.equal(load_data(f"folder:{folder}").train.images, before)


def test_val_serves_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(load_data(f"folder:{folder}").test.labels) == 4


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_colour_modes_become_rgb(folder, mode):
    path = folder / "train" / "cat" / "0.png"
    write(path, mode=mode)
    with Image.open(path) as image:
        expected = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(load_data(f"folder:{folder}").train.images[0], expected)


def test_different_sizes_need_image_size(folder):
    write(folder / "train" / "dog" / "1.png", size=(9, 5))
    refuse(f"folder:{folder}", r"dog/1.png has 9×5 pixels.*6×5; give --image-size")
    assert load_data(f"folder:{folder}", image_size=4).image_shape == (3, 4, 4)


def test_test_images_of_another_size(folder):
    for file in (folder / "test").rglob("*.png"):
        write(file, size=(7, 7))
    refuse(f"folder:{folder}", r"6×5 pixels and those in .*7×7; give --image-size")


def test_missing_folder(tmp_path):
    refuse(f"folder:{tmp_path / 'nothing'}", "there is no folder .*nothing/train; .*CLASS")


def test_empty_folder(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    refuse(f"folder:{tmp_path}", "train is empty; it needs one folder of images for each class")


def test_empty_class(folder):
    (folder / "train" / "cow").mkdir()
    refuse(f"folder:{folder}", r"cow has no images \(\.jpg")


def test_missing_test_images(folder):
    shutil.rmtree(folder / "test")
    refuse(f"folder:{folder}", "there is no folder .*val")


def test_classes_that_differ(folder):
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    refuse(f"folder:{folder}", "classes differ between .*train and .*test: dog, wolf are in one")


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_unreadable_image_is_named(folder, content):
    (folder / "train" / "dog" / "1.png").write_bytes(content)
    refuse(f"folder:{folder}", r"cannot read image .*dog/1.png .*; replace or remove it")


def test_truncated_image_is_named(folder):
    path = folder / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:-30])
    refuse(f"folder:{folder}", r"cannot read image .*dog/1.png")


def test_nothing_is_kept_of_a_decoding_that_failed(folder):
    (folder / "train" / "dog" / "1.png").write_bytes(b"")
    refuse(f"folder:{folder}", "cannot read image")
    assert list(module.cache_folder().iterdir()) == []


def test_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    refuse(f"folder:{folder}", "cannot keep the decoded images in .*; free space")


def test_cifar_without_network(tmp_path, monkeypatch):
    def offline(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(module.torchvision.datasets, "CIFAR10", offline)
    refuse("cifar10", r"cifar10 is not in .*no route to host.*folder:PATH", root=tmp_path)


@pytest.mark.parametrize("spec", ["mnist", "folder:", "", "digits:5"])
def test_unknown_data(spec):
    with pytest.raises(UsageError, match=r"unknown data .*; known: digits, cifar10, cifar100"):
        load_data(spec)


@given(st.integers(0, 3), st.booleans(), st.integers(0, 1000))
def test_augmentation_is_torchvisions_pad_crop_and_flip(padding, flip, seed):
    images = torch.randint(0, 256, (4, 3, 7, 5), dtype=torch.uint8)

    augmentation = Augmentation(padding, flip)
    draws = draw(4, augmentation, torch.Generator().manual_seed(seed))
    found = augment(images, augmentation, *draws)

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
    found = augment(images, Augmentation(1), *draws)
    different, counts = torch.unique(found.flatten(1), dim=0, return_counts=True)
    assert len(different) == 3 * 3 * 2
    assert counts.min() > 60  # 111 expected of each


def test_batches_are_normalised_and_formatted(tiny):
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "device": CPU}
    (images, labels), *rest = eval_batches(tiny.test, 20, **options, dtype=torch.float64)
    assert [len(y) for _, y in rest] == [12]
    expected = T.normalize(tiny.test.images[:20].double() / 255, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-12)
    assert torch.equal(labels, tiny.test.labels[:20])
    images, _ = next(
        eval_batches(
            tiny.test, 4, **options, dtype=torch.bfloat16, memory_format=torch.channels_last
        )
    )
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_shows_each_image_once_and_depends_on_the_generator_alone():
    count = 50
    split = Split(torch.zeros(count, 3, 4, 4, dtype=torch.uint8), torch.arange(count))

    def labels(seed):
        torch.manual_seed(int(time.time()))
        generator = torch.Generator().manual_seed(seed)
        batches = train_batches(
            split,
            12,
            generator=generator,
            augmentation=Augmentation(),
            mean=(0,) * 3,
            std=(1,) * 3,
            device=CPU,
        )
        return [y for _, y in batches]

    first = labels(1)
    assert [len(y) for y in first] == [12] * 4 == [12] * batch_count(split, 12)
    assert len(torch.cat(first).unique()) == 48
    assert torch.equal(torch.cat(first), torch.cat(labels(1)))
    assert not torch.equal(torch.cat(first), torch.cat(labels(2)))


def test_a_batch_larger_than_the_data_is_the_data(tiny):
    batches = train_batches(
        tiny.train,
        1000,
        generator=torch.Generator().manual_seed(0),
        augmentation=tiny.augmentation,
        mean=tiny.mean,
        std=tiny.std,
        device=CPU,
    )
    assert [len(y) for _, y in batches] == [96]
    assert batch_count(tiny.train, 1000) == 1
