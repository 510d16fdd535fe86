"""Costs against counts by hand, accuracy against a plain loop, latency with known delays."""

import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rmprune.data import Dataset, Split
from rmprune.errors import UsageError
from rmprune.measure import (
    Report,
    WideSpreadWarning,
    count_macs,
    count_params,
    evaluate,
    latency,
    layer_macs,
    measure,
)
from rmprune.models import create_model

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
ignores_spread = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")


def plain_net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, (1, 3), groups=4, bias=False),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def random_split(images, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Split(
        torch.randint(256, (images, 3, 9, 11), dtype=torch.uint8, generator=generator),
        torch.randint(classes, (images,), generator=generator),
    )


@pytest.fixture
def scrambled():
    torch.manual_seed(1)
    net = plain_net()
    for values in (net[1].running_mean, net[1].weight.data, net[1].bias.data):
        values.normal_()
    return net


def test_params_of_resnet20_and_no_buffers():
    assert count_params(create_model("resnet20")) == 269_722
    assert count_params(nn.BatchNorm2d(7)) == 14


def test_shared_parameter_counts_once():
    layer = nn.Linear(3, 3, bias=False)
    assert count_params(nn.Sequential(layer, nn.ReLU(), layer)) == 9


def test_macs_of_resnet20_by_hand():
    conv = lambda size, n_in, n_out: size * size * 9 * n_in * n_out  # noqa: E731
    by_hand = (
        conv(32, 3, 16)
        + 6 * conv(32, 16, 16)
        + conv(16, 16, 32)
        + 5 * conv(16, 32, 32)
        + conv(8, 32, 64)
        + 5 * conv(8, 64, 64)
        + 64 * 10
    )
    assert by_hand == 40_551_040
    model = create_model("resnet20")
    assert count_macs(model, torch.randn(1, 3, 32, 32)) == by_hand
    assert count_macs(model, torch.randn(3, 3, 32, 32)) == by_hand


def test_macs_layer_by_layer():
    net = plain_net()
    macs = layer_macs(net, (3, 9, 11))
    assert list(macs) == [name for name, _ in net.named_children()]
    counted = {name: value for name, value in macs.items() if value}
    assert counted == {
        "0": 5 * 6 * 8 * 3 * 9,
        "3": 5 * 4 * 12 * 2 * 3,
        "7": 60,
    }
    assert sum(macs.values()) == count_macs(net, torch.randn(2, 3, 9, 11))


@pytest.mark.parametrize("images", [1, 7, 23, 50])
def test_evaluate_equals_a_loop_over_single_images(scrambled, images):
    split = random_split(23, 5)
    reference = copy.deepcopy(scrambled).eval()
    expected = 0
    for image, label in zip(split.images, split.labels, strict=True):
        x = (image.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(
            3, 1, 1
        )
        expected += int(reference(x[None].float()).argmax() == label)
    assert 0 < expected < 23
    found = evaluate(scrambled, split, mean=MEAN, std=STD, device="cpu", batch_size=images)
    assert found == (expected, 23)


def test_evaluate_reports_its_progress(scrambled):
    calls = []

    def track(iterable, length, label):
        items = list(iterable)
        calls.append((len(items), length, label))
        return iter(items)

    split = random_split(23, 5)
    evaluate(scrambled, split, mean=MEAN, std=STD, device="cpu", batch_size=10, track=track)
    assert calls == [(3, 3, "evaluate")]


def test_autocast_and_double():
    net = nn.Sequential(nn.Conv2d(3, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen = []
    net[0].register_forward_hook(lambda _m, _args, y: seen.append(y.dtype))
    options = {"mean": MEAN, "std": STD, "device": "cpu"}
    evaluate(net, random_split(4, 5), autocast=torch.bfloat16, **options)
    evaluate(net.double(), random_split(4, 5), dtype=torch.float64, **options)
    assert seen == [torch.bfloat16, torch.float64]


def test_labels_outside_the_outputs_are_an_error(scrambled):
    with pytest.raises(UsageError, match=r"has 5 outputs, but there is an image of class \d+"):
        evaluate(scrambled, random_split(40, 100), mean=MEAN, std=STD, device="cpu")


def test_no_images_are_an_error(scrambled):
    with pytest.raises(UsageError, match="no image"):
        evaluate(scrambled, random_split(0, 5), mean=MEAN, std=STD, device="cpu")


@ignores_spread
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "run",
    [
        lambda net, x: count_macs(net, x),
        lambda net, _: layer_macs(net, (3, 9, 11)),
        lambda net, _: evaluate(net, random_split(9, 5), mean=MEAN, std=STD, device="cpu"),
        lambda net, x: latency({"a": net, "b": net}, x, rounds=2, min_seconds=0),
    ],
    ids=["count_macs", "layer_macs", "evaluate", "latency"],
)
def test_modes_and_state_are_given_back(scrambled, run, fails):
    scrambled.train()
    scrambled[1].eval()  # a frozen BN inside a network in training
    before = copy.deepcopy(scrambled.state_dict())
    modes = [module.training for module in scrambled.modules()]

    def hook(module, _args):
        assert not module.training
        if fails:
            raise RuntimeError("stop")

    handle = scrambled[4].register_forward_pre_hook(hook)
    x = torch.randn(2, 3, 9, 11)
    if fails:
        with pytest.raises(RuntimeError, match="stop"):
            run(scrambled, x)
    else:
        run(scrambled, x)
    handle.remove()

    assert [module.training for module in scrambled.modules()] == modes
    torch.testing.assert_close(scrambled.state_dict(), before, rtol=0, atol=0)


class Sleep(nn.Module):
    """Waits, and writes its name and surroundings into a log."""

    def __init__(self, name, seconds, log):
        super().__init__()
        self.name, self.seconds, self.log = name, seconds, log

    def forward(self, x):
        self.log.append((self.name, torch.get_num_threads(), torch.is_inference_mode_enabled()))
        time.sleep(self.seconds)
        return x


@ignores_spread
def test_latency_of_known_delays():
    models = {"fast": Sleep("fast", 0.010, []), "slow": Sleep("slow", 0.030, [])}
    found = latency(models, torch.zeros(6, 3), rounds=5, min_seconds=0.03)
    assert list(found) == ["fast", "slow"]
    # Sleeping never takes less than asked for; on a busy machine it takes longer.
    assert found["fast"].median_ms >= 10
    assert found["slow"].median_ms >= 30
    assert 2 < found["slow"].median_ms / found["fast"].median_ms < 4
    assert found["fast"].batch_size == 6
    assert (found["fast"].device, found["fast"].dtype) == ("cpu", "float32")
    assert len(found["fast"].samples_ms) == 5


@ignores_spread
def test_latency_interleaves_rotates_and_sets_threads():
    log = []
    models = {name: Sleep(name, 0.001, log) for name in "abc"}
    before = torch.get_num_threads()
    latency(models, torch.zeros(1, 3), threads=2, rounds=3, min_seconds=0)
    assert torch.get_num_threads() == before
    assert {entry[1:] for entry in log} == {(2, True)}
    turns = [name for i, (name, *_) in enumerate(log) if i == 0 or log[i - 1][0] != name]
    # Calibration, a discarded round "cab" (its first c joins the one before), three rounds.
    assert "".join(turns) == "abc" + "ab" + "abc" + "bca" + "cab"


@pytest.fixture
def fake_times(monkeypatch):
    """Let Timer return given seconds: calibration, the discarded round, then the samples."""

    def use(seconds):
        times = iter(seconds)
        fake = SimpleNamespace(timeit=lambda _: SimpleNamespace(median=next(times)))
        monkeypatch.setattr("torch.utils.benchmark.Timer", lambda *_, **__: fake)

    return use


def test_median_and_quartiles_leave_out_the_first_round(fake_times):
    fake_times([9.0, 7.0, 0.100, 0.104, 0.101, 0.103, 0.102])
    found = latency({"net": nn.Identity()}, torch.zeros(1, 3), rounds=5)["net"]
    assert found.samples_ms == pytest.approx((100, 104, 101, 103, 102))
    assert found.median_ms == pytest.approx(102)
    assert found.iqr_ms == pytest.approx(2)


def test_wide_spread_warns_and_names_the_net(fake_times):
    fake_times([0.1, 0.1, 0.08, 0.10, 0.12])
    with pytest.warns(WideSpreadWarning, match=r"latency of net: .* 20% of the median"):
        latency({"net": nn.Identity()}, torch.zeros(1, 3), rounds=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 1}, "at least 2 rounds of latency, not 1"),
        ({"threads": 0}, "at least 1 thread, not 0"),
    ],
)
def test_senseless_options(options, message):
    with pytest.raises(UsageError, match=message):
        latency({"net": nn.Identity()}, torch.zeros(1, 3), **options)


