"""Files, folders and data that commands are given."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import torch

from rmprune.checkpoints import Checkpoint, SlimConfig, Task, pick_device, read_config, task_of
from rmprune.cli.words import progress_bar
from rmprune.data import Dataset, load_data
from rmprune.errors import UsageError
from rmprune.models import build_model
from rmprune.processes import agreed, is_restarted
from rmprune.store import load
from rmprune.training import total_step_size

CHECKPOINTS = ("sparse.pt", "masked.pt", "finetuned.pt")  # of a run's stages


def load_images(config: SlimConfig, task: Task | None = None) -> Dataset:
    """Load the data; it must have the classes of the task, if there is one."""
    data = load_data(
        config.data,
        root=Path(config.data_root),
        image_size=config.image_size,
        track=progress_bar,
    )
    if task is not None and tuple(task.classes) != data.classes:
        raise UsageError(
            f"the net was trained for the classes {_shortened(task.classes)}, but {config.data} "
            f"has {_shortened(data.classes)}; give its data by --data"
        )
    return data


def _shortened(classes: tuple[str, ...]) -> str:
    return ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")


def begin(out: Path, resume: bool, config: SlimConfig) -> Dataset:
    """Load the data of a run, once it is clear that the run can begin.

    The folder must hold no other run, and with ``--resume`` may hold the same one.
    """
    images: list[Dataset] = []

    def check() -> None:
        found = read_config(out)
        kept = [name for name in CHECKPOINTS if (out / name).exists()]
        if kept and found is None:
            raise UsageError(f"{out} holds the {kept[0]} of another run; name another --out")
        if kept and found is not None:
            check_same(found, config, out, resume)
        elif resume:
            click.echo(f"rmprune: note: {out} holds no run to resume; a new one begins", err=True)
        pick_device(config.device)
        if config.weights is None:
            build_model(config.model, 1)
        images.append(load_images(config))
        _hint_at_reach(config, images[0])

    agreed(check)
    return images[0] if images else load_images(config)  # the others find them decoded


def check_same(found: SlimConfig, config: SlimConfig, folder: Path, resume: bool) -> None:
    """Refuse to go on with a run of other settings, or without ``--resume``."""
    if not resume and not is_restarted():
        raise UsageError(f"{folder} holds a run; --resume goes on with it, or name another --out")
    changed = found.changed(config)
    if changed:
        raise UsageError(
            f"{folder} holds a run with other settings: {', '.join(changed)}; give those, or "
            "another --out"
        )


def net_of(path: Path) -> Path:
    """The file that a path names: of a run's folder, the net that came out."""
    if not path.is_dir():
        return path
    net = path / "net.safetensors"
    if not net.exists():
        raise UsageError(f"{path} has no net.safetensors; name a file, or finish the run")
    return net


def open_net(file: Path) -> tuple[torch.nn.Module, Task | None, SlimConfig]:
    """A network from a file, what it was trained for, and its run's settings."""
    if file.suffix == ".pt":
        checkpoint = Checkpoint.load(file)
        return checkpoint.build(), checkpoint.task, checkpoint.config
    net = load(file)
    task = task_of(net)
    config = _settings_beside(file) or SlimConfig()
    if task is None:
        return net, None, config
    size = net.info.get("image_size")
    return net, task, dataclasses.replace(config, data=task.data, image_size=size)


def _settings_beside(file: Path) -> SlimConfig | None:
    """Those of the run in whose folder a net lies."""
    config = read_config(file.parent)
    kept = [path for name in CHECKPOINTS if (path := file.parent / name).exists()]
    if config is None and kept:  # of `rmprune prune`, whose folders have no config.json
        return Checkpoint.load(kept[-1]).config
    return config


def _hint_at_reach(config: SlimConfig, data: Dataset) -> None:
    """Say so, before training, if the penalty cannot bring a scale of 1 under the threshold."""
    reach = config.sparsity * total_step_size(config.training(), data)
    if config.sparsity > 0 and config.importance == "scale" and config.epochs > 0 and reach < 1:
        click.echo(
            f"rmprune: note: in this training the penalty moves a scale by {reach:.2g} at most, "
            "and scales begin near 1, so few channels or none will be switched off; "
            "a larger --sparsity or more --epochs reach further",
            err=True,
        )
