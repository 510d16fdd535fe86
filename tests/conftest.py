import os

import pytest
import torch
from hypothesis import settings
from sklearn.datasets import load_digits

from rmprune.augmentation import Augmentation
from rmprune.data import Dataset, Split

# Deadlines measure the machine, and workers of pytest-xdist share its cores. The usual run is the
# same every time; `pytest --hypothesis-profile=long` looks for what no run has seen yet.
settings.register_profile("long", deadline=None, max_examples=2000)
settings.register_profile("rmprune", deadline=None, max_examples=150, derandomize=True)
settings.load_profile("rmprune")
torch.set_num_threads(1)
# The same in processes and notebooks that tests start: too many threads spin, and wait.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def seed():
    """Random weights are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keep decoded image folders out of the home folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny():
    """Real digits, few and small: 96 training and 32 test images of 8×8 pixels."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    return Dataset(
        "digits, few",
        Split(images[:96].contiguous(), labels[:96]),
        Split(images[96:128].contiguous(), labels[96:128]),
        tuple("0123456789"),
        augmentation=Augmentation(1, flip=False),
    )


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory, tiny):
    """The same as an image folder with three classes, 16×16 pixels."""
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for name, split in (("train", tiny.train), ("test", tiny.test)):
        for index, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            if label < 3:
                folder = root / name / ["zero", "one", "two"][label]
                folder.mkdir(parents=True, exist_ok=True)
                pixels = image.permute(1, 2, 0).numpy()
                Image.fromarray(pixels).resize((16, 16)).save(folder / f"{index:03}.png")
    return root
