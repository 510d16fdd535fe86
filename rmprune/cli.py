"""The command line: options and words; the work is done elsewhere."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import pandas as pd
import torch

from rmprune import __version__, backends, reports, runs
from rmprune import sweep as sweeps
from rmprune.bench import MEASURED, open_network
from rmprune.bench import bench as measure_networks
from rmprune.convert import convert as convert_model
from rmprune.data import Dataset, load_data
from rmprune.errors import RmpruneError, UsageError
from rmprune.export import FORMATS, Agreement, Format, deliver
from rmprune.graph import trace
from rmprune.measure import evaluate
from rmprune.memory import activation_memory
from rmprune.models import create_model, model_names
from rmprune.page import page
from rmprune.plain import PlainNet
from rmprune.plots import draw_sweep, plot_conversion
from rmprune.steps import read
from rmprune.store import load, save, write_csv, write_text
from rmprune.sweep import METHODS, Method
from rmprune.targets import TOLERANCE, Target
from rmprune.training import total_step_size

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., Any])

DEFAULTS = runs.SlimConfig()
PICTURES = (".png", ".svg", ".pdf")
EXISTING = click.Path(exists=True, path_type=Path)
EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
EXISTING_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class _Commands(click.Group):
    """Turns every expected error into one line: status 2 for wrong use, 1 for failure."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **options: Any) -> Any:
        """Run a command and exit."""
        # With a CUDA toolkit but no GPU, torch logs this whenever anything is compiled or timed.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words  # wherever it stands, before the command or behind it
        words = [word for word in words if word != "--debug"]
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                status = super().main(words, **{**options, "standalone_mode": False})
        except click.UsageError as error:
            _fail(error.format_message(), 2)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except click.Abort:
            _fail("interrupted; what was saved stays, and --resume goes on", 130)
        except UsageError as error:
            if debug:
                raise
            _fail(str(error), 2)
        except RmpruneError as error:
            if debug:
                raise
            _fail(str(error), 1)
        except Exception as error:
            if debug:
                raise
            _fail(f"{type(error).__name__}: {error} (--debug shows where)", 1)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    click.echo(f"rmprune: {message}", err=True)
    sys.exit(status)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    click.echo(f"rmprune: note: {message}", err=True)


def progress_bar(iterable: Iterable[T], length: int, label: str) -> Iterator[T]:
    """Show a bar with the time left; on a pipe, only the label."""
    with click.progressbar(iterable, length=length, label=label) as bar:
        yield from bar


