"""The sources: short files and functions, declared dependencies. import-linter checks the layers."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = sorted((ROOT / "src").rglob("*.py"))
NATIVE = sorted(path for path in (ROOT / "csrc").rglob("*.[ch]pp"))
MAX_FILE, MAX_FUNCTION = 500, 60  # lines


def functions(source: str) -> dict[str, int]:
    """Lines of each function's body without its docstring; lists of parameters are not counted."""
    lengths = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lengths[node.name] = body[-1].end_lineno - body[0].lineno + 1 if body else 0
    return lengths


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= MAX_FILE
    if path.suffix == ".py":
        assert {name: lines for name, lines in functions(source).items() if lines > MAX_FUNCTION} == {}
        return
    # clang-format puts a function's closing brace into the first column
    bodies = re.findall(r"^[^\s#}].*\{\n((?:[ \n].*\n|\n)*)\}", source, re.MULTILINE)
    long = [body.splitlines()[0] for body in bodies if len(body.splitlines()) > MAX_FUNCTION]
    assert [first for first in long if not re.match(r" (public|private):", first)] == []


def test_function_lengths_are_counted() -> None:
    assert functions('def f(\n    a,\n    b,\n):\n    """Doc."""\n    x = 1\n    return x\n') == {"f": 2}


def test_imports_are_declared() -> None:
    """A package that another one installs today may be gone with its next version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (name for extra in project["optional-dependencies"].values() for name in extra)
    declared = {re.split(r"[^A-Za-z0-9_-]", n)[0].replace("-", "_") for n in (*project["dependencies"], *extras)}
    roots = set()
    for path in [*PYTHON, *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                roots.add(str(node.module).split(".")[0])
    ours = {"paceline", "tests", "tools", "random_checkpoint", "random_gguf", "random_vocabulary"}  # three of bench/
    assert roots - declared - sys.stdlib_module_names - ours == set()
