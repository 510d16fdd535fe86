"""Any network beside any other: what is opened, what is measured, what is refused."""

import pytest
import torch
from strategies import scramble

from rmprune.backends import Platform, installed
from rmprune.bench import MEASURED, bench, open_network
from rmprune.convert import convert
from rmprune.errors import StoreError, UsageError
from rmprune.export import RawImages, export
from rmprune.memory import resident_growth
from rmprune.models import create_model
from rmprune.removal import prune
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn
from rmprune.store import save

onnx = pytest.importorskip("onnx")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
pytestmark = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")
QUICK = {"rounds": 2, "min_seconds": 0.001}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A plain net, and ONNX files of it: for one image, for any number, and of raw images."""
    folder = tmp_path_factory.mktemp("nets")
    slim = scramble(add_shortcut_bn(create_model("resnet20"))).eval()
    apply_masks(slim, select(slim, 1.2))
    net = prune(convert(slim, X, keep_bn=False))
    save(net, folder / "net.safetensors")
    export(net, "onnx", folder / "one.onnx", X[:1])
    export(net, "onnx", folder / "any.onnx", X, dynamic_batch=True)
    raw = RawImages((0.5,) * 3, (0.2,) * 3)
    export(net, "onnx", folder / "raw.onnx", torch.zeros(1, 16, 16, 3, dtype=torch.uint8), raw=raw)
    return folder


@pytest.mark.parametrize("backend", [name for name in installed() if name != "torch"])
def test_nets_of_any_origin(files, backend):
    names = [
        str(files / f"{name}") for name in ("net.safetensors", "one.onnx", "any.onnx", "raw.onnx")
    ]
    networks = {name: open_network(name) for name in [*names, "resnet20"]}
    table = bench(networks, Platform(backend), **QUICK)
    assert list(table["net"]) == list(networks)
    assert table["speedup"].iloc[0] == 1
    assert (table["latency_ms"] > 0).all()
    assert set(MEASURED) <= set(table.columns)
    rows = table.set_index("net")
    # The same graph, whoever wrote it; pixels of a byte take a quarter of the room.
    arenas = rows.loc[names, "arena_bytes"].tolist()
    assert arenas[0] == arenas[1] == arenas[2]
    assert rows.loc["resnet20", "arena_bytes"] > arenas[0]  # of 32 × 32 pixels


def test_the_file_is_what_is_deployed(files):
    networks = {"net": open_network(str(files / "net.safetensors"))}
    sizes = {
        backend: bench(networks, Platform(backend), **QUICK)["file_bytes"].item()
        for backend in installed()
    }
    params = sum(p.numel() for p in networks["net"][0].parameters())
    assert all(4 * params <= size < 1.2 * 4 * params + 2**16 for size in sizes.values())
    if "onnxruntime" in sizes:
        assert sizes["onnxruntime"] == pytest.approx((files / "one.onnx").stat().st_size, rel=0.1)


def test_batches(files):
    networks = {"net": open_network(str(files / "any.onnx"))}
    for backend in (name for name in installed() if name != "torch"):
        table = bench(networks, Platform(backend, batch_size=3), **QUICK)
        assert table["images_per_second"].item() == pytest.approx(3000 / table["latency_ms"].item())
    with pytest.raises(UsageError, match="for batches of 1, not 3; export it with --batch-size 0"):
        bench({"net": open_network(str(files / "one.onnx"))}, Platform("onnxruntime", batch_size=3))


def test_graphs_that_do_not_know_their_size_are_told(files, tmp_path):
    graph = onnx.load(files / "any.onnx")
    for place, name in enumerate(("n", "c", "h", "w")):
        graph.graph.input[0].type.tensor_type.shape.dim[place].dim_param = name
    onnx.save(graph, tmp_path / "any.onnx")
    assert open_network(str(tmp_path / "any.onnx"), (3, 16, 16))[1].shape == (1, 3, 16, 16)
    with pytest.raises(StoreError, match="give --image-shape"):
        open_network(str(tmp_path / "any.onnx"))


@pytest.mark.parametrize("limits", [(0.5,), (0.5, 0.9)])
def test_graphs_of_others_have_other_constants(tmp_path, limits):
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = [f"limit{place}" for place in range(len(limits))]
    nodes = [
        make.make_node("Constant", [], [name], value_float=limit)
        for name, limit in zip(names, limits, strict=True)
    ]
    nodes.append(make.make_node("Clip", ["x", *names], ["y"]))
    ends = [make.make_tensor_value_info(name, kind, (1, 3, 8, 8)) for name in "xy"]
    graph = make.make_graph(nodes, "clip", ends[:1], ends[1:])
    opset = [make.make_opsetid("", 17)]
    onnx.save(make.make_model(graph, opset_imports=opset, ir_version=8), tmp_path / "clip.onnx")
    networks = {"clip": open_network(str(tmp_path / "clip.onnx"))}
    table = bench(networks, Platform("onnxruntime"), **QUICK)
    assert (table["latency_ms"] > 0).all()


def test_what_memory_grows_by():
    size = 64 * 2**20
    grown = resident_growth(lambda: torch.ones(size // 4))
    if grown is None:
        pytest.skip("the system does not tell")
    assert 0.95 * size <= grown < 1.1 * size
    assert resident_growth(lambda: None) < size / 10


def test_what_cannot_be_benched(files, tmp_path):
    with pytest.raises(UsageError, match=r"one.onnx is an ONNX graph, which torch does not run"):
        bench({"one.onnx": open_network(str(files / "one.onnx"))}, Platform())
    with pytest.raises(UsageError, match="name at least one network"):
        bench({}, Platform())
    with pytest.raises(UsageError, match="unknown model 'resnet21'"):
        open_network("resnet21")
    with pytest.raises(UsageError, match=r"there is no file .*gone\.safetensors"):
        open_network(str(tmp_path / "gone.safetensors"))
    with pytest.raises(UsageError, match=r"there is no file .*gone\.onnx"):
        open_network(str(tmp_path / "gone.onnx"))
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(StoreError, match=r"text\.onnx is not a readable ONNX file"):
        open_network(str(tmp_path / "text.onnx"))
