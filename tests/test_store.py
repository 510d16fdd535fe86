"""Saved nets bit for bit; every way in which a file can be wrong; writes that fail half-way."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rmprune import store
from rmprune.errors import StoreError
from rmprune.layers import ChannelGate, ChannelSelection, PartialActivation, PartialGroupNorm
from rmprune.plain import PlainNet, Width

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def every_layer():
    """A net with each type of the table, and arguments that are not the defaults."""
    layers = OrderedDict(
        conv=nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2, bias=False),
        bn=nn.BatchNorm2d(6, eps=1e-3, momentum=None),
        relu=nn.ReLU(inplace=True),
        same=nn.Conv2d(6, 6, 3, padding="same", dilation=2),
        statless=nn.BatchNorm2d(6, affine=False, track_running_stats=False),
        relu6=nn.ReLU6(),
        leaky=nn.LeakyReLU(0.3),
        prelu=nn.PReLU(6, init=0.1),
        mish=nn.Mish(),
        tanh=nn.Tanh(),
        hardtanh=nn.Hardtanh(-0.5, 2.0),
        elu=nn.ELU(0.7),
        softplus=nn.Softplus(2.0, 10.0),
        gate=ChannelGate((6, 3, 6), ("relu", "sigmoid")),
        partial=PartialActivation("relu6", 6),
        group_norm=PartialGroupNorm(6, 2, [5, 0, 3, 4], eps=1e-3),
        selection=ChannelSelection(6, [4, 0, 1, 5, 2, 3], scale=True, bias=True),
        hardswish=nn.Hardswish(),
        hardsigmoid=nn.Hardsigmoid(),
        sigmoid=nn.Sigmoid(),
        silu=nn.SiLU(),
        gelu=nn.GELU(approximate="tanh"),
        maxpool=nn.MaxPool2d(2, stride=1, padding=1, ceil_mode=True),
        avgpool=nn.AvgPool2d((2, 3), count_include_pad=False, divisor_override=5),
        adaptive_max=nn.AdaptiveMaxPool2d((5, None)),
        adaptive_avg=nn.AdaptiveAvgPool2d(2),
        dropout=nn.Dropout(0.7),
        flatten=nn.Flatten(1, -1),
        identity=nn.Identity(),
        linear=nn.Linear(24, 3),
    )
    return PlainNet(
        layers,
        (4, 14, 11),
        {"conv": Width(4, 4), "same": Width(6)},
        {"conv": Width(4, 2), "same": Width(6)},
        {"classes": ["a", "é\n"], "mean": [0.1, 1e-300], "nested": {"x": None}},
    )


def scramble(net):
    """Values that a careless copy would lose: NaN, -0.0, infinity, the smallest numbers."""
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
                odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-38], dtype=tensor.dtype)
                tensor.view(-1)[: min(4, tensor.numel())] = odd[: tensor.numel()]
            else:
                tensor.fill_(2**40 + 1)
    return net


def bits(net):
    return {
        name: (str(t.dtype), tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in net.state_dict().items()
    }


def small():
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)))


def saved(folder, net=None):
    path = folder / "net.safetensors"
    store.save(net or small(), path)
    return path


def refuse(path, load=store.load):
    """The message of the error, which must be one line that names the file."""
    with pytest.raises(StoreError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"cannot load {path}: ")
    return message


def rewrite(path, change, tensors=None):
    """Save again with the description changed; `change` gets it as a JSON value."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    description = json.loads(header["__metadata__"]["rmprune"])
    description = change(description) or description
    tensors = safetensors.torch.load(data) if tensors is None else tensors
    safetensors.torch.save_file(tensors, path, {"rmprune": json.dumps(description)})