def _options(*names: str, of_a_run: bool = False) -> Callable[[Command], Command]:
    """Put the named options of a run on a command, with their help.

    Their defaults are shown, unless the run that a command goes on with has values for them.
    """
    shown = {"show_default": False} if of_a_run else {}
    return lambda command: functools.reduce(
        lambda done, name: click.option(
            f"--{name.replace('_', '-')}", **{"show_default": True, **OPTIONS[name], **shown}
        )(done),
        reversed(names),
        command,
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "default": DEFAULTS.model,
        "help": f"{', '.join(model_names())}, torchvision:NAME or timm:NAME.",
    },
    "weights": {
        "type": EXISTING_FILE,
        "help": "Trained weights of the model: a state dict (.pt, .safetensors). "
        "Without them they are random.",
    },
    "data": {
        "default": DEFAULTS.data,
        "help": "digits (built in), cifar10, cifar100, or folder:PATH with PATH/train/CLASS/* and "
        "PATH/test/CLASS/* (or val).",
    },
    "data_root": {
        "type": FOLDER,
        "default": DEFAULTS.data_root,
        "help": "Where cifar10 and cifar100 lie or are downloaded to.",
    },
    "image_size": {
        "type": click.IntRange(min=1),
        "help": "Resize images to this many pixels; by default they stay as they are.",
    },
    "sparsity": {
        "type": click.FloatRange(min=0),
        "default": DEFAULTS.sparsity,
        "help": "λ of the L1 penalty on the BN scales. The papers train for 200 epochs with "
        "1e-4 to 1e-3; a short training needs more, about 2e-3 to 1e-2.",
    },
    "threshold": {
        "type": click.FloatRange(min=0),
        "default": DEFAULTS.threshold,
        "help": "Channels whose scale |γ| is smaller go.",
    },
    "target": {
        "metavar": "KIND=VALUE",
        "help": "Instead of a threshold: latency=0.5, macs=0.3 or params=0.2, shares of the "
        "original residual model's, or accuracy-drop=0.5, percentage points on held-out training "
        "images (--holdout). Channels go by their scale over what their removal saves.",
    },
    "importance": {
        "type": click.Choice(["scale", "loss"]),
        "default": DEFAULTS.importance,
        "help": "Let a target take channels by their scale, or by what the outputs lose without "
        "them, searched greedily: for models that were not trained for sparsity.",
    },
    "round_to": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.round_to,
        "help": "Keep so many channels that widths are multiples of this: 8 or 16 for SIMD.",
    },
    "prune_steps": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.prune_steps,
        "help": "Reach the target in this many steps, with fine-tuning behind each.",
    },
    "schedule": {
        "type": click.Choice(["constant", "warmup", "ramp"]),
        "default": DEFAULTS.schedule,
        "help": "Let the penalty act from the begin, or rise over the first tenth or half.",
    },
    "cost": {
        "type": click.Choice(["macs", "params", "latency", "uniform"]),
        "default": DEFAULTS.cost,
        "help": "Penalise a channel by the multiply-adds, parameters or measured time that its "
        "removal saves, or all alike.",
    },
    "lowering": {
        "type": click.Choice(["plain", "auto"]),
        "default": DEFAULTS.lowering,
        "help": "plain: no additions in the net. auto: a block may have one again where that is "
        "faster on the backend.",
    },
    "backend": {
        "type": click.Choice(backends.BACKENDS),
        "default": DEFAULTS.backend,
        "help": "What the net shall run on, for all that is measured.",
    },
    "threads": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.threads,
        "help": "CPU threads for latencies.",
    },
    "latency_batch": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.latency_batch,
        "help": "Images at once for latencies.",
    },
    "holdout": {
        "type": click.FloatRange(min=0, max=1, max_open=True),
        "default": DEFAULTS.holdout,
        "help": "Share of the training images that no training sees, for accuracy-drop.",
    },
    "epochs": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.epochs,
        "help": "Epochs of sparsity training.",
    },
    "finetune_epochs": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.finetune_epochs,
        "help": "Epochs of fine-tuning under the masks.",
    },
    "distill": {
        "is_flag": True,
        "help": "Train towards the outputs of the model that the run began with, too: "
        "the one with --weights.",
    },
    "lr": {
        "type": click.FloatRange(min=0, min_open=True),
        "default": DEFAULTS.lr,
        "help": "Learning rate of the sparsity training.",
    },
    "finetune_lr": {
        "type": click.FloatRange(min=0, min_open=True),
        "default": DEFAULTS.finetune_lr,
        "help": "Learning rate of the fine-tuning.",
    },
    "batch_size": {
        "type": click.IntRange(min=1),
        "default": DEFAULTS.batch_size,
        "help": "Images a training step.",
    },
    "seed": {
        "type": click.IntRange(min=0),
        "default": DEFAULTS.seed,
        "help": "Of initial weights, data order and augmentation.",
    },
    "device": {
        "default": DEFAULTS.device,
        "help": "cpu, cuda, …; auto takes a GPU if there is one.",
    },
    "precision": {
        "type": click.Choice(["auto", "float32", "bf16"]),
        "default": DEFAULTS.precision,
        "help": "Of training; auto takes bf16 where the hardware computes it.",
    },
    "compile": {
        "type": click.Choice(["auto", "off", "on"]),
        "default": DEFAULTS.compile,
        "help": "Compile the training step: faster after about a minute; auto does so in trainings "
        "of 3000 steps and more where there is a C++ compiler.",
    },
    "out": {"type": FOLDER, "default": Path("runs/slim"), "help": "Run folder."},
    "resume": {
        "is_flag": True,
        "help": "Go on with the run in --out, behind its last whole epoch.",
    },
}

