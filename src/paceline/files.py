"""JSON files, atomic file writes, and the folder for cached files."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from paceline.errors import CheckpointError

MAX_JSON_BYTES = 32 << 20  # parsed, it takes up to 25 times as much memory


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, too large a file, or not a JSON object.
    """
    if not os.path.isfile(path):  # not a pipe or a device, which would never end
        raise CheckpointError(f"{path}: is missing, so this is not a model folder; download it")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: is larger than {MAX_JSON_BYTES >> 20} MB; download it again")
        content = json.loads(data)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not valid JSON; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; download it again")
    return content


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
