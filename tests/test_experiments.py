"""Experiments: their scripts fit the library as it is."""

import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "experiments").glob("*/*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_scripts_can_be_loaded(script):
    assert callable(runpy.run_path(str(script)).get("main"))