TASK = ("data", "data_root", "image_size")
TRAINING = ("lr", "batch_size", "seed", "device", "precision", "compile")
SPARSITY = ("sparsity", "schedule", "cost", "holdout", "distill")
PLATFORM = ("lowering", "round_to", "backend", "threads", "latency_batch")
BUDGET = ("threshold", "target", "importance")


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96}
)
@click.version_option(__version__, prog_name="rmprune")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Make residual CNNs smaller and faster, and prove it.

    rmprune trains a residual network with an L1 penalty on its BatchNorm scales, rewrites it
    exactly into a plain network without additions, and removes the channels that training
    switched off.

    \b
    Everything at once:    rmprune slim --sparsity 5e-3 --threshold 5e-3
    Step by step:          rmprune train    --sparsity 5e-3 --out runs/a
                           rmprune prune    runs/a --threshold 5e-3
                           rmprune finetune runs/a/threshold-0.005
    See what came out:     rmprune inspect  runs/a/threshold-0.005/net.safetensors
    To the device:         rmprune export   runs/a/threshold-0.005 --format c --quantize int8
    Beside other nets:     rmprune bench    runs/a/threshold-0.005 torchvision:mobilenet_v2
    """
    del debug  # taken from the command line by _Commands.main


@main.command()
@_options("model", "weights", *TASK, *SPARSITY, *BUDGET, "prune_steps", *PLATFORM)
@_options("epochs", "finetune_epochs", "finetune_lr", *TRAINING, "out", "resume")
def slim(out: Path, resume: bool, **settings: Any) -> None:
    """Run the whole pipeline: train, select, fine-tune under masks, convert, remove, measure.

    Leaves in the run folder: net.safetensors (the pruned plain net), report.csv, run.png,
    metrics.csv, config.json and the checkpoints.
    """
    config = _config(settings)
    _check_budget(settings)
    data = _begin(out, resume, config)
    sparse = runs.train(out, config, data, progress_bar)
    finished = runs.prune_and_finetune(out, sparse, config, data, progress_bar)
    _say_selection(finished)
    table = runs.report(out, sparse, finished, data, progress_bar)
    click.echo(reports.as_text(table))
    click.echo(f"saved {out / 'net.safetensors'}, report.csv and run.png beside it")


@main.command()
@_options("model", "weights", *TASK, *SPARSITY, *PLATFORM, "epochs", *TRAINING, "out", "resume")
def train(out: Path, resume: bool, **settings: Any) -> None:
    """Train for sparsity alone; `rmprune prune` goes on from it.

    A sparsity of 0 is plain training.
    """
    config = _config(settings)
    data = _begin(out, resume, config)
    checkpoint = runs.train(out, config, data, progress_bar)
    click.echo(f"test accuracy {_accuracy(checkpoint)}; saved {out / 'sparse.pt'}")


@main.command()
@click.argument("run", type=EXISTING)
@_options("threshold", "target")
@_options("importance", *PLATFORM, "data", "data_root", of_a_run=True)
@click.option(
    "--out", type=FOLDER, help="Folder to write.  [default: RUN/threshold-T or RUN/KIND-VALUE]"
)
def prune(run: Path, out: Path | None, **settings: Any) -> None:
    """Select channels of a sparse RUN, convert and remove, without training.

    Seconds; minutes where many nets must be timed or tried, for a target of latency or accuracy
    or with --importance loss.

    RUN is a folder of `rmprune train` or its sparse.pt; a finetuned.pt is pruned further. Any
    number of thresholds and targets can be tried on one training; `rmprune finetune` goes on
    from each. Where all channels of a tensor lie under the threshold, the one with the largest
    scale stays. Options that are not shown with a default are those of the run.
    """
    path = run / "sparse.pt" if run.is_dir() else run
    _check_budget(settings)
    start = runs.Checkpoint.load(path)
    budget = {"threshold": settings["threshold"], "target": settings["target"], "prune_steps": 1}
    config = dataclasses.replace(start.config, **{**_given(settings), **budget})
    level = f"threshold-{config.threshold:g}"
    if config.target is not None:
        level = config.target.replace("=", "-")
    out = out or path.parent / level
    if start.stage == "sparse" and start.epoch < start.config.epochs:
        click.echo(
            f"rmprune: note: {path} has trained {start.epoch} of {start.config.epochs} epochs; "
            "`rmprune train --resume` goes on",
            err=True,
        )
    masked = runs.prune(start, config, out, _load(config, start.task))
    _say_selection(masked)
    _say_size(load(out / "pruned.safetensors"), out / "pruned.safetensors")
    kind = "" if config.target is None else Target.parse(config.target).kind
    if kind in TOLERANCE:
        ratio = runs.deployed_ratio(kind, masked, load(out / "pruned.safetensors"))
        click.echo(f"{kind}: {ratio:.3f} of the original {config.model}'s")


@main.command()
@click.argument("run", type=EXISTING)
@click.option("--plain", is_flag=True, help="Fine-tune a plain net: RUN is a .safetensors file.")
@_options(*TASK, "finetune_epochs", "distill", "finetune_lr", "batch_size", "seed", of_a_run=True)
@_options("device", "precision", "compile", of_a_run=True)
@click.option("--out", type=FOLDER, help="Folder to write.  [default: the folder of RUN's files]")
@_options("resume")
def finetune(run: Path, plain: bool, out: Path | None, resume: bool, **settings: Any) -> None:
    """Fine-tune what `rmprune prune` wrote, under its masks, and save the plain net of it.

    RUN is the folder or its masked.pt. With --plain it is a plain net, whose every weight is
    free: a BN is put behind each convolution and folded again at the end; the learning rate
    is then 5e-4 by default, since narrow plain nets lose what they know at larger ones.
    Options that are not given are those of the run.
    """
    source = run / "masked.pt" if run.is_dir() and not plain else run
    if not source.exists():
        pruned = ", ".join(sorted(str(path.parent) for path in run.glob("*/masked.pt")))
        raise UsageError(
            f"{run} has no masked.pt; "
            + (f"give one of {pruned}" if pruned else f"select channels first: rmprune prune {run}")
        )
    folder = out or source.parent
    if plain:
        net = load(source)
        task, config = runs.task_of(net), runs.SlimConfig(finetune_lr=runs.PLAIN_LR)
        if task is not None:
            config = dataclasses.replace(config, data=task.data)
        checkpoint_path, net_path = runs.plain_paths(folder, source)
    else:
        masked = runs.Checkpoint.load(source)
        task, config = masked.task, masked.config
        checkpoint_path, net_path = folder / "finetuned.pt", folder / "net.safetensors"
    config = dataclasses.replace(config, **_given(settings))
    if checkpoint_path.exists():
        _check_same(runs.Checkpoint.load(checkpoint_path).config, config, folder, resume)
    data = _load(config, task)
    if plain:
        checkpoint = runs.finetune_plain(folder, source, config, data, progress_bar)
    else:
        checkpoint = runs.finetune(folder, masked, config, data, progress_bar)
    click.echo(f"test accuracy {_accuracy(checkpoint)}")
    _say_size(load(net_path), net_path)


@main.command()
@click.argument("model", metavar="MODEL")
@_options("weights")
@click.option(
    "--num-classes",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Outputs of the model.",
)
@click.option(
    "--image-shape",
    type=(int, int, int),
    default=(3, 32, 32),
    show_default=True,
    help="Channels, height and width of an image.",
)
@click.option(
    "--downsample",
    type=click.Choice(["relu", "prelu"]),
    default="relu",
    show_default=True,
    help="Blocks that change the shape: carry x and merge the shortcut's weights (relu), or "
    "compute the shortcut first and carry it through a PReLU (RMNet, appendix A.1).",
)
@click.option(
    "--carry",
    type=click.Choice(["auto", "shift", "prelu", "partial"]),
    default="auto",
    show_default=True,
    help="How a tensor that may be negative passes an activation on its way past a block: "
    "shifted, by a PReLU, or by an activation of part of the channels.",
)
@click.option(
    "--bound",
    type=click.Choice(["interval", "calibrated"]),
    default="interval",
    show_default=True,
    help="What shifts are made for: every input, or inputs like noise of standard deviation 1.",
)
@click.option(
    "--fuse",
    type=click.Choice(["auto", "always"]),
    default="auto",
    show_default=True,
    help="Merge 1x1 convolutions that follow each other: where that costs nothing, or always.",
)
@click.option("--keep-bn", is_flag=True, help="Keep BNs, for pruning by scale and for training.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw the layers before and after to this file (.png, .svg, .pdf).",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write."
)
def convert(
    model: str,
    weights: Path | None,
    num_classes: int,
    image_shape: tuple[int, int, int],
    plot: Path | None,
    out: Path,
    **options: Any,
) -> None:
    """Rewrite MODEL exactly as a plain net and save it.

    MODEL is one of rmprune's own, torchvision:NAME or timm:NAME. Nothing is trained or
    removed. The two are compared in float64 before the net is saved.
    """
    if min(image_shape) < 1:
        raise UsageError(f"an image has at least one channel and pixel, not {image_shape}")
    if plot is not None and plot.suffix not in PICTURES:
        raise UsageError(f"--plot {plot}: the name must end in {', '.join(PICTURES)}")
    residual = create_model(model, num_classes=num_classes, weights=weights).eval()
    example = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
    net = convert_model(residual, example, **options)
    net.info["model"] = model
    if weights is None:
        click.echo("rmprune: note: without --weights the net's weights are random", err=True)
    save(net, out)
    ways = pd.DataFrame(net.info["carried"])
    if not ways.empty and (ways["mode"] != "as is").any():
        click.echo(reports.as_text(ways[ways["mode"] != "as is"]))
    click.echo(reports.as_text(reports.compare({model: residual, "plain": net}, example[:1])))
    click.echo(f"saved {out}")
    if plot is not None:
        plot_conversion(read(trace(residual)), net, plot)
        click.echo(f"drew {plot}")


@main.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    default=(DEFAULTS.model,),
    show_default=True,
    help="As in slim; may be given several times.",
)
@click.option(
    "--weights", type=EXISTING_FILE, multiple=True, help="Trained weights, one file for each model."
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(METHODS),
    multiple=True,
    default=("rm",),
    show_default=True,
    help="rm: rmprune itself. slimming: inner channels of the residual network only. Others: "
    "Torch-Pruning's pruners. May be given several times.",
)
@click.option(
    "--sparsity",
    "sparsities",
    type=click.FloatRange(min=0),
    multiple=True,
    required=True,
    help="λ, of the rivals reg; may be given several times.",
)
@click.option(
    "--threshold",
    "thresholds",
    type=click.FloatRange(min=0),
    multiple=True,
    help="Prune to it; may be given several times.",
)
@click.option(
    "--target",
    "targets",
    metavar="KIND=VALUE",
    multiple=True,
    help="Prune to it, as in prune; may be given several times.",
)
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    show_default=True,
    help="May be given several times.",
)
@_options(*TASK, "schedule", "cost", "holdout", "distill", "importance", "prune_steps", *PLATFORM)
@_options("epochs", "finetune_epochs", "finetune_lr", "lr", "batch_size", "device", "precision")
@_options("compile", "out", "resume")
def sweep(
    models: tuple[str, ...],
    weights: tuple[Path, ...],
    methods: tuple[Method, ...],
    sparsities: tuple[float, ...],
    thresholds: tuple[float, ...],
    targets: tuple[str, ...],
    seeds: tuple[int, ...],
    out: Path,
    resume: bool,
    **settings: Any,
) -> None:
    """Train, prune and fine-tune many nets, by rmprune and by its rivals, and time all in one run.

    One training serves all thresholds and targets of its method, sparsity and seed. The folder
    gets results.csv (a row a net, as soon as it is finished), latencies.csv, and the nets.
    `rmprune plot` draws them. A stopped sweep goes on with --resume; so does one with more
    values than before.
    """
    if weights and len(weights) != len(models):
        raise UsageError(f"{len(models)} models need {len(models)} --weights, not {len(weights)}")
    files: list[str | None] = [str(path) for path in weights]
    files = files or [None] * len(models)
    first = {"weights": files[0], "model": models[0], "target": next(iter(targets), None)}
    config = _config({**settings, **first})
    plan = sweeps.Sweep(
        config,
        tuple(zip(models, files, strict=True)),
        methods,
        sparsities,
        (*(f"threshold={value:g}" for value in thresholds), *targets),
        seeds,
    )
    if (out / "results.csv").exists() and not resume:
        raise UsageError(f"{out} holds a sweep; --resume goes on with it, or name another --out")
    data = _load(config)
    sweeps.run(out, plan, data, progress_bar, click.echo)
    places = [
        backends.Platform(backend, config.threads, batch)
        for backend in backends.installed()
        if backend in (*sweeps.TIMED_ON, config.backend)
        for batch in (1, 64)
    ]
    sweeps.time_all(out, places, runs.Task.of(data), click.echo)
    failed = int(sweeps.results(out)["error"].notna().sum())
    click.echo(f"wrote {out / 'results.csv'} and latencies.csv; {failed} points failed")


@main.command()
@click.argument("folders", metavar="SWEEP...", type=EXISTING_FOLDER, nargs=-1, required=True)
@click.option(
    "--backend",
    type=click.Choice(backends.BACKENDS),
    default="onnxruntime",
    show_default=True,
    help="Whose latencies.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Their batch."
)
@click.option(
    "--x",
    type=click.Choice(["speedup", "latency", "images/s"]),
    default="speedup",
    show_default=True,
    help="What the first picture has on its horizontal axis.",
)
@click.option(
    "--format",
    "ending",
    type=click.Choice([picture.removeprefix(".") for picture in PICTURES]),
    default="png",
    show_default=True,
    help="Of the files.",
)
@click.option("--title", default="", help="Above the pictures.")
@click.option("--out", type=FOLDER, help="Folder to write.  [default: the first SWEEP]")
def plot(
    folders: tuple[Path, ...],
    backend: str,
    batch_size: int,
    x: str,
    ending: str,
    title: str,
    out: Path | None,
) -> None:
    """Draw sweeps as the paper's Figure 7: accuracy against speed (a) and size (b).

    A line joins the nets of a method that no other one of it beats; bars are standard
    deviations over the seeds. Several sweeps become one picture.
    """
    out = out or folders[0]
    rows = pd.concat([sweeps.timed_results(folder) for folder in folders])
    here = rows[(rows["backend"] == backend) & (rows["batch_size"] == batch_size)]
    if here.empty:
        known = rows[["backend", "batch_size"]].drop_duplicates().itertuples(index=False)
        raise UsageError(
            f"there are no latencies of {backend} at batch size {batch_size}; there are those of "
            + ", ".join(f"{name} at {size}" for name, size in known)
        )
    column = {"speedup": "speedup", "latency": "latency_ms", "images/s": "images_per_second"}[x]
    for name, axis in (("figure7a", column), ("figure7b", "removed_params")):
        path = out / f"{name}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_sweep(here, axis, title).savefig(path, dpi=200)
        click.echo(f"drew {path}")


@main.command()
@click.argument("folder", metavar="RUN_OR_SWEEP", type=EXISTING_FOLDER)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write.  [default: report.html in the folder]",
)
def report(folder: Path, out: Path | None) -> None:
    """Write one HTML page about a finished run or sweep; it needs no network.

    Accuracy against speed and size (point at a net for its numbers, click it for its layers),
    training curves, and every layer's channels before and after.
    """
    out = out or folder / "report.html"
    write_text(page(folder), out)
    click.echo(f"wrote {out}")


@main.command(name="eval")
@click.argument("net", required=False, type=EXISTING)
@_options("model", "weights", *TASK, "device", of_a_run=True)
def evaluate_(net: Path | None, device: str, **settings: Any) -> None:
    """Classify all test images, in float32.

    NET is a plain net, a checkpoint of a run or a run's folder (its net.safetensors), and
    --data need not be given if it is the data that NET was trained for. Without NET, --model,
    --weights and --data name a model and its data.
    """
    place = runs.pick_device(device)
    given = _given(settings)
    if net is None:
        if not {"weights", "data"} <= given.keys():
            raise UsageError("name what to evaluate: NET, or --model, --weights and --data")
        config = _config(settings)
        data = _load(config)
        network: torch.nn.Module = create_model(
            config.model, num_classes=len(data.classes), weights=config.weights
        )
    else:
        if given.keys() & {"model", "weights"}:
            raise UsageError("give either NET or --model and --weights, not both")
        network, task, config = _open(_net_of(net))
        if task is None and "data" not in given:
            raise UsageError(f"{net} does not say what it was trained for; name it by --data")
        config = dataclasses.replace(config, **given)
        data = _load(config, task)
    network.to(place).eval()
    with torch.no_grad():
        outputs = network(torch.zeros(1, *data.image_shape, device=place)).shape[1]
    if outputs != len(data.classes):
        raise UsageError(
            f"the net has {outputs} outputs, but {config.data} has {len(data.classes)} classes"
        )
    correct, images = evaluate(
        network, data.test, mean=data.mean, std=data.std, device=place, track=progress_bar
    )
    click.echo(f"{100 * correct / images:.2f} % ({correct} of {images} images of {config.data})")


@main.command()
@click.argument("net", type=EXISTING)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    default="onnx",
    show_default=True,
    help="onnx; pt2, for torch.export.load without rmprune; c, one C99 file for "
    "microcontrollers, without malloc.",
)
@click.option(
    "--quantize",
    type=click.Choice(["int8"]),
    help="Weights and activations in 8 bits, calibrated on training images of --data.",
)
@click.option(
    "--embed-preprocessing",
    is_flag=True,
    help="Take raw images, uint8 of N×H×W×3 in RGB, and normalise them in the network.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Images at once; 0: any number.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Test images to compare the result with torch on.",
)
@click.option(
    "--calibration-images",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Training images to calibrate int8 on.",
)
@_options("data", "data_root", of_a_run=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File to write.  [default: NET.onnx, NET.pt2, or NET.h and NET.c]",
)
def export(
    net: Path,
    form: Format,
    quantize: str | None,
    embed_preprocessing: bool,
    batch_size: int,
    images: int,
    calibration_images: int,
    out: Path | None,
    **settings: Any,
) -> None:
    """Write NET for a device, and compare what runs there with torch on real images.

    NET is a plain net, a checkpoint of a run or a run's folder (its net.safetensors); --data
    need not be given if it is the data that NET was trained for. BNs are folded. In float32
    every output must be torch's to 1e-4 of the outputs' magnitude; of int8, accuracies and
    times are shown instead.
    """
    given = _given(settings)
    network, task, config = _open(_net_of(net))
    if task is None and "data" not in given:
        raise UsageError(f"{net} does not say what it was trained for; name it by --data")
    data = _load(dataclasses.replace(config, **given), task)
    path = out or _net_of(net).with_suffix({"onnx": ".onnx", "pt2": ".pt2", "c": ".h"}[form])
    done = deliver(
        network,
        form,
        path,
        data,
        int8=quantize is not None,
        embed_preprocessing=embed_preprocessing,
        batch_size=batch_size,
        images=images,
        calibration=calibration_images,
    )
    for file in done.paths:
        click.echo(f"saved {file}: {file.stat().st_size:,} bytes")
    if done.c is not None:
        click.echo(f"constants {done.c.weight_bytes:,} bytes, arena {done.c.arena_bytes:,} bytes")
    if done.agreement is None:
        click.echo("not compared with torch: there is no C compiler here")
    else:
        _say_agreement(done.agreement, quantize is not None)
    if done.timings is not None:
        click.echo(
            reports.as_text(done.timings[["net", "latency_ms", "latency_iqr_ms", "speedup"]])
        )


def _say_agreement(agreement: Agreement, quantized: bool) -> None:
    found = f"{agreement.images} test images"
    if quantized:
        click.echo(
            f"accuracy on {found}: {100 * agreement.accuracy:.2f} % in int8, "
            f"{100 * agreement.torch_accuracy:.2f} % in float32; "
            f"the same class on {agreement.same_class}"
        )
        return
    click.echo(
        f"largest difference from torch on {found}: {agreement.difference:.1e} of the outputs' "
        f"magnitude; the same class on {agreement.same_class}"
    )


@main.command()
@click.argument("nets", metavar="NET...", nargs=-1, required=True)
@click.option(
    "--backend",
    "engines",
    type=click.Choice(backends.BACKENDS),
    multiple=True,
    default=("torch",),
    show_default=True,
    help="What runs them; may be given several times.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Images at once; may be given several times.",
)
@_options("threads")
@click.option(
    "--rounds",
    type=click.IntRange(min=2),
    default=15,
    show_default=True,
    help="Samples per net; the nets run in turn.",
)
@click.option(
    "--image-shape",
    type=click.IntRange(min=1),
    nargs=3,
    metavar="C H W",
    help="Of nets that do not know it.  [default: 3 224 224 for those of torchvision and timm, "
    "else 3 32 32]",
)
@click.option(
    "--num-classes",
    type=click.IntRange(min=1),
    help="Of models by name.  [default: 1000 for those of torchvision and timm, else 10]",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="CSV file to write, too."
)
def bench(
    nets: tuple[str, ...],
    engines: tuple[backends.Backend, ...],
    batch_sizes: tuple[int, ...],
    threads: int,
    rounds: int,
    image_shape: tuple[int, int, int] | None,
    num_classes: int | None,
    out: Path | None,
) -> None:
    """Measure nets beside each other: time, memory, size. The first is the reference.

    NET is a plain net (.safetensors), a run's folder, an ONNX file, one of rmprune's models,
    torchvision:NAME or timm:NAME.

    \b
    latency    median of a forward pass of the whole batch, all nets in turn
    arena      bytes that a static plan needs for the activations of one image
    measured   bytes that memory grew by in the first pass of a batch (Linux)
    file       bytes of what is deployed: weights, ONNX graph, constants in C
    """
    places = [
        backends.Platform(engine, threads, size) for engine in engines for size in batch_sizes
    ]
    found = {
        name: open_network(str(_net_of(Path(name))), image_shape, num_classes) for name in nets
    }
    tables = []
    for place in places:
        table = measure_networks(found, place, rounds=rounds)
        click.echo(f"{place.versions}, batch {place.batch_size}, threads {place.threads}")
        click.echo(reports.as_text(table[list(MEASURED)]))
        tables.append(table)
    if out is not None:
        write_csv(pd.concat(tables), out)
        click.echo(f"wrote {out}")


@main.command()
@click.argument("file", type=EXISTING)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option(
    "--memory",
    is_flag=True,
    help="Show the activations that live while each layer runs on one image.",
)
def inspect(file: Path, as_json: bool, memory: bool) -> None:
    """Show what became of every layer of a plain net, or of a run's checkpoint once plain.

    Channels before and after removal, parameters and MACs. Reserved channels, counted among
    them, are those that carry a tensor past a block to where its shortcut was added. FILE may
    be a run's folder, for its net.safetensors.
    """
    file = _net_of(file)
    net = runs.deploy(runs.Checkpoint.load(file)) if file.suffix == ".pt" else load(file)
    table = _memory(net, file) if memory else reports.layer_table(net)
    if as_json:
        click.echo(json.dumps({"info": net.info, "layers": table.to_dict("records")}))
        return
    click.echo(reports.as_text(table))
    if memory:
        most = table.iloc[int(table["live_bytes"].to_numpy().argmax())]
        click.echo(
            f"peak {most['live_bytes']:,} bytes in float32, at {most['layer']}; "
            f"a static arena takes {table.attrs['arena_bytes']:,}, in int8 a quarter"
        )
        return
    _say_size(net, file)


def _memory(net: PlainNet, file: Path) -> pd.DataFrame:
    if net.input_shape is None:
        raise UsageError(f"{file} does not say how large its images are; convert it again")
    return activation_memory(net, torch.zeros(1, *net.input_shape))


def _net_of(path: Path) -> Path:
    """The file that a path names: of a run's folder, the net that came out."""
    if not path.is_dir():
        return path
    net = path / "net.safetensors"
    if not net.exists():
        raise UsageError(f"{path} has no net.safetensors; name a file, or finish the run")
    return net


