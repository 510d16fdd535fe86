"""Training speed of rmprune against loops written by hand, in one run and in turn.

python experiments/training_speed/measure.py --data folder:cifar10
python experiments/training_speed/measure.py --data folder:cifar10 --model resnet18 --device cuda
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, StackDataset, TensorDataset
from torchvision.transforms import v2

from rmprune.batches import resident, train_batches
from rmprune.checkpoints import calibration_batches, pick_device
from rmprune.compilation import begin_step
from rmprune.data import Dataset, Split, load_data
from rmprune.measure import evaluate
from rmprune.models import create_model
from rmprune.processes import cores
from rmprune.reports import environment
from rmprune.slimming import Penalty, add_shortcut_bn, scale_parameters
from rmprune.training import TrainingConfig, autocast_dtype, fit

BATCH_SIZE = 128
EVALUATION_BATCH_SIZE = 100  # the default of `evaluate`; of 32 to 250 the fastest for both loops
SPARSITY = 1e-4
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What all loops share."""

    data: Dataset
    device: torch.device
    model: str

    def residual(self) -> nn.Module:
        model = create_model(self.model, num_classes=len(self.data.classes))
        return model.to(self.device)

    def slimmable(self) -> nn.Module:
        batches = calibration_batches(self.data, self.device)
        return add_shortcut_bn(self.residual().eval(), batches).to(self.device)

    def in_memory(
        self, layout: torch.memory_format, batch_size: int = BATCH_SIZE
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches without augmentation, as one would write it down."""
        train = resident(self.data.train, self.device)
        statistics_of = (self.data.mean, self.data.std)
        mean, std = (torch.tensor(t, device=self.device).view(1, 3, 1, 1) for t in statistics_of)
        order = torch.randperm(len(train.labels), device=train.labels.device)
        for index in order.split(batch_size):
            images = ((train.images[index].to(self.device) / 255 - mean) / std).contiguous(
                memory_format=layout
            )
            yield images, train.labels[index].to(self.device)

    def augmented(self) -> Iterator[tuple[Tensor, Tensor]]:
        """rmprune's own batches."""
        return train_batches(
            resident(self.data.train, self.device),
            BATCH_SIZE,
            generator=torch.Generator(),
            augmentation=self.data.augmentation,
            mean=self.data.mean,
            std=self.data.std,
            device=self.device,
            memory_format=torch.channels_last,
        )

    def synthetic(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch again and again, already where it is needed."""
        images, labels = next(self.augmented())
        return ((images, labels) for _ in range(len(self.data.train.labels) // BATCH_SIZE))

    def loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        """A DataLoader with transforms image by image, as tutorials have it."""
        transform = v2.Compose(
            [
                v2.RandomCrop(self.data.image_shape[1], padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(self.data.mean, self.data.std),
            ]
        )
        train = self.data.train
        images = _Transformed(train.images[:], transform)
        loader = DataLoader(
            StackDataset(images, TensorDataset(train.labels)),
            BATCH_SIZE,
            shuffle=True,
            num_workers=cores(),
            pin_memory=self.device.type == "cuda",
            drop_last=True,
        )
        for x, (y,) in loader:
            yield x.to(self.device), y.to(self.device)


class _Transformed(torch.utils.data.Dataset[Tensor]):
    def __init__(self, images: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index])


def hand_written(
    model: nn.Module,
    batches: Callable[[], Batches],
    *,
    bf16: bool,
    penalise: bool = False,
    mode: str | None = None,
    layout: torch.memory_format = torch.channels_last,
) -> Callable[[], None]:
    """The shortest loop that trains: no schedule, no checks.

    Args:
        model: On its device.
        batches: Of one epoch.
        bf16: Autocast.
        penalise: With the L1 penalty on all BN scales.
        mode: Of `torch.compile`; None does not compile.
        layout: Of the batches, and of the weights.
    """
    device = next(model.parameters()).device
    model.to(memory_format=layout).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True
    )
    scales = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    forward = model if mode is None else torch.compile(model, mode=mode)

    def loop() -> None:
        model.train()
        for images, labels in batches():
            optimizer.zero_grad()
            begin_step(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            if penalise:
                with torch.no_grad():
                    signs = torch._foreach_sign(scales)
                    torch._foreach_add_([scale.grad for scale in scales], signs, alpha=SPARSITY)
            optimizer.step()

    return loop


def rmprune_train(setting: Setting, compile_step: str) -> Callable[[], None]:
    """What `rmprune train` runs, with everything that it does."""
    slim = setting.slimmable()
    config = TrainingConfig(1, lr=0.01, batch_size=BATCH_SIZE, compile=compile_step)
    # One image to test: an epoch's evaluation is not what is timed here.
    data = replace(setting.data, test=setting.data.test.at(slice(1)))
    return lambda: fit(slim, data, config, penalty=penalty_of(slim), device=setting.device)


def penalty_of(slim: nn.Module) -> Penalty:
    scales = scale_parameters(slim)
    return Penalty(scales, SPARSITY, dict.fromkeys(scales, 1.0))


def penalty_alone(setting: Setting) -> Callable[[], None]:
    """As often as an epoch has steps, on gradients that are there."""
    slim = setting.slimmable()
    penalty = penalty_of(slim)
    for parameter in slim.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def loop() -> None:
        for _ in range(len(setting.data.train.labels) // BATCH_SIZE):
            penalty.add_to_gradients()

    return loop


def evaluation_by_hand(
    setting: Setting, *, bf16: bool, layout: torch.memory_format
) -> Callable[[], None]:
    """The shortest loop that counts what is right."""
    model = setting.slimmable().eval().to(memory_format=layout)

    def loop() -> None:
        correct = torch.zeros((), dtype=torch.int64, device=setting.device)
        with (
            torch.inference_mode(),
            torch.autocast(setting.device.type, torch.bfloat16, enabled=bf16),
        ):
            for images, labels in setting.in_memory(layout, EVALUATION_BATCH_SIZE):
                correct += (model(images).argmax(1) == labels).sum()
        correct.item()

    return loop


def rmprune_evaluation(setting: Setting) -> Callable[[], None]:
    """What runs behind every epoch."""
    model = setting.slimmable().to(memory_format=torch.channels_last)
    return lambda: evaluate(
        model,
        resident(setting.data.train, setting.device),
        mean=setting.data.mean,
        std=setting.data.std,
        device=setting.device,
        batch_size=EVALUATION_BATCH_SIZE,
        autocast=autocast_dtype("auto", setting.device),
        memory_format=torch.channels_last,
    )


def loops_of(setting: Setting) -> dict[str, Callable[[], object]]:
    """All of them, by name."""
    fast = autocast_dtype("auto", setting.device) is not None
    plain = torch.contiguous_format
    by_hand = partial(hand_written, bf16=fast)
    batches = partial(setting.in_memory, torch.channels_last)
    best = "reduce-overhead" if setting.device.type == "cuda" else "default"
    found: dict[str, Callable[[], object]] = {
        "by hand, float32": hand_written(
            setting.residual(), partial(setting.in_memory, plain), bf16=False, layout=plain
        ),
        "by hand, residual": by_hand(setting.residual(), batches),
        "by hand, residual, other precision": hand_written(
            setting.residual(), batches, bf16=not fast
        ),
        "by hand, same work": by_hand(setting.slimmable(), setting.augmented, penalise=True),
        "by hand, same work, compiled": by_hand(
            setting.slimmable(), setting.augmented, penalise=True, mode=best
        ),
        "rmprune train --compile off": rmprune_train(setting, "off"),
        "rmprune train --compile on": rmprune_train(setting, "on"),
        "penalty alone": penalty_alone(setting),
        "evaluation by hand, float32": evaluation_by_hand(setting, bf16=False, layout=plain),
        "evaluation by hand": evaluation_by_hand(setting, bf16=fast, layout=torch.channels_last),
        "rmprune's evaluation": rmprune_evaluation(setting),
    }
    if setting.device.type == "cuda":
        found["by hand, synthetic, compiled"] = by_hand(
            setting.slimmable(), setting.synthetic, penalise=True, mode=best
        )
        found["by hand, DataLoader"] = by_hand(setting.residual(), setting.loaded)
    return found


@click.command()
@click.option("--data", "spec", default="digits", show_default=True, help="As in rmprune train.")
@click.option("--model", default="resnet20", show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--steps", default=40, show_default=True, help="Of each loop in each round.")
@click.option("--rounds", default=7, show_default=True)
def main(spec: str, model: str, device: str, steps: int, rounds: int) -> None:
    data = load_data(spec, image_size=32)
    count = steps * BATCH_SIZE
    chosen = torch.arange(count) % len(data.train.labels)
    train = Split(data.train.images[chosen], data.train.labels[chosen])
    setting = Setting(replace(data, train=train), pick_device(device), model)
    loops = loops_of(setting)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(-1, rounds):  # the first round warms up and compiles
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            if setting.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    table = table_of(seconds, count)
    print(table.to_string(index=False))
    settings = environment() | {"model": model, "data": spec, "steps": steps, "rounds": rounds}
    settings |= {"threads": torch.get_num_threads(), "batch_size": BATCH_SIZE}
    settings["precision"] = str(autocast_dtype("auto", setting.device) or torch.float32)
    name = "results.csv" if setting.device.type == "cpu" else f"{model}-gpu.csv"
    table.assign(**settings).to_csv(Path(__file__).with_name(name), index=False)


def table_of(seconds: dict[str, list[float]], images: int) -> pd.DataFrame:
    """Medians, spreads, and how much faster than each loop written by hand."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, values in seconds.items():
        lower, _, upper = statistics.quantiles(values, n=4)
        row = {"loop": name, "images_per_s": round(images / medians[name])}
        row["iqr_share"] = round((upper - lower) / medians[name], 3)
        for rival in seconds:
            if "by hand" in rival:
                row[f"ratio to {rival}"] = round(medians[rival] / medians[name], 3)
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
