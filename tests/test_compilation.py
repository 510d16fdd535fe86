"""Steps are timed without a trace, and what is decided is kept."""

import time

import pytest
import torch
from torch import nn

from rmprune import compilation, training
from rmprune.compilation import is_worth_timing, pays, undone
from rmprune.training import TrainingConfig, fit


def sleeper(seconds, calls):
    def step():
        calls.append(seconds)
        time.sleep(seconds)

    return step


def test_a_short_training_never_compiles():
    calls = []
    assert not pays(sleeper(0.001, calls), lambda: pytest.fail("compiled"), 1000)
    assert 0 < len(calls) < 10


@pytest.mark.parametrize(("compiled", "expected"), [(0.002, True), (0.02, False)])
def test_the_faster_step_wins_in_a_long_training(compiled, expected):
    calls = []
    assert pays(sleeper(0.01, calls), sleeper(compiled, calls), 10**6) is expected


def test_the_first_calls_may_take_long():
    calls = []
    slow = sleeper(0.2, calls)

    def step():
        if len(calls) < 8:  # compiles
            slow()

    assert pays(sleeper(0.01, calls), step, 10**6)


def test_without_a_compiler_nothing_is_timed(monkeypatch):
    assert not is_worth_timing(10)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert not is_worth_timing(10**6)


def test_timed_steps_leave_no_trace():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    state = {name: values.clone() for name, values in model.state_dict().items()}
    generator = torch.get_rng_state()
    with undone(model, torch.device("cpu")):
        model(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(torch.equal(values, state[name]) for name, values in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_training_that_was_timed_ends_as_one_that_was_not(tiny, monkeypatch):
    monkeypatch.setattr(compilation, "STEPS_WORTH_TIMING", 1)
    config = TrainingConfig(2, lr=0.05, batch_size=24, precision="float32")

    def trained(choice):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.1), nn.Flatten(), nn.LazyLinear(10)
        )
        model(torch.zeros(1, 3, 8, 8))
        states = []
        results = fit(
            model,
            tiny,
            TrainingConfig(**{**vars(config), "compile": choice}),
            after_epoch=lambda _, state: states.append(state),
        )
        return results, states[-1]

    (timed, state), (plain, _) = trained("auto"), trained("off")
    assert timed == plain
    assert state["compiled"] is False


def test_a_resumed_training_is_compiled_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr(compilation, "STEPS_WORTH_TIMING", 1)
    monkeypatch.setattr(training, "pays", lambda *_: True)
    compiled = []
    monkeypatch.setattr(training, "compiled", lambda module, _: compiled.append(module) or module)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    states = []
    config = TrainingConfig(2, batch_size=24, precision="float32")
    fit(model, tiny, config, after_epoch=lambda _, state: states.append(state))
    assert [state["compiled"] for state in states] == [True, True]
    monkeypatch.setattr(training, "pays", lambda *_: pytest.fail("timed again"))
    fit(model, tiny, config, resume_from=states[0])