def test_empty_example():
    with pytest.raises(UsageError, match=r"at least one image, not \(0, 3, 8, 8\)"):
        count_macs(nn.Conv2d(3, 3, 3), torch.zeros(0, 3, 8, 8))


@ignores_spread
def test_report_is_whole_and_json(scrambled):
    data = Dataset(
        name="random",
        train=random_split(3, 5, seed=1),
        test=random_split(23, 5),
        classes=tuple("abcde"),
        mean=MEAN,
        std=STD,
        augmentation=None,
    )
    x = torch.randn(2, 3, 9, 11)
    report = measure(scrambled, x, data, rounds=3, min_seconds=0)
    correct, images = evaluate(scrambled, data.test, mean=MEAN, std=STD, device="cpu")
    assert (report.correct, report.images, report.accuracy) == (correct, images, correct / 23)
    assert report.macs == count_macs(scrambled, x)
    assert report.params == count_params(scrambled)
    values = report.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["latency"]["samples_ms"] == list(report.latency.samples_ms)


def test_report_without_data_and_time(scrambled):
    report = measure(scrambled, torch.randn(2, 3, 9, 11), timed=False)
    assert report == Report(count_params(scrambled), count_macs(scrambled, torch.ones(1, 3, 9, 11)))
    assert report.to_dict()["latency"] is None
