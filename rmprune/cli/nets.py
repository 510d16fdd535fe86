"""Commands about one net: convert, eval, export and inspect."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click
import pandas as pd
import torch

from rmprune import reports
from rmprune.checkpoints import Checkpoint, deploy, pick_device
from rmprune.cli.group import main
from rmprune.cli.opening import load_images, net_of, open_net
from rmprune.cli.options import (
    EXISTING,
    PICTURES,
    TASK,
    config_of,
    given_settings,
    is_given,
    options,
)
from rmprune.cli.words import progress_bar, say_size
from rmprune.convert import convert as convert_model
from rmprune.errors import UsageError
from rmprune.export import FORMATS, Agreement, Format, deliver
from rmprune.graph import trace
from rmprune.measure import evaluate
from rmprune.memory import activation_memory
from rmprune.models import create_model
from rmprune.plain import PlainNet
from rmprune.plots import plot_conversion
from rmprune.steps import read
from rmprune.store import load, save


@main.command()
@click.argument("model", metavar="MODEL")
@options("weights")
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


@main.command(name="eval")
@click.argument("net", required=False, type=EXISTING)
@options("model", "weights", *TASK, "device", of_a_run=True)
def evaluate_(net: Path | None, device: str, **settings: Any) -> None:
    """Classify all test images, in float32.

    NET is a plain net, a checkpoint of a run or a run's folder (its net.safetensors), and
    --data need not be given if it is the data that NET was trained for. Without NET, --model,
    --weights and --data name a model and its data.
    """
    place = pick_device(device)
    given = given_settings(settings)
    if net is None:
        if not {"weights", "data"} <= given.keys():
            raise UsageError("name what to evaluate: NET, or --model, --weights and --data")
        config = config_of(settings)
        data = load_images(config)
        network: torch.nn.Module = create_model(
            config.model, num_classes=len(data.classes), weights=config.weights
        )
    else:
        if given.keys() & {"model", "weights"}:
            raise UsageError("give either NET or --model and --weights, not both")
        network, task, config = open_net(net_of(net))
        if task is None and "data" not in given:
            raise UsageError(f"{net} does not say what it was trained for; name it by --data")
        config = dataclasses.replace(config, **given)
        data = load_images(config, task)
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
@click.option(
    "--reduce-range",
    is_flag=True,
    help="int8 weights in 7 bits, for x86 CPUs without VNNI, where onnxruntime's sums of products "
    "of 8 bits overflow.",
)
@options("data", "data_root", "image_size", of_a_run=True)
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
    reduce_range: bool,
    out: Path | None,
    **settings: Any,
) -> None:
    """Write NET for a device, and compare what runs there with torch on real images.

    NET is a plain net, a checkpoint of a run or a run's folder (its net.safetensors); --data
    need not be given if it is the data that NET was trained for. BNs are folded. In float32
    every output must be torch's to 1e-4 of the outputs' magnitude; of int8, accuracies and
    times are shown instead.
    """
    if reduce_range and quantize is None:
        raise UsageError("--reduce-range is for weights in int8; give --quantize int8, too")
    if is_given("calibration_images") and quantize is None:
        raise UsageError("--calibration-images are for int8; give --quantize int8, too")
    given = given_settings(settings)
    network, task, config = open_net(net_of(net))
    if task is None and "data" not in given:
        raise UsageError(f"{net} does not say what it was trained for; name it by --data")
    data = load_images(dataclasses.replace(config, **given), task)
    if task is not None and data.image_shape != task.image_shape and "image_size" not in given:
        raise UsageError(
            f"the net was trained for images of {_size(task.image_shape)} pixels, but those of "
            f"{data.name} have {_size(data.image_shape)}; give --image-size {task.image_shape[1]}"
        )
    path = out or net_of(net).with_suffix({"onnx": ".onnx", "pt2": ".pt2", "c": ".h"}[form])
    done = deliver(
        network,
        form,
        path,
        data,
        int8=quantize is not None,
        reduce_range=reduce_range,
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


def _size(image_shape: tuple[int, int, int]) -> str:
    return f"{image_shape[1]}×{image_shape[2]}"


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
    file = net_of(file)
    net = deploy(Checkpoint.load(file)) if file.suffix == ".pt" else load(file)
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
    say_size(net, file)


def _memory(net: PlainNet, file: Path) -> pd.DataFrame:
    if net.input_shape is None:
        raise UsageError(f"{file} does not say how large its images are; convert it again")
    return activation_memory(net, torch.zeros(1, *net.input_shape))
