"""Scripts in bench/: nothing that they import from paceline has gone."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "bench").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_imports_exist(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("paceline"):
            continue
        module = importlib.import_module(node.module or "")
        missing = [name.name for name in node.names if not hasattr(module, name.name)]
        for name in missing:  # a module of a package
            importlib.import_module(f"{node.module}.{name}")
