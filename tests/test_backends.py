"""Where nets run: equal outputs on every backend, and clear words where one is missing."""

import copy

import pytest
import torch
from strategies import scramble
from torch import nn

from rmprune import backends, extras
from rmprune.backends import BACKENDS, Platform, deploy, graph_of, installed, time_deployed
from rmprune.errors import UsageError
from rmprune.models import create_model

every_backend = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in installed(), reason="not here"))
        for name in BACKENDS
    ],
)


@pytest.fixture
def model():
    return scramble(create_model("resnet20")).eval()


@every_backend
def test_a_deployed_net_computes_the_same(model, backend):
    x = torch.randn(3, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = deploy(model, x, Platform(backend, batch_size=3))
    expected = model(x)
    torch.testing.assert_close(
        network(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


@every_backend
def test_what_is_deployed_stays_so(model, backend):
    x, platform = torch.randn(1, 3, 8, 8), Platform(backend)
    once = deploy(model, x, platform)
    again = deploy(once, x, platform)
    assert (again is once) == (backend != "torch")
    torch.testing.assert_close(again(x), once(x))


@every_backend
def test_timing(model, backend):
    models = {"a": model, "b": nn.Sequential(nn.Conv2d(3, 4, 1))}
    platform = Platform(backend, batch_size=4)
    found = time_deployed(
        models, torch.randn(2, 3, 32, 32), platform, rounds=2, min_seconds=0.001, warn=False
    )
    assert found["a"].median_ms > found["b"].median_ms > 0
    assert found["a"].batch_size == 4
    assert found["a"].backend == backend
    assert platform.versions.startswith(f"{backend} ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "tflite"}, "unknown backend 'tflite'; known: torch, onnxruntime"),
        ({"backend": "c", "threads": 2}, "the backend c computes with one thread"),
        ({"threads": 0}, "threads must be at least 1, but it is 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_unusable_platforms(settings, message):
    with pytest.raises(UsageError, match=message):
        Platform(**settings)


@pytest.mark.parametrize(("backend", "extra"), [("onnxruntime", "onnx"), ("openvino", "openvino")])
def test_a_missing_extra_is_named(monkeypatch, backend, extra):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _: None)
    assert installed() == ("torch",)
    with pytest.raises(UsageError, match=rf"needs {backend}; .*pip install 'rmprune\[{extra}\]'"):
        _ = Platform(backend).versions
    with pytest.raises(UsageError, match=rf"needs {backend}; .*pip install 'rmprune\[{extra}\]'"):
        deploy(nn.Conv2d(3, 4, 1), torch.randn(1, 3, 8, 8), Platform(backend))


@pytest.mark.skipif("onnxruntime" not in installed(), reason="not here")
def test_the_graph_does_not_depend_on_the_layout_of_weights(model):
    x = torch.randn(1, 3, 16, 16)
    kinds = [
        [node.op_type for node in graph_of(net, x).proto.graph.node]
        for net in (model, copy.deepcopy(model).to(memory_format=torch.channels_last))
    ]
    assert kinds[0] == kinds[1]
    assert "Gather" not in kinds[0]
