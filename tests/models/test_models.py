"""Models by name: shapes, parameters, tracing, weights, and the wording of every error."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import fx

from rmprune.errors import UsageError, WeightsError
from rmprune.models import create_model, model_names
from rmprune.models.cifar_resnet import OptionAShortcut

# The folder of published weights, cifar10_resnet20.pt and so on; without it their tests skip.
WEIGHTS = Path(os.environ.get("RMPRUNE_WEIGHTS", "weights"))

# The thin ones: RMNet's counts with projections, less the 2,752 parameters of these. The wide
# ones: torchvision's counts, less 7,680 of the stem and 507,870 of the linear layer.
PARAMETERS = {
    "resnet20": 272_474 - 2_752,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_730_714 - 2_752,
    "resnet18": 11_689_512 - 7_680 - 507_870,
    "resnet34": 21_797_672 - 7_680 - 507_870,
}


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_every_name_has_its_published_number_of_parameters():
    # tests/models/test_pnnh.py has the plain ones.
    residual = [name for name in model_names() if not name.startswith(("pnnh_", "plain_"))]
    found = {name: count(create_model(name)) for name in residual}
    # The paper gives this one's MACs, which tests/test_convert.py checks.
    assert found.pop("mobilenetv2_rm") > 0
    assert found == PARAMETERS


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_outputs_strides_and_classes(name):
    model = create_model(name, num_classes=7).eval()
    sizes = []
    for stage in model.stages:
        model.get_submodule(stage).register_forward_hook(
            lambda _module, _args, y: sizes.append(tuple(y.shape[2:]))
        )
    assert model(torch.randn(2, 3, 21, 12)).shape == (2, 7)
    halved = [(21, 12), (11, 6), (6, 3), (3, 2)]
    assert sizes == halved[: len(sizes)]


def test_option_a_shortcut_equals_a_loop_over_its_definition():
    x = torch.randn(2, 8, 7, 10)
    y = OptionAShortcut(8, 16)(x)
    expected = torch.zeros(2, 16, 4, 5)
    for channel in range(8):
        for i in range(4):
            for j in range(5):
                expected[:, 4 + channel, i, j] = x[:, channel, 2 * i, 2 * j]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet34", "torchvision:resnet18"])
def test_models_trace(name):
    model = create_model(name).eval()
    traced = fx.symbolic_trace(model)
    x = torch.randn(2, 3, 36, 30)
    with torch.inference_mode():
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("layers", [20, 32, 44, 56])
def test_published_weights_load(layers):
    path = WEIGHTS / f"cifar10_resnet{layers}.pt"
    if not path.exists():
        pytest.skip("no published weights here; name their folder in RMPRUNE_WEIGHTS")
    model = create_model(f"resnet{layers}", weights=path)
    state, stored = model.state_dict(), torch.load(path, weights_only=True)
    assert {k for k in state if not k.endswith("num_batches_tracked")} == set(stored)
    for key, value in stored.items():
        assert torch.equal(state[key], value)


def test_convolutions_have_kaiming_scale():
    weight = create_model("resnet18").get_submodule("layer4.1.conv2").weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


def test_torchvision_names_pass_through():
    model = create_model("torchvision:mobilenet_v2", num_classes=3)
    assert model.classifier[1].out_features == 3


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("resnet2O", "resnet20"),
        ("resnet50", "did you mean torchvision:resnet50?"),
        ("torchvision:resnet51", "torchvision:resnet50"),
        ("torchvision:fcn_resnet50", "did you mean"),  # segmentation
        ("?", "choose one of resnet20, resnet32"),
    ],
)
def test_unknown_names(name, advice):
    with pytest.raises(UsageError) as error:
        create_model(name)
    assert str(error.value).startswith(f"unknown model {name!r}; ")
    assert advice in str(error.value)


def test_no_classes():
    with pytest.raises(UsageError, match="at least one class, not 0"):
        create_model("resnet20", num_classes=0)


@pytest.fixture
def state():
    return create_model("resnet20").state_dict()


def assert_loads(path, state):
    loaded = create_model("resnet20", weights=path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "best_prec1": 91.7},
        lambda s: {"model": OrderedDict(s), "epoch": 3},
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
        lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    ],
    ids=["bare", "state_dict", "model", "data_parallel", "untracked"],
)
def test_usual_wrappings_load(tmp_path, state, wrap):
    torch.save(wrap(state), tmp_path / "w.pth")
    assert_loads(tmp_path / "w.pth", state)


def test_safetensors_load(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    assert_loads(str(tmp_path / "w.safetensors"), state)


def weights_error(path, **options):
    with pytest.raises(WeightsError) as error:
        create_model("resnet20", weights=path, **options)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


def test_wrong_number_of_classes(tmp_path, state):
    torch.save(state, tmp_path / "w.pt")
    assert weights_error(tmp_path / "w.pt", num_classes=100) == (
        "FILE does not fit resnet20: linear.weight is (10, 64) in the file but (100, 64) in the"
        " model, linear.bias is (10,) in the file but (100,) in the model:"
        " is --num-classes right?"
    )


def test_missing_and_unexpected_keys(tmp_path, state):
    removed = [key for key in state if key.startswith("layer1.0.bn1") and "tracked" not in key]
    for key in removed:
        del state[key]
    state["head.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    assert weights_error(tmp_path / "w.pt") == (
        "FILE does not fit resnet20: layer1.0.bn1.weight, layer1.0.bn1.bias,"
        " layer1.0.bn1.running_mean and 1 more missing; head.weight unexpected:"
        " is it the right model?"
    )


def test_another_shape_than_the_number_of_classes(tmp_path, state):
    state["conv1.weight"] = torch.zeros(16, 1, 3, 3)
    torch.save(state, tmp_path / "w.pt")
    assert weights_error(tmp_path / "w.pt") == (
        "FILE does not fit resnet20: conv1.weight is (16, 1, 3, 3) in the file but (16, 3, 3, 3)"
        " in the model: is it the right model?"
    )


def test_missing_file_and_directory(tmp_path):
    assert weights_error(tmp_path / "w.pt").startswith("there is no file FILE")
    assert weights_error(tmp_path).startswith("FILE is a directory")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "text"])
def test_damaged_files(tmp_path, state, suffix, damage):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    damaged = {"empty": b"", "truncated": whole[: len(whole) // 2], "text": b"hello\n" * 50}
    path.write_bytes(damaged[damage])
    expected = "FILE is damaged" if suffix == ".pt" else "FILE is not a readable safetensors file"
    assert weights_error(path).startswith(expected)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, 2))])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, state, save):
    marker = tmp_path / "ran"
    save({**state, "extra": Touch(marker)}, tmp_path / "w.pt")
    assert "could run code" in weights_error(tmp_path / "w.pt")
    assert not marker.exists()


def test_a_whole_model_is_refused(tmp_path):
    torch.save(create_model("resnet20"), tmp_path / "w.pt")
    assert "save model.state_dict() instead" in weights_error(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "FILE holds no state dict"),
        ({}, "FILE holds no state dict"),
        ({"epoch": 3}, "FILE is no state dict: 'epoch' is of type int, not a tensor"),
    ],
)
def test_other_content(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    assert weights_error(tmp_path / "w.pt").startswith(message)


def test_models_of_timm():
    pytest.importorskip("timm")
    assert create_model("timm:resnet18", num_classes=7).fc.out_features == 7
    with pytest.raises(UsageError, match="did you mean timm:resnet1"):
        create_model("timm:resnet1800")


def test_timm_is_not_needed_until_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    create_model("resnet20")
    with pytest.raises(UsageError, match=r"pip install 'rmprune\[timm\]'"):
        create_model("timm:resnet18")
