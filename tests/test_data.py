"""Images as they are in the files, and every way for a data set to be wrong."""

import os
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from rmprune import data as module
from rmprune import folders
from rmprune.data import load_data
from rmprune.errors import DataError, UsageError


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

    monkeypatch.setattr(folders, "_open", forbidden)
    monkeypatch.setattr(folders, "read_image", lambda *_: np.empty((5, 6, 3), np.uint8))
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
    for cached in folders.cache_folder().iterdir():
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


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", np.uint16), ("F", np.float32)])
def test_pixels_that_would_be_clipped_are_refused(folder, mode, dtype):
    path = folder / "train" / "cat" / "0.png"
    path.unlink()
    Image.fromarray(np.arange(30, dtype=dtype).reshape(5, 6)).save(path.with_suffix(".tif"))
    refuse(f"folder:{folder}", rf"0.tif \(pixels of mode {mode}, not of 8 bits a channel\)")


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
    assert list(folders.cache_folder().iterdir()) == []


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


@pytest.fixture
def large(folder, monkeypatch):
    """A folder that is too large to keep decoded, with wide images."""
    for index, file in enumerate(sorted(folder.rglob("*.png"))):
        write(file, size=(12, 8), value=index)
    monkeypatch.setattr(folders, "CACHE_LIMIT", 100)
    return folder


def test_a_large_folder_stays_files(large):
    data = load_data(f"folder:{large}", image_size=4)
    assert isinstance(data.train.images, folders.ImageFiles)
    assert data.image_shape == (3, 4, 4)
    assert not folders.cache_folder().exists()
    folders.CACHE_LIMIT = 1 << 30
    decoded = load_data(f"folder:{large}", image_size=4)
    assert torch.equal(data.test.images[:], decoded.test.images)
    chosen = torch.tensor([3, 1])
    assert torch.equal(data.train.at(chosen).images[:], decoded.train.images[chosen])
    assert torch.equal(data.train.at(chosen).labels, decoded.train.labels[chosen])
    assert torch.equal(data.train.images[slice(1, 3)], decoded.train.images[1:3])


def test_a_large_folder_needs_a_size(large):
    with pytest.raises(UsageError, match=r"train has 0 GB of pixels, .* give --image-size"):
        load_data(f"folder:{large}")


def test_random_crops_are_torchvisions(large):
    images = load_data(f"folder:{large}", image_size=4).train.images
    with Image.open(large / "train" / "cat" / "1.png") as image:
        pixels = v2.functional.pil_to_tensor(image)
    state = torch.get_rng_state()
    for seed in range(5):
        found = images.read(1, seed)
        assert torch.equal(torch.get_rng_state(), state)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            expected = v2.RandomResizedCrop(4, antialias=True)(pixels)
        assert torch.equal(found, expected)
