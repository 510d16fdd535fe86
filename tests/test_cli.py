"""What a user types and sees: every command, every error in one line with its status."""

import dataclasses
import importlib.util
import json
import re
import shutil
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import rmprune
from rmprune import sweep as sweeps
from rmprune.checkpoints import Checkpoint
from rmprune.cli import main
from rmprune.models import create_model
from rmprune.store import load

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")


def call(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def succeed(*words):
    result = call(*words)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def fail(status, match, *words):
    result = call(*words)
    lines = result.stderr.splitlines()
    assert result.exit_code == status
    assert len(lines) == 1
    assert lines[0].startswith("rmprune: ")
    assert re.search(match, lines[0]), lines[0]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet20.pt"
    torch.manual_seed(0)
    torch.save(create_model("resnet20", num_classes=3).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A finished run of `rmprune slim`: its folder and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "slim"
    words = ["--epochs", 1, "--finetune-epochs", 1, "--batch-size", 16, "--lr", 0.05]
    result = call(
        "slim", "--data", f"folder:{image_folder}", *words, "--threshold", 0.9, "--out", out
    )
    assert result.exit_code == 0, result.stderr
    return out, result


def test_slim_prints_a_table_and_leaves_a_net(run):
    out, result = run
    for word in ("accuracy", "params", "MMACs", "latency ms", "speed-up", "plain, pruned"):
        assert word in result.stdout
    assert "penalty moves a scale by" in result.stderr  # far too short a training
    assert (out / "run.png").stat().st_size > 10_000
    report = pd.read_csv(out / "report.csv").set_index("model")
    net = load(out / "net.safetensors")
    assert report.loc["plain, pruned", "params"] == sum(p.numel() for p in net.parameters())
    assert net.info["classes"] == ["one", "two", "zero"]


def test_a_run_is_not_overwritten(run, image_folder):
    out, _ = run
    fail(2, "holds a run; --resume goes on", "slim", "--out", out)
    fail(2, "holds a run; --resume goes on", "train", "--out", out)
    words = ["--data", f"folder:{image_folder}", "--out", out, "--resume"]
    fail(2, "other settings: .*--threshold was 0.9", "slim", *words)


def test_the_stages_one_by_one(image_folder, tmp_path):
    data = ["--data", f"folder:{image_folder}"]
    out = tmp_path / "run"
    words = [*data, "--epochs", 1, "--batch-size", 16, "--lr", 0.05, "--out", out]
    assert "test accuracy" in succeed("train", "--sparsity", 0, *words)
    assert (out / "sparse.pt").exists()
    for threshold in ("0.9", "0.95"):
        text = succeed("prune", out, "--threshold", threshold)
        assert re.search(r"\d+ of 976 channels are switched off", text)
        assert (out / f"threshold-{threshold}" / "pruned.safetensors").exists()
    masked = out / "threshold-0.9"
    # --data need not be said again.
    words = ["--finetune-epochs", 1, "--batch-size", 16]
    assert "parameters" in succeed("finetune", masked, *words)
    fail(2, "holds a run; --resume goes on", "finetune", masked, *words)
    succeed("finetune", masked, *words, "--resume")
    fail(2, "--batch-size was 16", "finetune", masked, "--resume", "--batch-size", 8)
    finetuned = masked / "finetuned.pt"
    fail(2, "name another --out", "finetune", finetuned, *words, "--resume")
    further = tmp_path / "further"
    succeed("finetune", finetuned, "--finetune-epochs", 2, "--batch-size", 16, "--out", further)
    epochs = pd.read_csv(further / "metrics.csv")["epoch"]
    assert list(epochs) == [1, 2]
    net = masked / "net.safetensors"
    accuracy = succeed("eval", net)
    assert re.fullmatch(r"(evaluate\n)?\d+\.\d\d % \(\d+ of \d+ images of .*\)\n", accuracy)
    assert succeed("eval", masked / "finetuned.pt").splitlines()[-1] == accuracy.splitlines()[-1]
    succeed("finetune", "--plain", net, "--finetune-epochs", 1)
    assert Checkpoint.load(masked / "net-plain.pt").config.batch_size == 16
    assert (masked / "net-finetuned.safetensors").exists()
    assert "layer1_0_conv1" in succeed("inspect", masked / "net-finetuned.safetensors")


def test_targets_on_the_command_line(run, tmp_path):
    out, _ = run
    text = succeed("prune", out / "sparse.pt", "--target", "macs=0.5", "--lowering", "auto")
    found = re.search(r"macs: (0\.\d+) of the original resnet20's", text)
    assert 0.97 * 0.5 <= float(found[1]) <= 0.5
    net = out / "macs-0.5" / "pruned.safetensors"
    assert "linear" in succeed("inspect", net)
    assert "%" in succeed("eval", net)
    # Its blocks with additions train on, with the original as teacher where one is named.
    finetune = ("finetune", "--plain", net, "--finetune-epochs", 1)
    fail(2, "name the trained weights to learn from: --weights", *finetune, "--distill")
    torch.save(create_model("resnet20", num_classes=3).state_dict(), tmp_path / "original.pt")
    words = ("--distill", "--weights", tmp_path / "original.pt")
    fail(2, "with --plain --distill", "finetune", out / "macs-0.5", *words)
    fail(2, "with --plain --distill", *finetune, *words[1:])
    succeed(*finetune, *words)
    further = net.with_name("pruned-finetuned.safetensors")
    assert not load(further).is_plain
    assert Checkpoint.load(net.with_name("pruned-plain.pt")).config.distill


def test_sweeping_and_plotting(image_folder, tmp_path, monkeypatch):
    quick = partial(sweeps.time_all, rounds=2, min_seconds=0.001)
    monkeypatch.setattr("rmprune.cli.comparisons.sweeps.time_all", quick)
    out = tmp_path / "sweep"
    words = ["--data", f"folder:{image_folder}", "--epochs", 0, "--finetune-epochs", 0]
    words += ["--sparsity", 0.01, "--target", "macs=0.5", "--method", "torch-pruning:group-norm"]
    text = succeed("sweep", *words, "--out", out)
    assert "resnet20 torch-pruning:group-norm λ=0.01 macs=0.5 seed 0 (residual)" in text
    fail(2, "--resume goes on with it", "sweep", *words, "--out", out)
    for ending in ("png", "pdf"):
        text = succeed("plot", out, "--backend", "torch", "--format", ending)
        assert (out / f"figure7a.{ending}").exists()
        assert (out / f"figure7b.{ending}").exists()
    fail(2, "no latencies of torch at batch size 7; there are", "plot", out, "--backend", "torch",
         "--batch-size", 7)  # fmt: skip
    fail(2, "holds no sweep", "plot", tmp_path)
    steps = ["--method", "rm", "--target", "macs=0.5", "--prune-steps", 2, *words[:8], "--resume"]
    text = succeed("sweep", *steps, "--out", out)
    assert "resnet20 rm λ=0.01 macs=0.5 seed 0 (plain)" in text
    assert len(list(out.glob("trainings/*/macs-0.5/step-1/masked.pt"))) == 1


def test_bench(run, tmp_path):
    out, _ = run
    text = succeed("bench", out, "resnet20", "--rounds", 2, "--out", tmp_path / "bench.csv")
    assert re.search(r"torch [\d.]+.*, batch 1, threads 1", text)
    for word in ("latency ms", "speed-up", "1.00×", "arena", "measured", "file"):
        assert word in text
    rows = pd.read_csv(tmp_path / "bench.csv")
    assert list(rows["net"]) == [str(out), "resnet20"]
    notes = call("bench", out, "resnet20", "--rounds", 2).stderr
    assert re.search(r"differ in size: .* takes 3×16×16, resnet20 takes 3×32×32; models", notes)
    words = ["bench", out, "resnet20", "--image-shape", 3, 16, 16, "--rounds", 2]
    assert not call(*words).stderr.count("differ in size")
    fail(2, "unknown model 'nothing'", "bench", "nothing")
    fail(2, "computes with one thread", "bench", "resnet20", "--backend", "c", "--threads", 2)
    fail(2, "has no net.safetensors", "bench", tmp_path)


def test_resized_images_are_resized_again(image_folder, tmp_path):
    """A net remembers what size its images were brought to."""
    out = tmp_path / "run"
    size = ["--data", f"folder:{image_folder}", "--image-size", 12]
    succeed("slim", *size, "--epochs", 0, "--finetune-epochs", 0, "--batch-size", 16, "--out", out)
    shown = pd.read_csv(out / "report.csv")["accuracy"].iloc[-1]
    assert f"\n{100 * shown:.2f} %" in succeed("eval", out)
    assert succeed("eval", out) == succeed("eval", out, *size)
    assert json.loads(succeed("inspect", "--json", out))["info"]["image_size"] == 12


def test_inspect(run):
    out, _ = run
    text = succeed("inspect", out / "net.safetensors")
    for word in ("layer", "channels", "64 → ", "reserved", "params", "MMACs", "linear"):
        assert word in text
    value = json.loads(succeed("inspect", "--json", out / "net.safetensors"))
    assert value["info"]["model"] == "resnet20"
    assert "layer1_0_conv1" in {row["layer"] for row in value["layers"]}
    assert "layer1_0_conv1" in succeed("inspect", out / "finetuned.pt")
    memory = succeed("inspect", "--memory", out)
    assert re.search(r"peak [\d,]+ bytes in float32, at \w+; a static arena takes [\d,]+", memory)


@pytest.mark.skipif(not importlib.util.find_spec("onnxscript"), reason="no extra onnx")
def test_export(run, image_folder, tmp_path):
    """Every format, from a run's folder, whose data need not be named."""
    out, _ = run
    few = ["--images", 8]
    same = r"difference from torch on (\d+) test images: \d\.\de[+-]\d\d .*the same class on \1"
    for form in ("onnx", "pt2"):
        file = tmp_path / f"net.{form}"
        for batch in (1, 0):
            text = succeed("export", out, "--format", form, "--batch-size", batch, *few,
                           "--out", file)  # fmt: skip
            assert re.search(same, text)
        assert f"saved {file}" in text
    text = succeed("export", out, *few, "--quantize", "int8", "--calibration-images", 8,
                   "--embed-preprocessing", "--out", tmp_path / "int8.onnx")  # fmt: skip
    assert re.search(r"accuracy on \d+ test images: \d.* % in int8, .* % in float32", text)
    if shutil.which("gcc"):
        text = succeed("export", out, "--format", "c", *few, "--out", tmp_path / "net.h")
        assert re.search(same, text)
        assert re.search(r"constants [\d,]+ bytes, arena [\d,]+ bytes", text)
        assert (tmp_path / "net.c").exists()
    fail(1, "one image at a time", "export", out, "--format", "c", "--batch-size", 4)
    fail(1, "float32; export int8 to onnx", "export", out, "--format", "pt2", "--quantize", "int8")
    fail(2, "give --quantize int8, too", "export", out, "--reduce-range")
    fail(2, "give --quantize int8, too", "export", out, "--calibration-images", 8)
    fail(2, "trained for the classes", "export", out, "--data", "digits")
    fail(1, "ONNX files can be timed by `rmprune bench`", "export", tmp_path / "int8.onnx")
    for file in image_folder.glob("*/*/*"):
        smaller = tmp_path / "smaller" / file.relative_to(image_folder)
        smaller.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((8, 8)).save(smaller)
    other = [
        "export",
        out,
        *few,
        "--data",
        f"folder:{tmp_path / 'smaller'}",
        "--out",
        tmp_path / "o",
    ]
    fail(2, r"for images of 16×16 pixels, but .* 8×8; give --image-size 16", *other)
    assert re.search(same, succeed(*other, "--image-size", 16))


def test_convert(weights, tmp_path):
    net, picture = tmp_path / "net.safetensors", tmp_path / "net.png"
    options = ["resnet20", "--weights", weights, "--num-classes", 3]
    text = succeed("convert", *options, "--out", net, "--plot", picture)
    assert "plain" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    x = torch.randn(2, 3, 32, 32)
    model = rmprune.create_model("resnet20", num_classes=3, weights=weights).eval()
    torch.testing.assert_close(load(net)(x), model(x), rtol=0, atol=1e-4)
    succeed("convert", *options, "--keep-bn", "--downsample", "prelu", "--out", net)
    assert any(isinstance(layer, torch.nn.BatchNorm2d) for layer in load(net))


def test_convert_tells_how_channels_are_carried(tmp_path):
    net = tmp_path / "net.safetensors"
    name = "torchvision:mobilenet_v2"
    text = succeed("convert", name, "--carry", "partial", "--out", net)
    assert "features.3.conv.0.2 partial       24" in text
    assert load(net).info["carried"][0]["mode"] == "partial"


def test_eval_of_a_model(weights, image_folder):
    data = ["--data", f"folder:{image_folder}"]
    assert "images of folder:" in succeed("eval", "--weights", weights, *data)


def test_eval_refuses_to_guess(weights, image_folder, tmp_path):
    fail(2, "name what to evaluate", "eval")
    fail(2, "name what to evaluate", "eval", "--weights", weights)
    net = tmp_path / "net.safetensors"
    succeed("convert", "resnet20", "--weights", weights, "--num-classes", 3, "--out", net)
    fail(2, "does not say what it was trained for", "eval", net)
    fail(2, "3 outputs, but digits has 10 classes", "eval", net, "--data", "digits")
    assert "of 7 images" in succeed("eval", net, "--data", f"folder:{image_folder}")


def test_a_run_folder_stands_for_its_net(run, tmp_path):
    out, _ = run
    assert succeed("eval", out).endswith(succeed("eval", out / "net.safetensors"))
    assert "linear" in succeed("inspect", out)
    fail(2, "has no net.safetensors", "inspect", tmp_path)


def test_an_unfinished_training_is_named(image_folder, tmp_path):
    out = tmp_path / "run"
    data = ["--data", f"folder:{image_folder}", "--precision", "float32"]
    succeed("train", *data, "--epochs", 1, "--out", out)
    checkpoint = Checkpoint.load(out / "sparse.pt")
    config = dataclasses.replace(checkpoint.config, epochs=3)
    dataclasses.replace(checkpoint, config=config).save(out / "sparse.pt")
    assert "has trained 1 of 3 epochs" in call("prune", out).output
    fail(2, "has no masked.pt; give one of .*threshold-0.005", "finetune", out)


def test_a_folder_without_a_checkpoint_holds_no_run(image_folder, tmp_path):
    """A first write that failed must not stand in the way of the next try."""
    out = tmp_path / "run"
    data = ["--data", f"folder:{image_folder}", "--precision", "float32"]
    words = ["train", *data, "--epochs", 0, "--out", out]
    succeed(*words)
    (out / "sparse.pt").unlink()
    succeed(*words)
    assert "holds no run to resume" in call(*words[:-1], tmp_path / "typo", "--resume").output


def test_eval_of_other_data(run):
    out, _ = run
    fail(
        2,
        "trained for the classes one, two, zero, but digits has 0, 1, 2, …",
        "eval",
        out / "net.safetensors",
        "--data",
        "digits",
    )


def test_eval_of_two_networks(run, weights):
    out, _ = run
    fail(2, "not both", "eval", out / "net.safetensors", "--weights", weights)


WRONG_USE = {
    "unknown command": (["slimm"], "No such command 'slimm'"),
    "unknown option": (["slim", "--sparsty", "1"], "--sparsity"),
    "negative sparsity": (["slim", "--sparsity", "-1"], "--sparsity.*-1"),
    "sparsity that is no number": (["slim", "--sparsity", "much"], "'much' is not a valid float"),
    "negative threshold": (["slim", "--threshold", "-0.1"], "--threshold"),
    "no learning rate": (["slim", "--lr", "0"], "--lr"),
    "unknown model": (["slim", "--model", "resnet21"], "resnet21.*resnet20"),
    "unknown torchvision model": (["train", "--model", "torchvision:resnet19"], "resnet18"),
    "infinite sparsity": (["slim", "--sparsity", "inf"], "sparsity must be finite"),
    "infinite learning rate": (["slim", "--lr", "inf"], "lr must be finite"),
    "an image of nothing": (
        ["convert", "resnet20", "--image-shape", "3", "0", "32", "--out", "net"],
        "at least one channel and pixel",
    ),
    "an image of one channel": (
        ["convert", "resnet20", "--image-shape", "1", "32", "32", "--out", "net"],
        "fails on an input of shape",
    ),
    "unknown kind of picture": (
        ["convert", "resnet20", "--plot", "net.xyz", "--out", "net"],
        "must end in .png, .svg, .pdf",
    ),
    "unknown data": (["slim", "--data", "mnist"], "unknown data 'mnist'; known: digits"),
    "unknown target": (["slim", "--target", "flops=1"], "unknown target 'flops'; known: latency"),
    "two budgets": (["slim", "--target", "macs=0.5", "--threshold", "0.1"], "either --threshold"),
    "steps without a target": (["slim", "--prune-steps", "3"], "name one"),
    "a sweep to nowhere": (["sweep", "--sparsity", "1e-3"], "--threshold or --target"),
    "jobs on a cluster": (
        [*("sweep", "--sparsity", "1", "--target", "macs=0.5", "--jobs", "2", "--ray", "local")],
        "--jobs are for this machine",
    ),
    "CPUs of no cluster": (
        [*("sweep", "--sparsity", "1", "--target", "macs=0.5", "--job-cpus", "2")],
        "--job-cpus is for a Ray cluster",
    ),
    "a model without weights": (
        [
            *("sweep", "--sparsity", "1e-3", "--threshold", "1", "--model", "resnet20"),
            *("--model", "resnet32", "--weights", str(README)),
        ],
        "2 models need 2 --weights, not 1",
    ),
    "unknown cost": (["slim", "--cost", "watts"], "'macs', 'params', 'latency', 'uniform'"),
    "unknown device": (["slim", "--device", "warp"], "device 'warp' cannot be used here"),
    "weights that are not there": (["slim", "--weights", "no.pt"], "'no.pt' does not exist"),
    "distilling without weights": (["slim", "--distill"], "--weights"),
    "net that is not there": (["inspect", "no.safetensors"], "does not exist"),
    "run that is not there": (["prune", "nothing"], "'nothing' does not exist"),
    "no file to write": (["convert", "resnet20"], "Missing option '--out'"),
    "no model": (["convert", "--out", "net"], "Missing argument 'MODEL'"),
}


@pytest.mark.parametrize("case", WRONG_USE)
def test_wrong_use_is_status_2_and_one_line(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, message = WRONG_USE[case]
    fail(2, message, *words)


def test_failures_are_status_1_and_one_line(image_folder, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fail(1, "there is no folder nowhere/train", "slim", "--data", "folder:nowhere")
    fail(1, "cannot load .*is not there|no such file", "prune", tmp_path)
    data = ["--data", f"folder:{image_folder}"]
    fail(1, "resnet18", "eval", "--model", "resnet18", "--weights", weights, *data)
    fail(1, "10", "eval", "--weights", weights, "--data", "digits")
    Path("text.pt").write_text("# a text")
    fail(1, "no file of torch.save", "convert", "resnet20", "--weights", "text.pt", "--out", "net")
    (tmp_path / "net.safetensors").write_bytes(b"\x80\x04K\x01.123456")
    fail(1, "pickle.*nothing in it was executed", "inspect", "net.safetensors")
    torch.save({"x": torch.zeros(1)}, "x.pt")
    fail(1, "not a checkpoint of an rmprune run", "inspect", "x.pt")
    words = ["train", *data, "--epochs", 3, "--lr", 1e30, "--precision", "float32"]
    fail(1, "no longer finite", *words, "--sparsity", 1, "--out", "nan")


def test_debug_shows_the_traceback(tmp_path):
    for words in (["--debug", "slim"], ["slim", "--debug"]):
        result = call(*words, "--data", f"folder:{tmp_path / 'nowhere'}")
        assert isinstance(result.exception, rmprune.RmpruneError)


def test_an_unexpected_error_is_one_line_too(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError("nobody thought of this\nin two lines")

    monkeypatch.setattr("rmprune.cli.nets.convert_model", broken)
    words = ["convert", "resnet20", "--num-classes", 3, "--out", "net.safetensors"]
    fail(1, r"^rmprune: ZeroDivisionError: nobody thought of this \(--debug", *words)
    assert isinstance(call("--debug", *words).exception, ZeroDivisionError)


def test_an_interrupted_command_says_whether_it_can_go_on(monkeypatch, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rmprune.cli.nets.convert_model", interrupted)
    result = call("convert", "resnet20", "--out", "net.safetensors")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "rmprune: interrupted; what was saved stays"
    monkeypatch.setattr("rmprune.cli.stages.runs.train", interrupted)
    result = call("train", "--out", tmp_path)
    assert result.stderr.endswith("what was saved stays, and --resume goes on\n")


def commands():
    return sorted(main.commands)


def test_the_commands_are_these():
    assert commands() == [
        *("bench", "convert", "eval", "export", "finetune", "inspect", "plot"),
        *("prune", "report", "slim", "sweep", "train"),
    ]


@pytest.mark.parametrize("name", commands())
def test_every_command_is_documented(name):
    text = succeed(name, "--help")
    assert len(text.splitlines()) > 5
    assert f"rmprune {name}" in README.read_text()
    for option in main.commands[name].params:
        if option.param_type_name == "option":
            assert option.help, f"{name} --{option.name} has no help"


def test_help_teaches():
    text = succeed("--help")
    for name in commands():
        assert name in text
    assert "rmprune slim --sparsity" in text


def test_version():
    assert rmprune.__version__ in succeed("--version")
