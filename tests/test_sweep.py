"""Sweeps on real digits: every method, failures, and going on after a stop."""

import dataclasses

import pandas as pd
import pytest
import torch
from strategies import SHORT

from rmprune import sweep as sweeps
from rmprune.backends import Platform
from rmprune.checkpoints import Task
from rmprune.errors import TrainingError, UsageError
from rmprune.measure import count_params, evaluate
from rmprune.models import create_model
from rmprune.plots import draw_sweep, pareto_front
from rmprune.store import read_json
from rmprune.sweep import METHODS, Sweep

pytestmark = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet20.pt"
    torch.save(create_model("resnet20").state_dict(), path)
    return str(path)


def plan(weights, **changes):
    settings = {
        "base": SHORT,
        "models": (("resnet20", weights),),
        "methods": METHODS,
        "sparsities": (1e-2,),
        "levels": ("macs=0.5", "threshold=0.05"),
        "seeds": (0,),
    }
    return Sweep(**{**settings, **changes})


@pytest.fixture(scope="module")
def swept(tiny, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    said = []
    table = sweeps.run(folder, plan(weights), lambda: tiny, say=said.append)
    return folder, table, said


def test_every_method_gives_its_points(swept, tiny):
    folder, table, said = swept
    assert table["error"].isna().all()
    found = table.groupby("method")["lowering"].apply(sorted).to_dict()
    assert found == {
        "original": ["residual"],
        "rm": ["auto", "auto", "plain", "plain"],
        "slimming": ["auto", "auto"],
        "torch-pruning:bn-scale": ["residual", "residual"],
        "torch-pruning:group-norm": ["residual", "residual"],
    }
    assert len(said) == len(table) - 1
    met = table[(table["level"] == "macs=0.5") & (table["lowering"] != "plain")]
    assert len(met) == 4
    assert met["macs_ratio"].between(0.45, 0.5 * 1.03).all()
    for row in table.to_dict("records"):
        net = sweeps.load_net(folder, row, 10)
        assert count_params(net) == row["params"]
        correct, images = evaluate(net, tiny.test, mean=tiny.mean, std=tiny.std, device="cpu")
        assert correct / images == row["accuracy"]


def test_a_finished_sweep_does_nothing(swept, tiny, weights):
    folder, table, _ = swept
    said = []
    again = sweeps.run(folder, plan(weights), lambda: tiny, say=said.append)
    assert said == []
    pd.testing.assert_frame_equal(again, table)


def test_more_values_join_the_same_sweep(tiny, weights, tmp_path):
    config = dataclasses.replace(SHORT, epochs=0, finetune_epochs=0)
    for level in ("threshold=0.5", "threshold=0.1", "threshold=0.5"):
        sweep = plan(weights, base=config, methods=("slimming",), levels=(level,))
        table = sweeps.run(tmp_path, sweep, lambda: tiny, say=lambda _: None)
    assert table["level"].tolist() == ["original", "threshold=0.5", "threshold=0.1"]
    plans = read_json(tmp_path / "sweep.json")["plans"]
    assert [found["levels"] for found in plans] == [["threshold=0.5"], ["threshold=0.1"]]
    assert sweeps.task_of(tmp_path) == Task.of(tiny)


def test_one_training_serves_all_levels(swept):
    folder, _, _ = swept
    trainings = list((folder / "trainings").glob("*/sparse.pt"))
    assert len(trainings) == 4


@pytest.fixture(scope="module")
def timed(swept, tiny):
    platforms = [Platform(), Platform(batch_size=4)]
    return sweeps.time_all(
        swept[0], platforms, Task.of(tiny), lambda _: None, rounds=2, min_seconds=0.001
    )


def test_all_nets_are_timed_in_one_run(swept, timed):
    folder, table, _ = swept
    assert len(timed) == 2 * len(table)
    assert set(timed["net"]) == set(table["net"])
    original = timed[timed["net"] == table["net"].iloc[0]]
    assert original["speedup"].tolist() == [1.0, 1.0]
    assert (pd.read_csv(folder / "latencies.csv")["latency_ms"] > 0).all()


def test_a_failed_point_does_not_stop_the_others(tiny, weights, tmp_path, monkeypatch):
    original = sweeps._point

    def failing(method, place, trained, config, level, *rest):
        if level == "macs=0.5":
            raise TrainingError("the loss is no longer finite")
        return original(method, place, trained, config, level, *rest)

    monkeypatch.setattr(sweeps, "_point", failing)
    config = dataclasses.replace(SHORT, epochs=0, finetune_epochs=0)
    sweep = plan(weights, base=config, methods=("rm",))
    said = []
    table = sweeps.run(tmp_path, sweep, lambda: tiny, say=said.append)
    assert table["error"].dropna().tolist() == ["TrainingError: the loss is no longer finite"]
    assert table["accuracy"].notna().sum() == 3
    assert "failed: TrainingError" in said[0]
    other = dataclasses.replace(sweep, levels=("threshold=0.05",))
    assert sweeps.run(tmp_path, other, lambda: tiny, say=said.append)["error"].notna().sum() == 1
    monkeypatch.undo()
    again = sweeps.run(tmp_path, sweep, lambda: tiny, say=said.append)
    assert again["error"].isna().all()
    assert again["level"].value_counts()["macs=0.5"] == 2  # the plain net, and with additions


def test_a_stopped_sweep_goes_on(tiny, weights, tmp_path, monkeypatch):
    config = dataclasses.replace(SHORT, epochs=0, finetune_epochs=0)
    sweep = plan(weights, base=config, methods=("rm", "slimming"), levels=("threshold=0.5",))

    def stopped(*_):
        raise KeyboardInterrupt

    original = sweeps._append
    rows = []

    def append(folder, row):
        original(folder, row)
        rows.append(row)
        if len(rows) == 2:  # behind the two rows of rm
            raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "_append", append)
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(tmp_path, sweep, lambda: tiny, say=lambda _: None)
    monkeypatch.undo()
    table = sweeps.run(tmp_path, sweep, lambda: tiny, say=lambda _: None)
    assert table["method"].tolist() == ["original", "rm", "rm", "slimming"]