def _config(settings: dict[str, Any]) -> runs.SlimConfig:
    return runs.SlimConfig(**_plain_values(settings))


def _check_budget(settings: dict[str, Any]) -> None:
    source = click.get_current_context().get_parameter_source("threshold")
    if settings["target"] is not None and source is not click.core.ParameterSource.DEFAULT:
        raise UsageError("give either --threshold or --target, not both")
    if settings["target"] is None and settings["importance"] is not None:
        runs.check_importance(settings["importance"])


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that stand on the command line."""
    source = click.get_current_context().get_parameter_source
    default = click.core.ParameterSource.DEFAULT
    return _plain_values({k: v for k, v in settings.items() if source(k) is not default})


def _plain_values(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with paths as text, which config.json can hold."""
    return {key: str(v) if isinstance(v, Path) else v for key, v in settings.items()}


def _load(config: runs.SlimConfig, task: runs.Task | None = None) -> Dataset:
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


def _begin(out: Path, resume: bool, config: runs.SlimConfig) -> Dataset:
    """Load the data of a run, once it is clear that the run can begin.

    The folder must hold no other run, and with ``--resume`` may hold the same one.
    """
    found = runs.read_config(out)
    if found is not None and (out / "sparse.pt").exists():
        _check_same(found, config, out, resume)
    elif resume:
        click.echo(f"rmprune: note: {out} holds no run to resume; a new one begins", err=True)
    runs.pick_device(config.device)
    if config.weights is None:
        create_model(config.model)
    data = _load(config)
    _hint_at_reach(config, data)
    return data


