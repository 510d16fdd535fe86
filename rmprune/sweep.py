"""Sweeps: one training for every method, sparsity and seed, and many points from each.

A sweep's folder holds ``sweep.json`` (its plans), ``results.csv`` (a row a net, appended when
its point is finished), ``nets/`` (every net, so that all can be timed in one run),
``latencies.csv`` (that run), the trainings, and what their teachers said (``lessons/``). A sweep
that is stopped goes on with the first point that has no row; those that failed are tried again.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
import torch
from torch import nn

from rmprune import pruning, runs
from rmprune.backends import Backend, Platform, time_deployed
from rmprune.budgets import ratio_to_original
from rmprune.checkpoints import (
    HOW,
    LATER,
    Checkpoint,
    SlimConfig,
    Task,
    deploy,
    pick_device,
    trained_model,
)
from rmprune.data import Dataset
from rmprune.errors import UsageError
from rmprune.measure import count_macs, count_params, evaluate
from rmprune.models import build_model
from rmprune.progress import Track
from rmprune.reports import environment, records
from rmprune.rivals import (
    Rival,
    RivalPenalty,
    least_importance,
    load_pruned,
    prune_until,
    with_convolved_shortcuts,
)
from rmprune.store import (
    load,
    load_tensors,
    read_json,
    save,
    save_tensors,
    write_bytes,
    write_csv,
    write_json,
)
from rmprune.targets import Target
from rmprune.workers import Here, Workers

Method = Literal["rm", "slimming", Rival]
TIMED_ON: tuple[Backend, ...] = ("torch", "onnxruntime")
METHODS: tuple[Method, ...] = ("rm", "slimming", *get_args(Rival))
KEY = ["model", "method", "sparsity", "seed", "level"]
COLUMNS = [
    *(*KEY, "lowering", "accuracy", "params", "macs", "params_ratio", "macs_ratio"),
    *("epochs", "finetune_epochs", "net", "seconds", "hardware", "error"),
]
VARIED = frozenset({"model", "weights", "sparsity", "seed", "threshold", "target"})
Say = Callable[[str], None]


@dataclass(frozen=True)
class Sweep:
    """What is combined with what.

    Attributes:
        base: Settings that all points share.
        models: Names, each with its trained weights or None.
        methods: ``rm``: rmprune, each point as the plain net and as the net with additions
            chosen by measurement; ``slimming``: only the inner channels of the residual
            network; and Torch-Pruning's BN-scale and group-norm pruners.
        sparsities: λ of the penalty; of the rivals, their ``reg``.
        levels: ``threshold=T``, or a target as `rmprune.targets` reads it. A rival's
            threshold is on the importance of a group of channels.
        seeds: Of everything random.
    """

    base: SlimConfig
    models: tuple[tuple[str, str | None], ...]
    methods: tuple[Method, ...]
    sparsities: tuple[float, ...]
    levels: tuple[str, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in METHODS:
                raise UsageError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
        if self.base.prune_steps > 1 and self._rivals:
            raise UsageError("Torch-Pruning fine-tunes once: no --prune-steps beside its methods")
        if not self.levels:
            raise UsageError("a sweep needs levels to prune to: --threshold or --target")
        names = [model for model, _ in self.models]
        for what in (names, self.methods, self.sparsities, self.levels, self.seeds):
            for value, count in Counter(what).items():
                if count > 1:
                    raise UsageError(
                        f"{value} is given {count} times; once is enough, and the same model with "
                        "other weights needs a sweep of its own"
                    )
        for level in self.levels:
            if level.startswith("threshold="):
                pruning.check_importance(self.base.importance)
            elif Target.parse(level).kind == "accuracy-drop" and self._rivals:
                raise UsageError(f"{self._rivals[0]} knows no target of accuracy; leave it out")
            self.leveled(self.base, level)  # which refuses what it cannot do

    @property
    def _rivals(self) -> list[str]:
        return [method for method in self.methods if method in get_args(Rival)]

    def trainings(self) -> Iterator[tuple[Method, SlimConfig]]:
        """Every training, with its settings."""
        combinations = itertools.product(self.seeds, self.models, self.sparsities, self.methods)
        for seed, (model, weights), sparsity, method in combinations:
            config = replace(self.base, model=model, weights=weights, sparsity=sparsity, seed=seed)
            if method == "slimming":
                config = replace(config, scope="inner", lowering="auto")
            yield method, config

    def leveled(self, config: SlimConfig, level: str) -> SlimConfig:
        """A training's settings for one of its points."""
        kind, _, value = level.partition("=")
        if kind == "threshold":
            return replace(config, threshold=float(value), target=None)
        return replace(config, target=level)


