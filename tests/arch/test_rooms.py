"""The rooms of the package: who may import whom, where PyTorch may be, and how long a file may be."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import paceline.errors

PACKAGE = Path(paceline.errors.__file__).parent
ROOMS = {
    "sampling_params": 0,
    "types": 0,
    "errors": 0,
    "files": 0,
    "config": 0,
    "text": 1,
    "checkpoint": 1,
    "quant": 1,
    "models": 2,
    "_cpu": 2,  # the compiled kernels
    "backends": 3,
    "decode": 1,
    "engine": 4,
    "train": 4,
    "build": 4.5,  # the composition root: chooses a backend and hands it to an engine
    "__init__": 4.6,  # `import paceline`: the library's face
    "server": 5,
    "bench": 5,
    "cli": 6,
    "__main__": 7,
}
PURE = ("decode",)  # imports the nouns only
MAY_IMPORT_TORCH = ("models", "train", "backends/torch")
LONGEST_FILE = 500

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of `paceline.room.module`; the package itself is `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_of(tree: ast.Module, package: str) -> Iterator[str]:
    """Every module a file imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from paceline import engine` imports a room; `from paceline import load` the package's face
            rooms = [alias.name for alias in node.names if base == "paceline" and alias.name in ROOMS]
            yield from ([f"paceline.{room}" for room in rooms] or [base])


def imports_of_file(path: Path) -> list[str]:
    package = ".".join(["paceline", *path.parent.relative_to(PACKAGE).parts])
    return list(imports_of(ast.parse(path.read_text()), package))


def own_room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else path.stem


def broken_rules(room: str, imported: list[str]) -> list[str]:
    broken = []
    for module in imported:
        if module.split(".")[0] != "paceline":
            continue
        other = room_of(module)
        nouns = ROOMS[other] == 0
        if other != room and not nouns and (ROOMS[other] >= ROOMS[room] or room in PURE):
            broken.append(f"{room} imports {module}")
        if nouns and ROOMS[room] == 0 and other not in ("errors", "sampling_params", room):
            broken.append(f"{room} imports {module}")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_lower_rooms(path: Path) -> None:
    assert own_room(path) in ROOMS, f"give {own_room(path)} a level"
    assert broken_rules(own_room(path), imports_of_file(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_stays_in_its_rooms(path: Path) -> None:
    if path.relative_to(PACKAGE).as_posix().startswith(MAY_IMPORT_TORCH):
        return
    heavy = [name for name in imports_of_file(path) if name.split(".")[0] in ("torch", "transformers")]
    assert heavy == []


def test_what_is_imported_is_declared() -> None:
    """A package that another one brings along today may be gone with its next version."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    names = {re.split(r"[^A-Za-z0-9_-]", name)[0].replace("-", "_") for name in declared}
    ours = [*FILES, *Path(__file__).parents[1].rglob("*.py")]
    roots = {module.split(".")[0] for path in ours for module in imports_of(ast.parse(path.read_text()), "paceline")}
    assert (
        roots - names - sys.stdlib_module_names - {"paceline", "tests", "random_checkpoint"} == set()
    )  # the last lies in bench/


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def test_the_walk_finds_every_kind_of_import() -> None:
    source = """
import numpy, paceline.engine
from paceline.cli.main import main
from paceline import server, Engine
from . import sibling
from ..quant import blocks
if TYPE_CHECKING:
    from paceline.bench import runs
def late():
    import torch.nn
"""
    assert sorted(imports_of(ast.parse(source), "paceline.decode")) == [
        "numpy",
        "paceline.bench",
        "paceline.cli.main",
        "paceline.decode",
        "paceline.engine",
        "paceline.quant",
        "paceline.server",
        "torch.nn",
    ]


def test_the_rule_can_fail() -> None:
    assert broken_rules("engine", ["paceline.types", "paceline.text.chat", "paceline.engine.step", "numpy"]) == []
    assert broken_rules("text", ["paceline.checkpoint"]) == ["text imports paceline.checkpoint"]
    assert broken_rules("engine", ["paceline.cli.main"]) == ["engine imports paceline.cli.main"]
    assert broken_rules("backends", ["paceline"]) == ["backends imports paceline"]
    assert broken_rules("decode", ["paceline.types", "paceline.quant"]) == ["decode imports paceline.quant"]
    assert broken_rules("errors", ["paceline.types"]) == ["errors imports paceline.types"]