def _check_same(
    found: runs.SlimConfig, config: runs.SlimConfig, folder: Path, resume: bool
) -> None:
    if not resume:
        raise UsageError(f"{folder} holds a run; --resume goes on with it, or name another --out")
    changed = [
        f"--{field.name.replace('_', '-')} was {getattr(found, field.name)}"
        for field in dataclasses.fields(config)
        if getattr(found, field.name) != getattr(config, field.name)
    ]
    if changed:
        raise UsageError(f"{folder} holds a run with other settings: {', '.join(changed)}")


def _open(file: Path) -> tuple[torch.nn.Module, runs.Task | None, runs.SlimConfig]:
    """A network from a file, what it was trained for, and its run's settings."""
    if file.suffix == ".pt":
        checkpoint = runs.Checkpoint.load(file)
        return checkpoint.build(), checkpoint.task, checkpoint.config
    net = load(file)
    task = runs.task_of(net)
    if task is None:
        return net, None, runs.SlimConfig()
    size = net.info.get("image_size")
    return net, task, runs.SlimConfig(data=task.data, image_size=size)


def _hint_at_reach(config: runs.SlimConfig, data: Dataset) -> None:
    """Say so, before training, if the penalty cannot bring a scale of 1 under the threshold."""
    reach = config.sparsity * total_step_size(config.training(), data)
    if config.sparsity > 0 and reach < 1:
        click.echo(
            f"rmprune: note: in this training the penalty moves a scale by {reach:.2g} at most, "
            "and scales begin near 1, so few channels or none will be switched off; "
            "a larger --sparsity or more --epochs reach further",
            err=True,
        )


def _say_selection(masked: runs.Checkpoint) -> None:
    masks = masked.narrowed
    assert masks is not None
    click.echo(f"{masks.removed} of {masks.channels} channels are switched off")
    for name in masks.forced:
        click.echo(f"all channels of {name} would go; the largest stays")


def _say_size(net: PlainNet, path: Path) -> None:
    table = reports.layer_table(net)
    params, macs = int(table["params"].sum()), int(table["macs"].sum())
    click.echo(f"{path}: {params:,} parameters, {macs / 1e6:.2f} MMACs an image")


def _accuracy(checkpoint: runs.Checkpoint) -> str:
    if not checkpoint.history:
        return "not measured (no epoch was trained)"
    return f"{100 * checkpoint.history[-1]['test_accuracy']:.2f} %"
