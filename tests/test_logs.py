"""Logs: what an epoch gave stands where it was asked for, once."""

import dataclasses

import pandas as pd
import pytest
from strategies import SHORT

from rmprune import logs, runs

CONFIG = dataclasses.replace(SHORT, epochs=2, sparsity=0.05)


def test_tensorboard_and_table(tiny, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    checkpoint = runs.train(tmp_path, dataclasses.replace(CONFIG, log="tensorboard"), tiny)
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert table["epoch"].tolist() == [1, 2]
    assert table["under_threshold"].tolist() == [r["under_threshold"] for r in checkpoint.history]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sparse")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "test_accuracy", "lr", "under_threshold"}
    for name in ("loss", "lr"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(dict(zip((1, 2), table[name], strict=True)), rel=1e-6)


def test_events_of_epochs_that_are_trained_again_are_dropped(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, losses in ((0, (3.0, 2.0)), (1, (1.0,))):
        with logs.opened("tensorboard", tmp_path, "sparse", first) as log:
            for epoch, loss in enumerate(losses, start=first + 1):
                log([{"stage": "sparse", "epoch": epoch, "loss": loss}])
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "sparse")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 1.0)]


def test_nothing_is_written_where_nothing_is_wanted(tiny, tmp_path):
    config = dataclasses.replace(CONFIG, log="none")
    sparse = runs.train(tmp_path, config, tiny)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "sparse.pt"}
    assert len(sparse.history) == 2


def test_stages_stand_beside_each_other(tmp_path):
    for stage, losses in (("sparse", [3.0]), ("finetuned", [2.0]), ("sparse", [3.0, 1.0])):
        with logs.opened("csv", tmp_path, stage, 0) as log:
            log([{"stage": stage, "epoch": n + 1, "loss": loss} for n, loss in enumerate(losses)])
    table = pd.read_csv(tmp_path / "metrics.csv")
    rows = table[["stage", "epoch", "loss"]].to_numpy().tolist()
    assert rows == [["finetuned", 1, 2.0], ["sparse", 1, 3.0], ["sparse", 2, 1.0]]
    assert logs.as_table([]).columns.tolist()[:2] == ["stage", "epoch"]