def name_of(method: Method, config: SlimConfig, level: str = "") -> str:
    """A name for the files of a training or of a point."""
    parts = [config.model, method, f"{config.sparsity:g}", f"seed{config.seed}", level]
    return "-".join(part for part in parts if part).replace(":", "-").replace("=", "-")


def run(
    folder: Path,
    sweep: Sweep,
    open_data: Callable[[], Dataset],
    workers: Workers | None = None,
    say: Say = print,
) -> pd.DataFrame:
    """Train and prune whatever has no row yet, or failed.

    Args:
        folder: Of the sweep; whoever wants a new one gives a new folder.
        sweep: What to do.
        open_data: Loads the data to train and test on, wherever a job runs.
        workers: Where jobs run; by default in this process, one after the other. They keep what
            they begin in the folder's ``trainings``, and go on there if they find it.
        say: Told of every point.

    Returns:
        The content of ``results.csv``. A point that failed has its ``error``.
    """
    workers = workers or Here()
    data = open_data()
    _note_plan(folder, sweep, Task.of(data))
    for model, weights in sweep.models:
        _add_original(folder, replace(sweep.base, model=model, weights=weights), data)
    trainings = [
        _Task(
            method,
            config,
            tuple(v for v in sweep.levels if not _is_done(folder, method, config, v)),
        )
        for method, config in sweep.trainings()
    ]
    points = sum(len(task.levels) for task in trainings)
    done = itertools.count(1)
    waiting: dict[int, _Task] = {}

    def start(tasks: Sequence[_Task]) -> None:
        jobs = [partial(_work, folder, sweep, task, open_data, workers.track) for task in tasks]
        waiting.update(zip(workers.start(jobs), tasks, strict=True))

    def note(task: _Task, level: str, rows: Sequence[_Row], seconds: float) -> None:
        number = next(done)
        for row, net in rows:
            if net is not None:
                write_bytes(net, net_path(folder, row))
        key = _key(task.method, task.config, level)
        _append(folder, [{**key, **row, "seconds": seconds} for row, _ in rows])
        for row, _ in rows:
            say(f"[{number}/{points}] {_in_words(task.method, task.config, level, row)}")

    start([task for task in trainings if task.levels])
    while waiting:
        number, outcome = workers.finished()
        task = waiting.pop(number)
        try:
            result, seconds = outcome()
        except Exception as error:  # whatever it is, the other points can still be had
            reason = " ".join(str(error).split())
            for level in task.levels:
                note(
                    task, level, [({"error": f"{type(error).__name__}: {reason}"}, None)], math.nan
                )
            continue
        if task.sparse is None:
            start([replace(task, levels=(level,), sparse=result) for level in task.levels])
        else:
            note(task, task.levels[0], result, seconds)
    return results(folder)


@dataclass(frozen=True)
class _Task:
    """A training, or a point of one.

    Attributes:
        method: Of the training.
        config: Its settings.
        levels: Of the training, those that have no row yet; of a point, its own.
        sparse: Of a point, the file of the checkpoint that it begins with.
    """

    method: Method
    config: SlimConfig
    levels: tuple[str, ...]
    sparse: bytes | None = None


_Row = tuple[dict[str, Any], bytes | None]  # what a row tells besides its key, and the net's file


