"""The loop: resumes bit for bit, stops at NaN, and does what its settings say."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rmprune.errors import TrainingError, UsageError
from rmprune.layers import ChannelGate
from rmprune.slimming import Penalty
from rmprune.training import (
    TrainingConfig,
    autocast_dtype,
    distillation_loss,
    fit,
    learning_rate,
    make_optimizer,
    memory_format,
    total_step_size,
)

CONFIG = TrainingConfig(epochs=4, lr=0.05, batch_size=16, precision="float32")


def small_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def test_resumes_bit_for_bit(tiny):
    whole, states = small_net(), []
    results = fit(whole, tiny, CONFIG, after_epoch=lambda _, s: states.append(copy.deepcopy(s)))
    assert [r.epoch for r in results] == [1, 2, 3, 4]
    for done in (1, 2, 3):
        torch.manual_seed(done)  # whatever the process did before
        resumed = small_net(seed=done)
        rest = fit(resumed, tiny, CONFIG, resume_from=states[done - 1])
        assert rest == results[done:]
        torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_learns(tiny):
    net = small_net()
    config = TrainingConfig(epochs=25, lr=0.1, batch_size=16, precision="float32")
    results = fit(net, tiny, config)
    assert results[-1].test_accuracy > 0.6
    assert results[-1].loss < results[0].loss / 2
    assert not net.training


def test_seeds_matter(tiny):
    nets = [small_net(), small_net(), small_net()]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        fit(net, tiny, TrainingConfig(1, batch_size=16, seed=seed, precision="float32"))
    assert torch.equal(nets[0][0].weight, nets[1][0].weight)
    assert not torch.equal(nets[0][0].weight, nets[2][0].weight)


def test_penalty_pulls(tiny):
    nets = [small_net(), small_net()]
    for net, sparsity in zip(nets, (0.0, 0.05), strict=True):
        penalty = Penalty({"bn": net[1].weight}, sparsity, {"bn": 1.0})
        fit(net, tiny, CONFIG, penalty=penalty)
    assert nets[1][1].weight.abs().sum() < nets[0][1].weight.abs().sum() - 0.1


@pytest.mark.parametrize("lr", [1e30, 1e10])
def test_stops_when_the_loss_is_not_finite(tiny, lr):
    config = TrainingConfig(20, lr=lr, batch_size=16, warmup=0, precision="float32")
    with pytest.raises(TrainingError, match=r"no longer finite.*smaller --lr.*precision float32"):
        fit(small_net(), tiny, config)


def test_learning_rate_rises_and_falls():
    config = TrainingConfig(1, lr=0.4, warmup=0.1)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.4 / 11)
    assert max(rates) == rates[10] == 0.4
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.2)
    assert rates[-1] < 0.001


def test_learning_rate_is_torchs_cosine_behind_the_warmup():
    config = TrainingConfig(1, lr=0.3, warmup=0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_total_step_size_is_what_a_constant_gradient_moves(tiny):
    # Momentum's tail lies beyond the end, hence not quite all of it.
    config = TrainingConfig(40, lr=0.01, batch_size=16)
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1, momentum=0.9, nesterov=True)
    for step in range(40 * 6):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, 40 * 6)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert -parameter.item() == pytest.approx(total_step_size(config, tiny), rel=0.05)


def test_biases_and_norms_do_not_decay():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PReLU(4), nn.Linear(4, 2))
    decayed, others = make_optimizer(net, CONFIG).param_groups
    assert {id(p) for p in decayed["params"]} == {id(net[0].weight), id(net[3].weight)}
    assert decayed["weight_decay"] == CONFIG.weight_decay
    assert len(others["params"]) == 5
    assert others["weight_decay"] == 0
    decayed, others = make_optimizer(
        ChannelGate((6, 3, 6), ("relu", "sigmoid")), CONFIG
    ).param_groups
    assert [p.ndim for p in decayed["params"]] == [2, 2]
    assert [p.ndim for p in others["params"]] == [1, 1]


def test_a_teachers_outputs_are_kept_by_the_images(tiny, tmp_path):
    other = replace(tiny, train=replace(tiny.train, images=255 - tiny.train.images))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    for data, folders in ((tiny, 1), (tiny, 1), (other, 2)):
        student = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        fit(student, data, TrainingConfig(1, batch_size=16), teacher=teacher, kept=tmp_path)
        assert len(list(tmp_path.iterdir())) == folders


def test_distillation_loss_is_zero_at_the_teacher_and_has_its_gradient():
    torch.manual_seed(0)
    targets = torch.randn(5, 7, dtype=torch.float64)
    assert distillation_loss(targets, targets, 4.0).abs() < 1e-12
    outputs = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    distillation_loss(outputs, targets, 3.0).backward()
    # Hinton et al. 2015, equation 2, times T².
    expected = 3.0 * (F.softmax(outputs / 3, 1) - F.softmax(targets / 3, 1)) / 5
    torch.testing.assert_close(outputs.grad, expected.detach())


def test_a_teacher_is_learned_from_and_left_alone(tiny):
    teacher, student = small_net(5), small_net(0)
    fit(teacher, tiny, CONFIG)
    before = copy.deepcopy(teacher.state_dict())
    config = TrainingConfig(
        30, lr=0.05, batch_size=16, distillation=1.0, temperature=1.0, precision="float32"
    )
    results = fit(student, tiny, config, teacher=teacher)
    assert results[-1].loss < results[0].loss / 3
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)


def test_what_a_teacher_said_is_kept_for_trainings_of_the_same_images(tiny, tmp_path):
    teacher = small_net(5)
    config = TrainingConfig(2, lr=0.05, batch_size=16, precision="float32", compile="off")
    asked = []

    def trained(config, teacher):
        student = small_net(0)
        fit(student, tiny, config, teacher=teacher, kept=tmp_path)
        return student.state_dict()

    class Counted(nn.Sequential):
        def forward(self, images):
            asked.append(len(images))
            return super().forward(images)

    counted = Counted(*teacher)
    first = trained(config, counted)
    calls = len(asked)
    assert calls == 2 * (len(tiny.train.labels) // 16)
    torch.testing.assert_close(trained(config, counted), first, rtol=0, atol=0)
    assert len(asked) == calls
    student = small_net(0)
    fit(student, tiny, config, teacher=teacher)
    torch.testing.assert_close(student.state_dict(), first, rtol=0, atol=0)
    for other in (replace(config, seed=1), replace(config, batch_size=8)):
        before = len(asked)
        trained(other, counted)
        assert len(asked) > before
    before = len(asked)
    with torch.no_grad():
        counted[0].weight.add_(1)
    trained(config, counted)
    assert len(asked) == before + calls


def test_precision(monkeypatch):
    cpu = torch.device("cpu")
    assert autocast_dtype("float32", cpu) is None
    assert autocast_dtype("bf16", cpu) == torch.bfloat16
    for has_amx, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has_amx=has_amx: has_amx)
        assert autocast_dtype("auto", cpu) == dtype
    with pytest.raises(UsageError, match="unknown precision 'fp8'; known: auto, float32, bf16"):
        autocast_dtype("fp8", cpu)


def test_bf16_trains(tiny):
    results = fit(small_net(), tiny, TrainingConfig(2, lr=0.05, batch_size=16, precision="bf16"))
    assert math.isfinite(results[-1].loss)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": -1}, "epochs must be finite and at least 0, but it is -1"),
        ({"epochs": 1, "batch_size": 0}, "batch_size must be finite and at least 1"),
        ({"epochs": 1, "lr": float("nan")}, "lr must be finite and at least 0, but it is nan"),
        ({"epochs": 1, "seed": -3}, "seed must be finite and at least 0"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UsageError, match=message):
        TrainingConfig(**settings)


def test_gradients_that_onednn_gets_wrong_are_avoided():
    """On CPUs with AVX2 such convolutions crashed, or learned nonsense, in channels_last."""

    def strided(channels):
        return nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, 2))

    cpu = torch.device("cpu")
    assert memory_format(strided(16), cpu) == torch.channels_last
    assert memory_format(strided(5), cpu) == torch.contiguous_format
    assert memory_format(strided(5), torch.device("cuda")) == torch.channels_last
    x = torch.randn(32, 5, 8, 8)
    conv = nn.Conv2d(5, 32, 1, 2, bias=False).to(memory_format=memory_format(strided(5), cpu))
    conv(x).square().sum().backward()
    taken = x[:, :, ::2, ::2].double()
    outputs = torch.einsum("nchw,oc->nohw", taken, conv.weight.detach().double().flatten(1))
    expected = torch.einsum("nchw,nohw->oc", taken, 2 * outputs)
    torch.testing.assert_close(conv.weight.grad.flatten(1).double(), expected, rtol=1e-4, atol=1e-2)
