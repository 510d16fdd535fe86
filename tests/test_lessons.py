import pytest
import torch

from rmprune import lessons as module
from rmprune.lessons import lessons


def batches(count=3):
    return [(torch.full((4, 3, 2, 2), float(i)), torch.arange(4)) for i in range(count)]


def teach(images):
    return images.mean((2, 3))


def test_lessons_are_the_batches_and_what_the_teacher_says(tmp_path):
    path = tmp_path / "0.safetensors"
    for _ in range(2):  # computed, then read
        found = list(lessons(batches(), teach, path))
        for (images, labels, outputs), (expected, classes) in zip(found, batches(), strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, classes)
            assert torch.equal(outputs, teach(expected))
        assert path.exists()
    list(lessons(batches(), pytest.fail, path))


def test_what_is_damaged_is_asked_for_again(tmp_path):
    path = tmp_path / "0.safetensors"
    list(lessons(batches(), teach, path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    assert all(
        torch.equal(said, teach(images)) for images, _, said in lessons(batches(), teach, path)
    )
    assert path.read_bytes() == whole


def test_without_a_teacher_nothing_is_said(tmp_path):
    assert all(outputs is None for *_, outputs in lessons(batches(), None, tmp_path / "0"))
    assert not list(tmp_path.iterdir())


def test_an_epoch_that_was_stopped_or_is_too_large_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "0.safetensors"
    next(lessons(batches(), teach, path))
    assert not path.exists()
    monkeypatch.setattr(module, "MOST_BYTES_AN_EPOCH", 100)  # two batches have 96
    assert len(list(lessons(batches(), teach, path))) == 3
    assert not path.exists()
    list(lessons(batches(2), teach, path))
    assert path.exists()
