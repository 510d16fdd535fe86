"""The command line: options and words; the work is done elsewhere."""

from rmprune.cli import comparisons, nets, stages
from rmprune.cli.group import main

__all__ = ["comparisons", "main", "nets", "stages"]