def _work(
    folder: Path, sweep: Sweep, task: _Task, open_data: Callable[[], Dataset], track: Track
) -> tuple[Any, float]:
    """A job: a training, which gives its checkpoint's file; or a point of it, which gives rows.

    Returns:
        That, and the seconds that it took.
    """
    begin = time.perf_counter()
    method, config, data = task.method, task.config, open_data()
    place = folder / "trainings" / name_of(method, config)
    path = place / "sparse.pt"
    if task.sparse is None:
        _train(method, place, config, data, track)
        return path.read_bytes(), time.perf_counter() - begin
    if not path.exists() or path.read_bytes() != task.sparse:  # trained on another machine
        write_bytes(task.sparse, path)
    (level,) = task.levels
    here = sweep.leveled(config, level)
    lessons = folder / "lessons"
    rows = _point(method, place, Checkpoint.load(path), here, level, data, track, lessons)
    return rows, time.perf_counter() - begin


def results(folder: Path) -> pd.DataFrame:
    """The rows of a sweep so far."""
    path = folder / "results.csv"
    rows = pd.read_csv(path) if path.exists() else pd.DataFrame()
    return rows.reindex(columns=[*COLUMNS, *rows.columns.difference(COLUMNS)])


def _note_plan(folder: Path, sweep: Sweep, task: Task) -> None:
    """Add a plan to those that the folder has seen, in ``sweep.json``."""
    path = folder / "sweep.json"
    plan = json.loads(json.dumps(dataclasses.asdict(sweep)))
    plans = read_json(path)["plans"] if path.exists() else []
    for earlier in plans:
        _check_alike(folder, earlier, plan)
    if plan not in plans:
        write_json({"task": dataclasses.asdict(task), "plans": [*plans, plan]}, path)


def _check_alike(folder: Path, earlier: Mapping[str, Any], plan: Mapping[str, Any]) -> None:
    """Refuse a plan some of whose points an earlier one had with other settings.

    Such points would count as done, or go on from what others have begun.
    """
    axes = ("methods", "sparsities", "levels", "seeds")
    weights, base = dict(earlier["models"]), earlier["base"]
    shared = [model for model in plan["models"] if model[0] in weights]
    if not shared or not all(any(value in earlier[axis] for value in plan[axis]) for axis in axes):
        return
    settings = [(name, base[name], plan["base"].get(name, base[name])) for name in base]
    settings = [setting for setting in settings if setting[0] not in HOW | VARIED]
    settings += [("weights", weights[model], given) for model, given in shared]
    for name, before, now in settings:
        if now != before:
            raise UsageError(
                f"{folder} was begun for points of this sweep with --{name.replace('_', '-')} "
                f"{before}; give the same, or another --out"
            )


def task_of(folder: Path) -> Task:
    """What the nets of a sweep are for."""
    return Task.from_json(read_json(folder / "sweep.json")["task"])


def timed_results(folder: Path) -> pd.DataFrame:
    """The rows of a sweep, once for each platform that its nets were timed on.

    Raises:
        UsageError: The folder holds no sweep, or one that has not been timed.
    """
    path = folder / "latencies.csv"
    if not path.exists():
        raise UsageError(f"{folder} has no latencies.csv: it holds no sweep, or an unfinished one")
    found, latencies = results(folder).drop(columns="hardware"), pd.read_csv(path)
    untimed = set(found["net"].dropna()) - set(latencies["net"])
    if untimed:
        warnings.warn(
            f"{len(untimed)} nets of {folder} are left out, for they have no latencies yet: all "
            "are timed when the sweep is finished; `rmprune sweep --resume` goes on",
            stacklevel=2,
        )
    rows = found.merge(latencies, on="net")
    gathered = "sweep" in rows  # from several, whose names are unique in this folder alone
    return rows.assign(
        sweep=str(folder) + "/" + rows["sweep"] if gathered else str(folder),
        removed_params=1 - rows["params_ratio"],
        images_per_second=1000 * rows["batch_size"] / rows["latency_ms"],
    )


def _key(method: str, config: SlimConfig, level: str) -> dict[str, Any]:
    values = (config.model, method, config.sparsity, config.seed, level)
    return dict(zip(KEY, values, strict=True))


def _is_done(folder: Path, method: str, config: SlimConfig, level: str) -> bool:
    rows = results(folder)
    for column, value in _key(method, config, level).items():
        rows = rows[rows[column] == value]
    return bool(rows["error"].isna().any())


