"""Atomic file writes, and the folder for cached files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only once it is complete; if writing fails, nothing is left."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def cache_folder() -> Path:
    """The folder for files kept between starts: PACELINE_CACHE, or `paceline` in the user's cache folder."""
    given = os.environ.get("PACELINE_CACHE")
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"
    return Path(given) if given else user