class Bomb:
    """Unpickled, it makes a file: the proof that code was run."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


# Saved nets


def test_the_example_holds_every_layer_type():
    assert {type(layer).__name__ for layer in every_layer()} == set(store.LAYERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_is_bit_for_bit(dtype, tmp_path):
    net = scramble(every_layer().to(dtype))
    before = bits(net)

    loaded = store.load(saved(tmp_path, net))

    assert bits(loaded) == before == bits(net)
    assert type(loaded) is PlainNet
    assert str(loaded) == str(net)  # the layers' arguments
    assert [layer.__dict__.keys() for layer in loaded] == [layer.__dict__.keys() for layer in net]
    for attribute in ("input_shape", "converted_widths", "widths", "info"):
        assert getattr(loaded, attribute) == getattr(net, attribute)
    assert not any(module.training for module in loaded.modules())
    assert all(p.requires_grad and p.is_leaf for p in loaded.parameters())
    assert not any(b.requires_grad for b in loaded.buffers())


def test_loaded_net_computes_the_same_and_can_be_trained(tmp_path):
    net = every_layer().double().eval()
    for layer in (net.bn, net.prelu):
        nn.init.uniform_(layer.weight)
    loaded = store.load(saved(tmp_path, net))
    x = torch.randn(2, 4, 14, 11, dtype=torch.float64)

    torch.testing.assert_close(loaded(x), net(x), rtol=0, atol=0)
    loaded.train()(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_new_process_needs_no_model_class(tmp_path):
    """`rmprune.store` and what it imports itself: the package's `__init__` is not run."""
    net = scramble(every_layer().double())
    path = saved(tmp_path, net)
    code = (
        "import importlib.util, json, sys, torch\n"
        "spec = importlib.util.find_spec('rmprune')\n"
        "sys.modules['rmprune'] = importlib.util.module_from_spec(spec)\n"
        "from rmprune import store\n"
        "net = store.load(sys.argv[1])\n"
        "found = {name for name in sys.modules if name.startswith('rmprune.')}\n"
        "assert found == {'rmprune.' + m for m in ('store', 'plain', 'errors', 'layers')}, found\n"
        "print(json.dumps({name: [str(t.dtype), list(t.shape), "
        "t.reshape(-1).view(torch.uint8).tolist()] for name, t in net.state_dict().items()}))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: (d, tuple(s), v) for name, (d, s, v) in json.loads(done.stdout).items()}
    assert found == bits(net)


def test_a_plain_sequential_saves_too(tmp_path):
    loaded = store.load(saved(tmp_path, nn.Sequential(nn.Linear(3, 2), nn.ReLU())))
    assert str(loaded) == str(PlainNet(OrderedDict({"0": nn.Linear(3, 2), "1": nn.ReLU()})))
    assert loaded.input_shape is None
    assert loaded.widths == loaded.converted_widths == loaded.info == {}


def test_channels_last_and_shared_tensors(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU())
    net = net.to(memory_format=torch.channels_last)
    net[1].weight = net[0].weight
    net.append(net[2]).append(net[0])  # a layer that stands in the net twice
    assert not net[0].weight.is_contiguous()

    loaded = store.load(saved(tmp_path, net))

    assert bits(loaded) == bits(net)
    assert len(loaded) == 5
    assert not net[0].weight.is_contiguous()


def test_layers_may_have_different_dtypes(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3).half(), nn.BatchNorm2d(4))
    assert bits(store.load(saved(tmp_path, net))) == bits(net)


def test_loading_leaves_the_random_state_and_the_file_alone(tmp_path):
    path = saved(tmp_path, every_layer())
    before, state = path.read_bytes(), torch.get_rng_state()
    net = store.load(path)
    with torch.no_grad():
        net.conv.weight.fill_(7)
    assert torch.equal(torch.get_rng_state(), state)
    assert path.read_bytes() == before


@pytest.mark.parametrize("length", range(0x80, 0x80 + 512, 8))
def test_header_lengths_that_look_like_a_pickle(length, tmp_path):
    """A pickle begins with 0x80, and so does a header of 128, 384, … bytes."""
    net = small()
    path = saved(tmp_path, PlainNet(OrderedDict(net.named_children()), info={"x": "x" * length}))
    assert store.load(path).info == {"x": "x" * length}
    cut = path.read_bytes()[:-1]
    path.write_bytes(cut)
    assert "cut off or damaged" in refuse(path)


def conv_with_padding_mode():
    return nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")


