"""Exported networks compute what torch does, and int8 what can be had in 8 bits."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from strategies import scramble
from test_c_source import run_in_c

from rmprune.c_source import c_source
from rmprune.convert import convert
from rmprune.equalization import equalize
from rmprune.errors import ExportError, StoreError, UsageError
from rmprune.export import RawImages, deliver, deployable, difference_of, export, fed_images
from rmprune.lowering import lower
from rmprune.models import create_model
from rmprune.onnx_graph import to_onnx
from rmprune.quantization import quantize
from rmprune.removal import prune
from rmprune.rewrite import collapse
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def lowered():
    """A pruned ResNet-20 with additions of every form."""
    slim = scramble(add_shortcut_bn(create_model("resnet20"))).eval()
    apply_masks(slim, select(slim, 0.7, lowering="auto"))
    plain = collapse(prune(convert(slim, X, keep_bn=False)))
    return lower(plain, X, lambda name, forms, _: forms[len(name) % len(forms)])


@pytest.mark.parametrize("form", ["onnx", "pt2", "c"])
def test_every_format_is_torchs(tmp_path, lowered, form):
    done = export(lowered, form, tmp_path / f"net.{form}", X[:1])
    assert done.run is not None
    with torch.no_grad():
        assert difference_of(lowered(X), done.run(X)) < 1e-5
    assert all(path.exists() for path in done.paths)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_any_number_of_images(tmp_path, lowered, form):
    done = export(lowered, form, tmp_path / "net", X[:2], dynamic_batch=True)
    for count in (1, 3):
        with torch.no_grad():
            assert difference_of(lowered(X[:count]), done.run(X[:count])) < 1e-5


@pytest.mark.parametrize("form", ["onnx", "pt2", "c"])
def test_raw_images(tmp_path, lowered, tiny, form):
    raw = RawImages(tiny.mean, tiny.std)
    images, normalised = fed_images(tiny.test, tiny, raw), fed_images(tiny.test, tiny, None)
    torch.testing.assert_close(raw(images), normalised, rtol=1e-5, atol=1e-6)
    done = export(lowered, form, tmp_path / "net.h", images[:1], raw=raw)
    with torch.no_grad():
        assert difference_of(lowered(normalised), done.run(images)) < 1e-5


def test_metadata_and_names(tmp_path, lowered):
    export(lowered, "onnx", tmp_path / "net.onnx", X[:1], info={"classes": ["a", "b"]})
    graph = onnx.load(tmp_path / "net.onnx")
    notes = {item.key: item.value for item in graph.metadata_props}
    assert json.loads(notes["classes"]) == ["a", "b"]
    assert notes["written by"].startswith("rmprune ")
    assert [value.name for value in graph.graph.input] == ["image"]
    assert [value.name for value in graph.graph.output] == ["logits"]
    assert not any(node.op_type == "BatchNormalization" for node in graph.graph.node)


def test_pt2_loads_without_rmprune(tmp_path, lowered):
    export(lowered, "pt2", tmp_path / "net.pt2", X[:1])
    script = (
        "import sys, torch; sys.modules['rmprune'] = None;"
        "net = torch.export.load(sys.argv[1]).module();"
        "print(net(torch.ones(1, 3, 16, 16)).shape[1])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "net.pt2"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.stdout.strip() == "10"


def test_int8_in_c_is_onnxruntimes(tmp_path, lowered):
    net = deployable(equalize(lowered, [X]))
    images = list(X.split(1))
    # Or onnxruntime's sums overflow on CPUs without VNNI.
    graph = quantize(to_onnx(net, X[:1]), images, reduce_range=True)
    found, written = run_in_c(graph, X, tmp_path)
    path = tmp_path / "net.onnx"
    done = export(lowered, "onnx", path, X[:1], calibration=images, reduce_range=True)
    expected = done.run(X)
    step = (expected.abs().max() / 127).item()
    assert (found - expected).abs().max() <= 3 * step
    with torch.no_grad():
        exact = lowered(X)
    assert (expected - exact).abs().max() <= 0.05 * exact.abs().max()
    # Additions, scalings and what they feed are int8 from the begin: no tensor is ever float32.
    arena = c_source(to_onnx(deployable(lowered), X[:1])).arena_bytes
    assert written.arena_bytes < 0.3 * arena
    size = (tmp_path / "net.onnx").stat().st_size
    export(lowered, "onnx", tmp_path / "net.onnx", X[:1])
    assert size < 0.65 * (tmp_path / "net.onnx").stat().st_size


def test_onnxruntime_computes_int8_convolutions_in_int8(tmp_path, lowered):
    """Beside tensors that a block and its shortcut read, too."""
    runtime = pytest.importorskip("onnxruntime")
    done = export(lowered, "onnx", tmp_path / "net.onnx", X[:1], calibration=list(X.split(1)))
    options = runtime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3  # of the file being for this hardware only
    runtime.InferenceSession(done.paths[0], options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    convolutions = [m for m in deployable(lowered).modules() if isinstance(m, torch.nn.Conv2d)]
    assert counts["QLinearConv"] == len(convolutions)
    assert "Conv" not in counts


def test_what_cannot_be_exported(tmp_path, lowered):
    with pytest.raises(ExportError, match="one image at a time"):
        export(lowered, "c", tmp_path / "net.h", X[:2])
    with pytest.raises(ExportError, match="pt2 is exported in float32"):
        export(lowered, "pt2", tmp_path / "net.pt2", X[:1], calibration=[X[:1]])
    with pytest.raises(UsageError, match="there are none"):
        export(lowered, "onnx", tmp_path / "net.onnx", X[:1], calibration=[])
    with pytest.raises(
        UsageError, match=r"are \(1, 3, 8, 8\), but the network takes \(1, 3, 16, 16\)"
    ):
        export(lowered, "onnx", tmp_path / "net.onnx", X[:1], calibration=[X[:1, :, :8, :8]])


def test_what_differs_is_not_delivered(tmp_path, lowered, tiny, monkeypatch):
    (tmp_path / "net.pt2").write_text("the one before")
    monkeypatch.setattr("rmprune.export.TOLERANCE", -1.0)
    with pytest.raises(ExportError, match="differs from torch by"):
        deliver(lowered, "pt2", tmp_path / "net.pt2", tiny)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "the one before"


def test_where_nothing_can_be_written(tmp_path, lowered, tiny):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match=r"cannot write .*net\.pt2: .*; name another place"):
        deliver(lowered, "pt2", tmp_path / "file" / "net.pt2", tiny)
