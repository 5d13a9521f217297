"""Looking into folders that other programs own: nothing is written, and what may not be read is no crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def home() -> Path | None:
    """The user's home folder."""
    try:
        return Path.home()
    except RuntimeError:  # no such user, and no HOME
        return None


def without_case(root: Path, names: tuple[str, ...]) -> Path | None:
    """The path of these names below a folder: as written, or else with any of them in other case.

    Raises:
        OSError: a folder on the way may not be read.
    """
    path = root
    for name in names:
        exact = path / name
        try:
            exact.stat()
            path = exact
        except (FileNotFoundError, NotADirectoryError):
            try:
                found = next((child for child in sorted(os.listdir(path)) if child.lower() == name.lower()), None)
            except (FileNotFoundError, NotADirectoryError):
                return None
            if found is None:
                return None
            path = path / found
    return path


def children(root: Path, depth: int) -> Iterator[Path]:
    """What lies exactly `depth` levels below a folder; folders that may not be read are left out."""
    try:
        names = sorted(os.listdir(root))
    except OSError:
        return
    for name in names:
        if name.startswith("."):
            continue
        if depth == 1:
            yield root / name
        else:
            yield from children(root / name, depth - 1)