def widened_by_hand():
    layer = nn.Conv2d(3, 4, 3)
    layer.weight = nn.Parameter(torch.zeros(5, 3, 3, 3))
    return layer


class MyReLU(nn.ReLU):
    pass


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


UNSAVABLE = {
    "unsupported": (nn.Softmax(1), "layer 'odd' is a torch.nn.modules.activation.Softmax, and on"),
    "subclass": (MyReLU(), "MyReLU, and only these can be saved: Conv2d, BatchNorm2d"),
    "not a leaf": (nn.Sequential(nn.ReLU()), "layer 'odd' (Sequential) holds other layers"),
    "padding mode": (conv_with_padding_mode(), "layer 'odd' (Conv2d) has padding_mode='reflect'"),
    "inconsistent": (widened_by_hand(), "'odd.weight' has shape (5, 3, 3, 3), its layer's argum"),
    "no values": (nn.Linear(2, 2, device="meta"), "tensor 'odd.weight' is on the meta device"),
    "bad argument": (nn.LeakyReLU(float("nan")), "layer 'odd' (LeakyReLU) cannot have negative_sl"),
    "no layer": (None, "layer 'odd' is a builtins.NoneType"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_saved_is_named(case, tmp_path):
    layer, words = UNSAVABLE[case]
    path = saved(tmp_path)
    before = path.read_bytes()
    with pytest.raises(StoreError) as caught:
        store.save(nn.Sequential(OrderedDict(odd=layer)), path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"cannot save {path}: ")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Residual(nn.ReLU()), "a Residual is not a list of layers"),
        (nn.ReLU(), "a ReLU is not a list of layers"),
        (nn.Sequential(OrderedDict(info=nn.ReLU())), "'info' cannot be the name of a layer"),
        (PlainNet(OrderedDict(), info={"x": {1}}), "not everything in it is a JSON value"),
        (PlainNet(OrderedDict(), info={"x": float("nan")}), "not everything in it is a JSON"),
        (PlainNet(OrderedDict(), info={"x": [{1: 2}]}), "info has a key that is not a string"),
        (PlainNet(OrderedDict(), input_shape=(3, 32)), "its input_shape is [3, 32], not channels"),
    ],
)
def test_a_net_that_cannot_be_saved(net, words, tmp_path):
    with pytest.raises(StoreError) as caught:
        store.save(net, tmp_path / "net.safetensors")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


# Files that are not nets


def test_missing_file_and_folder(tmp_path):
    assert "there is no such file; check the path" in refuse(tmp_path / "none.safetensors")
    assert "it is a folder; give the path of a file" in refuse(tmp_path)
    assert "it cannot be read: Not a directory" in refuse(saved(tmp_path) / "below")
    assert "not a regular file" in refuse(Path("/dev/zero"))


@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_a_pickle_is_not_executed(kind, tmp_path):
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        torch.save(Bomb(marker), path, _use_new_zipfile_serialization=kind == "torch")

    message = refuse(path)

    assert "it is a pickle or a checkpoint of torch.save" in message
    assert "nothing in it was executed; give the .safetensors file of a net" in message
    assert not marker.exists()
    refuse(path, store.load_checkpoint)
    assert not marker.exists()
    if kind == "pickle":  # the bomb is a real one
        pickle.loads(path.read_bytes())  # noqa: S301
        assert marker.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_truncated_net(fraction, tmp_path):
    path = saved(tmp_path, every_layer())
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    assert "cut off" in refuse(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_damage_gives_an_error_or_a_net(data, tmp_path_factory):
    path = saved(tmp_path_factory.mktemp("damage"))
    content = bytearray(path.read_bytes())
    length = data.draw(st.integers(0, len(content)))
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content[:length])
    try:
        net = store.load(path)
    except StoreError:
        refuse(path)
    else:  # the weights themselves have no checksum
        assert length == len(content)
        assert len(net) == 2


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_random_bytes(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "net.safetensors"
    path.write_bytes(content)
    refuse(path)
    refuse(path, store.load_checkpoint)


def test_other_kinds_of_files(tmp_path):
    text = tmp_path / "readme.safetensors"
    text.write_text("a text that is no net at all")
    assert "it is not a safetensors file, or is cut off" in refuse(text)
    foreign = tmp_path / "foreign.safetensors"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"x": torch.ones(2)}, foreign, metadata)
        assert "a safetensors file without rmprune's list of layers" in refuse(foreign)


