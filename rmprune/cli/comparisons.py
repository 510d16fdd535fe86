"""Commands that set nets beside each other: sweep, plot, report and bench."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import click
import pandas as pd

from rmprune import backends, reports
from rmprune import sweep as sweeps
from rmprune.bench import MEASURED, open_network
from rmprune.bench import bench as measure_networks
from rmprune.checkpoints import Task
from rmprune.cli.group import main
from rmprune.cli.opening import load_images, net_of
from rmprune.cli.options import (
    AUGMENTATION,
    DEFAULTS,
    EXISTING_FILE,
    EXISTING_FOLDER,
    FOLDER,
    PICTURES,
    PLATFORM,
    TASK,
    config_of,
    is_given,
    options,
)
from rmprune.cli.words import progress_bar
from rmprune.data import load_data
from rmprune.errors import UsageError
from rmprune.page import page
from rmprune.plots import draw_sweep
from rmprune.store import write_csv, write_text
from rmprune.sweep import METHODS, Method
from rmprune.workers import Here, Processes, RayCluster, Workers


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
@options(*TASK, "schedule", "cost", "holdout", "distill", "importance", "prune_steps", *PLATFORM)
@options("epochs", "finetune_epochs", "finetune_lr", "lr", "batch_size", *AUGMENTATION)
@options("device", "precision", "compile", "log", "out", "resume")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Trainings and points at once on this machine, each with its share of the cores. "
    "Targets of latency want 1.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Run them on the Ray cluster at this address; local starts one here. Its nodes load "
    "--data and --weights from the same paths.",
)
@click.option(
    "--job-cpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="CPUs of a Ray cluster that each takes.",
)
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
    jobs: int,
    ray: str | None,
    job_cpus: int,
    **settings: Any,
) -> None:
    """Train, prune and fine-tune many nets, by rmprune and by its rivals, and time all in one run.

    One training serves all thresholds and targets of its method, sparsity and seed. The folder
    gets results.csv (a row a net, as soon as it is finished), latencies.csv, and the nets.
    `rmprune plot` draws them. A stopped sweep goes on with --resume, which tries points that
    failed again; so does one with more values than before.
    """
    if weights and len(weights) != len(models):
        raise UsageError(f"{len(models)} models need {len(models)} --weights, not {len(weights)}")
    files: list[str | None] = [str(path) for path in weights]
    files = files or [None] * len(models)
    first = {"weights": files[0], "model": models[0], "target": next(iter(targets), None)}
    config = config_of({**settings, **first})
    plan = sweeps.Sweep(
        config,
        tuple(zip(models, files, strict=True)),
        methods,
        sparsities,
        (*(f"threshold={value:g}" for value in thresholds), *targets),
        seeds,
    )
    if ray is not None and jobs > 1:
        raise UsageError("--jobs are for this machine, and --ray is given; leave one out")
    if ray is None and is_given("job_cpus"):
        raise UsageError("--job-cpus is for a Ray cluster; give --ray, or --jobs for this machine")
    if (out / "results.csv").exists() and not resume:
        raise UsageError(f"{out} holds a sweep; --resume goes on with it, or name another --out")
    task = Task.of(load_images(config))
    workers: Workers = Here(progress_bar)
    if ray is not None:
        workers = RayCluster(ray, job_cpus)
    elif jobs > 1:
        workers = Processes(jobs)
    open_data = partial(
        load_data, config.data, root=Path(config.data_root), image_size=config.image_size
    )
    try:
        sweeps.run(out, plan, open_data, workers, click.echo)
    finally:
        workers.close()
    places = [
        backends.Platform(backend, config.threads, batch)
        for backend in backends.installed()
        if backend in (*sweeps.TIMED_ON, config.backend)
        for batch in (1, 64)
    ]
    sweeps.time_all(out, places, task, click.echo)
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

    A line joins the nets of a method and model that no other one of them beats; bars are
    standard deviations over the seeds of a sweep. Several sweeps become one picture.
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
@options("threads")
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
    for name, count in Counter(nets).items():
        if count > 1:
            raise UsageError(f"{name} is given {count} times; name each net once")
    found = {name: open_network(str(net_of(Path(name))), image_shape, num_classes) for name in nets}
    sizes = {name: "×".join(map(str, image.shape[1:])) for name, (_, image) in found.items()}
    # Raw images have their channels last.
    if len({tuple(sorted(image.shape[1:])) for _, image in found.values()}) > 1:
        of_each = ", ".join(f"{name} takes {size}" for name, size in sizes.items())
        click.echo(
            f"rmprune: note: images differ in size: {of_each}; models by name take --image-shape",
            err=True,
        )
    tables = []
    for place in places:
        table = measure_networks(found, place, rounds=rounds)
        click.echo(f"{place.versions}, batch {place.batch_size}, threads {place.threads}")
        click.echo(reports.as_text(table[list(MEASURED)]))
        tables.append(table)
    if out is not None:
        write_csv(pd.concat(tables), out)
        click.echo(f"wrote {out}")
