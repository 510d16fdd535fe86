"""Rewrite residual CNNs exactly into plain ones, prune them, and prove the result."""

__version__ = "0.1.0"

from rmprune.convert import convert
from rmprune.errors import RmpruneError
from rmprune.lowering import lower
from rmprune.measure import measure
from rmprune.models import create_model
from rmprune.removal import prune
from rmprune.selection import apply_masks, select
from rmprune.slimming import add_shortcut_bn
from rmprune.store import load, save

__all__ = [
    "RmpruneError",
    "add_shortcut_bn",
    "apply_masks",
    "convert",
    "create_model",
    "load",
    "lower",
    "measure",
    "prune",
    "save",
    "select",
]