def layer_entry(kind, **arguments):
    return {"name": "x", "type": kind, "arguments": arguments}


def replaced(**fields):
    return lambda description: description.update(fields)


def with_argument(key, value):
    return lambda description: description["layers"][0]["arguments"].update({key: value})


CONV = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "bias": True}
HUGE = layer_entry("Conv2d", in_channels=10**9, out_channels=10**9, **CONV)
TOO_HUGE = layer_entry("Linear", in_features=2**62, out_features=2**62, bias=False)
WRONG = {
    "newer": (
        replaced(format=9, rmprune="7.0"),
        "format 9, written by rmprune '7.0', and this rmp",
    ),
    "no version": (replaced(format=None), "no format version"),
    "true version": (replaced(format=True), "no format version"),
    "not an object": (lambda _: [1], "no format version"),
    "no layers": (replaced(layers=None), "its list of layers or its info is missing"),
    "no info": (replaced(info=None), "its list of layers or its info is missing"),
    "shape": (replaced(input_shape=[3, True, 4]), "its input_shape is [3, True, 4]"),
    "widths": (replaced(widths={"conv": {"own": -1, "reserved": 0}}), "its widths are not numbers"),
    "entry": (replaced(layers=["conv"]), "an entry in its list of layers is not a name"),
    "unknown type": (replaced(layers=[layer_entry("os.system")]), "layer 'x' has the unknown type"),
    "no type": (
        replaced(layers=[layer_entry(["ReLU"])]),
        "layer 'x' has the unknown type ['ReLU']",
    ),
    "twice": (lambda d: d["layers"].append(d["layers"][0]), "two layers have the name 'conv'"),
    "bad name": (lambda d: d["layers"][0].update(name="forward"), "'forward' cannot be the name"),
    "dotted": (lambda d: d["layers"][0].update(name="a.b"), "'a.b' cannot be the name"),
    "arguments": (lambda d: d["layers"][0].update(arguments=3), "layer 'conv' (Conv2d) has no arg"),
    "unknown": (
        with_argument("device", "cuda"),
        "layer 'conv' (Conv2d) has an unknown argument 'd",
    ),
    "missing": (
        lambda d: d["layers"][0]["arguments"].pop("bias") and None,
        "layer 'conv' (Conv2d) lacks the argument 'bias'",
    ),
    "text": (
        with_argument("in_channels", "3"),
        "layer 'conv' (Conv2d) cannot have in_channels='3'",
    ),
    "boolean": (with_argument("stride", True), "cannot have stride=True"),
    "float": (with_argument("stride", 1.0), "cannot have stride=1.0"),
    "zero": (with_argument("groups", 0), "cannot have groups=0"),
    "negative": (with_argument("padding", -1), "cannot have padding=-1"),
    "triple": (with_argument("padding", [1, 1, 1]), "cannot have padding=[1, 1, 1]"),
    "word": (with_argument("padding", "reflect"), "cannot have padding='reflect'"),
    "very large": (with_argument("stride", 10**30), "cannot have stride=1000"),
    "indivisible": (
        with_argument("groups", 2),
        "layer 'conv' (Conv2d) cannot be made: in_channels",
    ),
    "does not fit": (
        with_argument("out_channels", 5),
        "'conv.weight' has shape (4, 3, 3, 3), its la",
    ),
    "no tensor": (lambda d: d["layers"].append(HUGE), "do not fit: tensor 'x.bias' is missing"),
    "too many": (lambda d: d["layers"].pop() and None, "'bn.bias' belongs to none of the layers"),
    "overflow": (lambda d: d["layers"].append(TOO_HUGE), "layer 'x' (Linear) cannot be made"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_description(case, tmp_path):
    change, words = WRONG[case]
    path = saved(tmp_path)
    rewrite(path, change)
    assert words in refuse(path)


def test_description_that_is_no_json(tmp_path):
    path = tmp_path / "net.safetensors"
    for text in ("{", "[" * 100_000, '{"format": ' + "1" * 5000 + "}"):
        safetensors.torch.save_file({}, path, {"rmprune": text})
        assert "damaged or not JSON" in refuse(path)


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("conv.weight", torch.int32, "'conv.weight' is torch.int32, its layer needs floating poi"),
        ("bn.num_batches_tracked", torch.float32, "is torch.float32, its layer needs torch.int64"),
    ],
)
def test_tensors_of_another_dtype(name, dtype, words, tmp_path):
    path = saved(tmp_path)
    tensors = small().state_dict()
    tensors[name] = tensors[name].to(dtype)
    rewrite(path, lambda _: None, tensors)
    assert words in refuse(path)


