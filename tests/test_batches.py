"""Batches from memory and from files: normalised, shuffled, augmented, and nothing twice."""

import time

import pytest
import torch
from torchvision.transforms import functional as T

from rmprune import folders
from rmprune.augmentation import Augmentation
from rmprune.batches import batch_count, eval_batches, resident, train_batches
from rmprune.data import Split, load_data
from rmprune.errors import DataError

CPU = torch.device("cpu")


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


def test_colour_and_square_come_around_the_normalisation(tiny):
    def batch(**changes):
        batches = train_batches(
            tiny.train,
            96,
            generator=torch.Generator().manual_seed(0),
            augmentation=Augmentation(0, flip=False, **changes),
            mean=(0.1, 0.2, 0.3),
            std=(0.5, 0.6, 0.7),
            device=CPU,
        )
        return next(batches)

    images, labels = batch()
    cut, same_labels = batch(cutout=4)
    assert torch.equal(labels, same_labels)
    hidden = cut != images
    # Hidden is the mean colour, which is zero behind the normalisation.
    assert (cut[hidden] == 0).all()
    assert 0.05 < hidden.float().mean() < 16 / 64
    jittered, _ = batch(color_jitter=0.3)
    grey = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    pixels = jittered * grey[1] + grey[0]
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert (jittered - images).abs().flatten(1).max(1).values.median() > 0.05


@pytest.fixture
def files(image_folder, monkeypatch):
    """A data set that is read from files in every epoch."""
    monkeypatch.setattr(folders, "CACHE_LIMIT", 0)
    return load_data(f"folder:{image_folder}", image_size=8)


def epoch(data, seed=0, part=slice(None)):
    return list(
        train_batches(
            data.train,
            5,
            generator=torch.Generator().manual_seed(seed),
            augmentation=data.augmentation,
            mean=data.mean,
            std=data.std,
            device=CPU,
            part=part,
        )
    )


def test_batches_of_files_depend_on_the_seed_alone(files, monkeypatch):
    first = epoch(files)
    assert len(first) == len(files.train.labels) // 5
    monkeypatch.setattr("rmprune.batches.decoders", lambda: 1)
    torch.manual_seed(99)
    second = epoch(files)
    for (images, labels), (same_images, same_labels) in zip(first, second, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    other = epoch(files, seed=1)
    assert not torch.equal(first[0][0], other[0][0])


def test_processes_share_batches_of_files(files):
    whole = epoch(files)
    parts = [epoch(files, part=slice(number, 5, 2)) for number in range(2)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        for number, (mine, my_labels) in enumerate(shares):
            assert torch.equal(mine, images[number::2])
            assert torch.equal(my_labels, labels[number::2])


def test_files_are_evaluated_as_decoded_images_are(files, image_folder, monkeypatch):
    monkeypatch.setattr(folders, "CACHE_LIMIT", 1 << 30)
    decoded = load_data(f"folder:{image_folder}", image_size=8)
    assert isinstance(decoded.test.images, torch.Tensor)
    options = {"mean": files.mean, "std": files.std, "device": CPU}
    found = list(eval_batches(files.test, 4, **options))
    for (images, labels), (expected, same) in zip(
        found, eval_batches(decoded.test, 4, **options), strict=True
    ):
        assert torch.equal(images, expected)
        assert torch.equal(labels, same)


def test_a_damaged_file_is_named_in_one_line(files):
    path = folders.Path(folders.os.fsdecode(files.train.images.files[0]))
    content = path.read_bytes()
    path.write_bytes(b"")
    try:
        with pytest.raises(DataError, match=rf"cannot read image {path}") as caught:
            epoch(files)
    finally:
        path.write_bytes(content)
    assert "\n" not in str(caught.value)


def test_images_stay_where_they_are_without_a_gpu(tiny, files):
    assert resident(tiny.train, CPU) is tiny.train
    assert resident(files.train, torch.device("cuda")) is files.train


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_on_a_gpu_are_those_of_the_cpu(tiny):
    device = torch.device("cuda")
    split = resident(tiny.train, device)
    assert split.images.device.type == "cuda"
    options = {
        "augmentation": Augmentation(1, color_jitter=0.2, cutout=3),
        "mean": tiny.mean,
        "std": tiny.std,
    }
    batches = [
        train_batches(
            source,
            20,
            generator=torch.Generator().manual_seed(0),
            device=place,
            **options,
        )
        for source, place in ((tiny.train, CPU), (split, device))
    ]
    for (images, labels), (there, labels_there) in zip(*batches, strict=True):
        torch.testing.assert_close(there.cpu(), images, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels_there.cpu(), labels)