def _append(folder: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Add all rows of a point at once, for that of an earlier failure if there is one."""
    rows = results(folder)
    failed = rows["error"].notna() & (rows[KEY] == [new[0][column] for column in KEY]).all(axis=1)
    rows = rows[~failed]
    hardware = environment()["hardware"]
    table = [*records(rows), *({**row, "hardware": hardware} for row in new)]
    write_csv(pd.DataFrame(table, columns=rows.columns), folder / "results.csv")


def _in_words(method: str, config: SlimConfig, level: str, row: Mapping[str, Any]) -> str:
    name = f"{config.model} {method} λ={config.sparsity:g} {level} seed {config.seed}"
    if "error" in row:
        return f"{name}: failed: {row['error']}"
    share = f"{row['macs_ratio']:.1%} of the MACs, {row['params_ratio']:.1%} of the parameters"
    return f"{name} ({row['lowering']}): {row['accuracy']:.2%}, {share}"


def _add_original(folder: Path, config: SlimConfig, data: Dataset) -> None:
    """The row of the model that a sweep begins with."""
    config = replace(config, sparsity=0.0, seed=0)
    if config.weights is None or _is_done(folder, "original", config, "original"):
        return
    model = trained_model(config, len(data.classes)).eval()
    row = _measured(model, config, data, "residual", f"{config.model}-original.safetensors")
    save_tensors(model.state_dict(), net_path(folder, row))
    _append(folder, [{**_key("original", config, "original"), **row}])


def _train(
    method: Method, place: Path, config: SlimConfig, data: Dataset, track: Track
) -> Checkpoint:
    """The training of a method, from where it stands."""
    if method in ("rm", "slimming"):
        return runs.train(place, config, data, track)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    model = _rival_model(config, len(data.classes)).to(device)
    example = Task.of(data).example_input(device)
    start = Checkpoint(method, config, Task.of(data), model.state_dict())
    start = start.resumed(place / "sparse.pt", but=LATER)
    penalty = RivalPenalty(model, example, _rival(method), config.sparsity)
    return runs.fit_kept(
        model, start, config.training(), data, place / "sparse.pt", device, track, penalty
    )


def _rival(method: Method) -> Rival:
    assert method in get_args(Rival)
    return method  # type: ignore[return-value]  # the line above


def _rival_model(config: SlimConfig, classes: int) -> nn.Module:
    return with_convolved_shortcuts(trained_model(config, classes).eval())


def _point(
    method: Method,
    place: Path,
    trained: Checkpoint,
    config: SlimConfig,
    level: str,
    data: Dataset,
    track: Track,
    lessons: Path,
) -> list[_Row]:
    """Prune to a level, fine-tune and measure; a row for each net, and its file."""
    name = name_of(method, config, level)
    here = place / level.replace("=", "-")
    if method not in ("rm", "slimming"):
        model = _pruned_rival(_rival(method), trained, config, here, data, track, lessons)
        path = here / "net.safetensors"
        save_tensors(model.state_dict(), path)
        row = _measured(model, config, data, "residual", f"{name}.safetensors")
        return [(row, path.read_bytes())]
    finished = runs.prune_and_finetune(here, trained, config, data, track, place, lessons)
    found = {config.lowering: load(here / "net.safetensors")}
    if method == "rm" and config.lowering == "auto":
        found["plain"] = deploy(replace(finished, config=replace(config, lowering="plain")))
    rows: list[_Row] = []
    for lowering, net in found.items():
        path = here / f"{lowering}.safetensors"
        save(net, path)
        row = _measured(net, config, data, lowering, f"{name}-{lowering}.safetensors")
        rows.append((row, path.read_bytes()))
    return rows


def _pruned_rival(
    rival: Rival,
    trained: Checkpoint,
    config: SlimConfig,
    here: Path,
    data: Dataset,
    track: Track,
    lessons: Path,
) -> nn.Module:
    device = pick_device(config.device)
    example = trained.task.example_input()
    model = _rival_model(config, len(data.classes))
    model.load_state_dict(trained.model)

    if config.target is None:

        def enough(smaller: nn.Module) -> bool:
            return least_importance(smaller, example, rival) >= config.threshold
    else:
        target = Target.parse(config.target)
        ratio = ratio_to_original(target.kind, replace(trained, config=config))

        def enough(smaller: nn.Module) -> bool:
            return ratio(smaller) <= target.value

    smaller = prune_until(model, example, rival, enough, config.round_to).to(device)
    start = Checkpoint(f"{rival} pruned", config, trained.task, smaller.state_dict())
    path = here / "finetuned.pt"
    start = start.resumed(path)
    runs.fit_kept(smaller, start, config.finetuning(), data, path, device, track, lessons=lessons)
    return smaller.cpu().eval()


def _measured(
    model: nn.Module, config: SlimConfig, data: Dataset, lowering: str, net: str
) -> dict[str, Any]:
    """What a row tells besides its key; latencies come later, all in one run."""
    example = Task.of(data).example_input()
    original = build_model(config.model, len(data.classes)).eval()
    params, macs = count_params(model), count_macs(model, example)
    device = pick_device(config.device)
    correct, images = evaluate(
        model.to(device), data.test, mean=data.mean, std=data.std, device=device
    )
    model.cpu()
    return {
        "lowering": lowering,
        "accuracy": correct / images,
        "params": params,
        "macs": macs,
        "params_ratio": params / count_params(original),
        "macs_ratio": macs / count_macs(original, example),
        "epochs": config.epochs,
        "finetune_epochs": config.finetune_epochs,
        "net": net,
    }


def net_path(folder: Path, row: Mapping[str, Any]) -> Path:
    """Where the net of a row of ``results.csv`` is kept."""
    return folder / "nets" / str(row["net"])


def load_net(folder: Path, row: Mapping[str, Any], classes: int) -> nn.Module:
    """The net of a row of ``results.csv``."""
    path = net_path(folder, row)
    if row["lowering"] != "residual":
        return load(path)
    model = build_model(row["model"], classes).eval()
    if row["method"] in get_args(Rival):
        model = with_convolved_shortcuts(model)
    return load_pruned(model, load_tensors(path))


def time_all(
    folder: Path,
    platforms: Sequence[Platform],
    task: Task,
    say: Say = print,
    rounds: int = 15,
    min_seconds: float = 0.1,
) -> pd.DataFrame:
    """Time all nets of a sweep, for each platform in one run and in turn.

    Args:
        folder: Of the sweep.
        platforms: To time them on.
        task: Whose images they take.
        say: Told of every platform.
        rounds: Samples per net and platform.
        min_seconds: How long a sample lasts at least.

    Returns:
        The content of ``latencies.csv``: a row for each net and platform, with the columns
        ``net``, ``backend``, ``batch_size``, ``threads``, ``latency_ms``, ``latency_iqr_ms``,
        ``speedup`` over the original, and what it was measured on.

    Raises:
        UsageError: No point has a net.
    """
    rows = records(results(folder).dropna(subset=["net"]))
    if not rows:
        raise UsageError(f"every point of {folder} failed; results.csv tells why")
    nets = {row["net"]: load_net(folder, row, len(task.classes)) for row in rows}
    reference = {row["model"]: row["net"] for row in rows if row["method"] == "original"}
    for row in rows:
        if row["model"] not in reference:
            name = f"{row['model']}-original"
            reference[row["model"]] = name
            nets[name] = build_model(row["model"], len(task.classes)).eval()
    models = {row["net"]: row["model"] for row in rows}
    measured = []
    for platform in platforms:
        say(f"timing {len(nets)} nets: {platform.versions}, batch {platform.batch_size}")
        timings = time_deployed(
            nets,
            task.example_input(),
            platform,
            rounds=rounds,
            min_seconds=min_seconds,
            warn=False,
        )
        for net, model in models.items():
            timing = timings[net]
            measured.append(
                {
                    "net": net,
                    "latency_ms": timing.median_ms,
                    "latency_iqr_ms": timing.iqr_ms,
                    "speedup": timings[reference[model]].median_ms / timing.median_ms,
                    **environment(platform),
                    "backend": platform.backend,
                    "version": platform.versions,
                }
            )
    table = pd.DataFrame(measured)
    write_csv(table, folder / "latencies.csv")
    return table