def test_a_huge_layer_takes_no_memory(tmp_path):
    """A file of 1 kB that claims 4e18 bytes of weights, under a limit of memory."""
    path = saved(tmp_path)
    rewrite(path, lambda d: d["layers"].append(HUGE))
    code = (
        "import resource, sys\n"
        "from rmprune import store\n"
        "used = 4096 * int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try:\n    store.load(sys.argv[1])\n"
        "except store.StoreError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert "tensor 'x.bias' is missing" in done.stdout, done.stderr


# Checkpoints


def test_checkpoint_round_trip(tmp_path):
    net = every_layer()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net.eval()(torch.randn(2, 4, 14, 11)).sum().backward()
    optimizer.step()
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "milestones": Counter([1, 1, 2]),
        "rows": [{"loss": 0.1, 3: None}, (True, "é", b"\x00\xff", {1, 2}, 2j)],
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "ordered": OrderedDict(b=1, a=2),
    }
    path = tmp_path / "deep" / "run" / "latest.pt"

    store.save_checkpoint(state, path)
    loaded = store.load_checkpoint(path)

    torch.testing.assert_close(
        {**loaded["model"]}, {**state["model"]}, rtol=0, atol=0, equal_nan=True
    )
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, state["optimizer"]["state"][0]["momentum_buffer"])
    assert torch.equal(loaded["rng"], state["rng"])
    for key in ("milestones", "rows", "size", "dtype", "device", "ordered"):
        assert loaded[key] == state[key]
        assert type(loaded[key]) is type(state[key])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.ones(2), "state['a'][0] is a numpy.ndarray, which could not be loaded again"),
        (np.float64(1), "state['a'][0] is a numpy.float64"),
        (Path("x"), "state['a'][0] is a pathlib.PosixPath"),
        (print, "state['a'][0] is a builtins.builtin_function_or_method"),
        ({Width(1): 1}, "a key of state['a'][0] is a rmprune.plain.Width"),
    ],
)
def test_a_checkpoint_that_could_not_be_loaded_is_not_written(value, words, tmp_path):
    with pytest.raises(StoreError) as caught:
        store.save_checkpoint({"a": [value]}, tmp_path / "a.pt")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_checkpoint_with_code_is_not_executed(tmp_path):
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    torch.save({"model": Bomb(marker)}, path)
    message = refuse(path, store.load_checkpoint)
    assert "holds Python objects, which could run code; nothing in it was executed" in message
    path.write_bytes(pickle.dumps({"model": Bomb(marker)}))
    message = refuse(path, store.load_checkpoint)
    assert "it is a bare pickle, which could run code; nothing in it was executed" in message
    assert not marker.exists()


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint(fraction, tmp_path):
    path = tmp_path / "a.pt"
    store.save_checkpoint({"x": torch.randn(1000)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    message = refuse(path, store.load_checkpoint)
    assert "is cut off or is damaged" in message or "it is not a checkpoint" in message


def test_damaged_tensors_of_a_checkpoint(tmp_path):
    path = tmp_path / "a.pt"
    store.save_checkpoint({"x": torch.full((1000,), 1.5)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((9,), 1.5).numpy().tobytes()) + 400] ^= 1
    path.write_bytes(data)
    assert "damaged (wrong checksum of 'archive/data/0')" in refuse(path, store.load_checkpoint)


def test_other_files_are_no_checkpoints(tmp_path):
    assert "it is not a checkpoint" in refuse(saved(tmp_path), store.load_checkpoint)
    assert "it is a folder" in refuse(tmp_path, store.load_checkpoint)
    assert "there is no such file" in refuse(tmp_path / "none", store.load_checkpoint)
    path = tmp_path / "list.pt"
    torch.save([1, 2], path)
    assert "it holds a list, not a checkpoint" in refuse(path, store.load_checkpoint)


# JSON, CSV, and writing as such


def test_json_round_trip(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": {"é": "\n"}}
    path = tmp_path / "new" / "config.json"
    store.write_json(value, path)
    assert store.read_json(path) == value
    assert list(store.read_json(path)) == ["b", "a"]
    assert path.read_text().startswith('{\n  "b": [\n')
    assert path.read_text().endswith("}\n")


def test_json_errors(tmp_path):
    path = tmp_path / "a.json"
    for value in (float("nan"), Path("x"), {(1, 2): 3}):
        with pytest.raises(StoreError, match="not everything in it is a JSON value"):
            store.write_json(value, path)
    assert not path.exists()
    assert "there is no such file" in refuse(path, store.read_json)
    for content in (b"", b"{", b"\xff\xfe\xff", b"[" * 100_000):
        path.write_bytes(content)
        assert "it is cut off, damaged or not JSON" in refuse(path, store.read_json)


def test_csv_round_trip(tmp_path):
    frame = pd.DataFrame({"epoch": [1, 2], "note": ["a,b", 'é"\n'], "loss": [0.1, 1 / 3]})
    path = tmp_path / "metrics.csv"
    store.write_csv(frame, path)
    pd.testing.assert_frame_equal(pd.read_csv(path), frame)
    assert path.read_bytes().startswith(b"epoch,note,loss\n1,")


WRITERS = {
    "save": lambda path: store.save(nn.Sequential(nn.Linear(300, 300)), path),
    "save_checkpoint": lambda path: store.save_checkpoint({"x": torch.ones(90_000)}, path),
    "write_json": lambda path: store.write_json("x" * 300_000, path),
    "write_csv": lambda path: store.write_csv(pd.DataFrame({"x": range(90_000)}), path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("existed", [True, False])
def test_a_failed_sync_leaves_the_old_file(writer, existed, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    if existed:
        path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError) as caught:
        WRITERS[writer](path)
    kept = "the previous file is untouched" if existed else "nothing was written"
    assert str(caught.value) == (
        f"no space left to write {path} (No space left on device): {kept}; free some space, or "
        "raise the limit, and try again"
    )
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"] * existed


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_of_the_system_leaves_the_old_file(writer, tmp_path):
    """The real thing: the system refuses to write more than 100 kB to a file."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import resource, signal, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_store import WRITERS, StoreError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n    WRITERS[sys.argv[1]](sys.argv[2])\n"
        "except StoreError as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", code, writer, path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"no space left to write {path} (File too large): the previous")
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


@pytest.mark.parametrize("writer", WRITERS)
def test_writing_replaces_the_old_file_only_when_whole(writer, tmp_path, monkeypatch):
    """The new content is synced under another name first; an open old file stays as it was."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    synced = []

    def seen(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2

    monkeypatch.setattr(os, "fsync", seen)
    WRITERS[writer](path)
    assert synced == [path.stat().st_size]
    assert synced[0] > 100_000
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write_json(1, path)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_where_no_file_can_be(tmp_path):
    with pytest.raises(StoreError, match="it is not a regular file; give the path of a file"):
        store.write_json(1, tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(StoreError, match=r"cannot write .*: (Not a directory|File exists)"):
        store.write_json(1, path / "below")
    assert path.read_bytes() == b"old"


def test_links_and_permissions_are_those_of_a_common_file(tmp_path):
    path, link, common = tmp_path / "file", tmp_path / "link", tmp_path / "common"
    link.symlink_to(path)
    store.write_json(1, link)
    common.touch()
    assert link.is_symlink()
    assert store.read_json(path) == 1
    assert path.stat().st_mode == common.stat().st_mode
