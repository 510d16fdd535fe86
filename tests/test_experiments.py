"""Experiments: their scripts fit the library as it is."""

import runpy
from pathlib import Path

import pytest
from click.testing import CliRunner

from rmprune import sweep

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCRIPTS = sorted(EXPERIMENTS.glob("*/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_scripts_can_be_loaded(script):
    assert callable(runpy.run_path(str(script)).get("main"))


def test_sweeps_in_several_gathered_folders_stay_apart():
    folders = [EXPERIMENTS / "figure7" / f"resnet20-{name}" for name in ("avx2", "slimming")]
    first, second = (set(sweep.timed_results(folder)["sweep"]) for folder in folders)
    assert {Path(name).name for name in first & second} == set()
    assert {Path(name).name for name in first} & {Path(name).name for name in second}


def test_gathered_sweeps_lose_no_net(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "time_all", lambda *_: None)
    folders = [EXPERIMENTS / "figure7" / name for name in ("resnet20", "resnet20-quarters")]
    gather = runpy.run_path(str(EXPERIMENTS / "figure7" / "gather.py"))["main"]
    out = tmp_path / "all"
    CliRunner().invoke(gather, [str(out), *map(str, folders)], catch_exceptions=False)
    rows = sweep.results(out)
    files = [path.name for folder in folders for path in (folder / "nets").iterdir()]
    assert len(rows) == len(files) > len(set(files))
    assert rows["net"].is_unique
    for row in rows.to_dict("records"):
        kept = next(folder for folder in folders if folder.name == row["sweep"])
        name = row["net"].removeprefix(f"{kept.name}-")
        assert (kept / "nets" / name).read_bytes() == sweep.net_path(out, row).read_bytes()
        own = sweep.results(kept).set_index("net").loc[name]
        assert own["accuracy"] == row["accuracy"]
    assert len(rows) == len(list((out / "nets").iterdir()))
    for given, message in (([out], "exists"), ([tmp_path / "new", folders[0]], "same name")):
        refused = CliRunner().invoke(gather, [*map(str, given), *map(str, folders)])
        assert refused.exit_code == 2
        assert message in refused.output
