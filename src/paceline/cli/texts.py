"""Text files that commands run a model over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from paceline import errors
from paceline.cli import options as opt
from paceline.errors import PromptError


def bundled(folder: str) -> dict[str, Path]:
    """The texts that come with paceline for a purpose; the README of their folder says where they are from."""
    assets = Path(errors.__file__).parent / "assets"
    return {path.stem: path for path in sorted((assets / folder).glob("*.txt"))}


def read_texts(paths: Mapping[str, Path]) -> dict[str, str]:
    """The contents of text files.

    Raises:
        PromptError: one cannot be read, or is not UTF-8.
    """
    texts: dict[str, str] = {}
    for name, path in paths.items():
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PromptError(f"{path}: cannot be read ({error.strerror}); give a text file") from error
        texts[name] = opt.decode_text(data, path).removeprefix("\ufeff")
    return texts
