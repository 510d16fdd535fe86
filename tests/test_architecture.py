"""Imports run down the table in CONTRIBUTING.md, and every module stands there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rmprune"


def order():
    """Modules in the order of the table, folders as one."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    names = re.findall(r"`([\w/]+)(?:\.py)?`", " ".join(cells))
    return [name.rstrip("/") for name in names]


def name_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """The modules of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rmprune":
            if node.module == "rmprune":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            else:
                yield node.module.split(".")[1]


def test_every_module_stands_in_the_table():
    modules = {name_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert set(order()) >= modules
    assert len(order()) == len(set(order()))


def test_imports_run_down_the_table():
    places = {name: place for place, name in enumerate(order())}
    for path in PACKAGE.rglob("*.py"):
        if path.parent == PACKAGE and path.stem.startswith("__"):
            continue
        here = name_of(path)
        for name in imports(path):
            assert name == here or places[name] < places[here], f"{path.name} imports {name}"
