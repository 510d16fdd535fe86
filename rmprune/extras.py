"""Packages that a user may not have installed."""

from __future__ import annotations

import importlib
from types import ModuleType

from rmprune.errors import UsageError


def extra(module: str, purpose: str, name: str = "onnx") -> ModuleType:
    """A module of an optional extra.

    Args:
        module: To import.
        purpose: What needs it.
        name: Of the extra.

    Raises:
        UsageError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {module}; install it: pip install 'rmprune[{name}]'"
        ) from error