def test_points_of_other_trainings_are_not_mixed(swept, tiny, weights):
    folder, _, _ = swept
    for changes, before in (
        ({"finetune_epochs": 7}, "--finetune-epochs 1"),
        ({"importance": "loss"}, "--importance scale"),
    ):
        base = dataclasses.replace(SHORT, **changes)
        other = plan(weights, base=base, levels=("macs=0.5",))
        with pytest.raises(UsageError, match=f"begun for points of this sweep with {before}"):
            sweeps.run(folder, other, lambda: tiny, say=lambda _: None)
    other = plan(None, levels=("macs=0.5",))
    with pytest.raises(UsageError, match=f"begun for points .* with --weights {weights}"):
        sweeps.run(folder, other, lambda: tiny, say=lambda _: None)
    base = dataclasses.replace(SHORT, log="none")  # which no point depends on
    sweeps.run(folder, plan(weights, base=base), lambda: tiny, say=lambda _: None)
    base = dataclasses.replace(SHORT, lr=9.0)
    other = plan(weights, base=base, methods=("rm",), levels=("threshold=0.06",))
    table = sweeps.run(folder, other, lambda: tiny, say=lambda _: None)
    assert "--lr was" in table["error"].iloc[-1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("magic",)}, "unknown method 'magic'; known: rm, slimming, torch-pruning"),
        ({"base": dataclasses.replace(SHORT, prune_steps=2, target="macs=0.5")}, "once"),
        ({"levels": ()}, "--threshold or --target"),
        ({"levels": ("speed=2",)}, "unknown target 'speed'"),
        ({"levels": ("accuracy-drop=1",)}, "torch-pruning:bn-scale knows no target of accuracy"),
        ({"methods": ("rm",), "levels": ("accuracy-drop=1",)}, "train with --holdout"),
        (
            {
                "methods": ("rm",),
                "base": dataclasses.replace(SHORT, holdout=0.1, prune_steps=2, target="macs=0.5"),
                "levels": ("accuracy-drop=1",),
            },
            "is for one step",
        ),
        ({"seeds": (0, 1, 0)}, "0 is given 2 times"),
        ({"models": (("resnet20", "a.pt"), ("resnet20", "b.pt"))}, "resnet20 is given 2 times"),
    ],
)
def test_unusable_sweeps(weights, changes, message):
    with pytest.raises(UsageError, match=message):
        plan(weights, **changes)


def test_fronts():
    points = pd.DataFrame({"x": [1.0, 2, 3, 4, 2.5], "y": [0.9, 0.8, 0.85, 0.5, 0.6]})
    front = pareto_front(points, "x", "y")
    assert front["x"].tolist() == [1, 3, 4]


def test_nets_without_latencies_are_told_of(swept, timed, tmp_path):
    (tmp_path / "results.csv").write_bytes((swept[0] / "results.csv").read_bytes())
    last = timed["net"].iloc[-1]
    timed[timed["net"] != last].to_csv(tmp_path / "latencies.csv", index=False)
    with pytest.warns(UserWarning, match="1 nets of .* are left out"):
        assert last not in set(sweeps.timed_results(tmp_path)["net"])


def test_models_and_sweeps_are_not_averaged():
    shared = {"sparsity": 0.01, "level": "macs=0.5", "seed": 0, "method": "rm", "lowering": "plain"}
    rows = [
        {**shared, "model": model, "sweep": sweep, "accuracy": accuracy, "speedup": speedup}
        for model, sweep, accuracy, speedup in (
            ("resnet20", "a", 0.90, 2.0),
            ("resnet20", "b", 0.88, 3.0),
            ("resnet56", "a", 0.94, 1.5),
        )
    ]
    axes = draw_sweep(pd.DataFrame(rows), "speedup").axes[0]
    fronts = {line.get_label(): list(line.get_xdata()) for line in axes.get_lines()}
    assert fronts["rmprune, plain net, resnet20"] == [2.0, 3.0]
    assert fronts["rmprune, plain net, resnet56"] == [1.5]


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plots(swept, timed, tmp_path, ending):
    rows = sweeps.timed_results(swept[0])
    assert len(rows) == len(timed)
    for x in ("speedup", "removed_params", "latency_ms"):
        figure = draw_sweep(rows[rows["batch_size"] == 1], x)
        figure.savefig(tmp_path / f"{x}.{ending}")
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert len(labels) == 5
        assert (tmp_path / f"{x}.{ending}").stat().st_size > 5000
