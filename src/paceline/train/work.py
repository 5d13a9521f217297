"""`OUT.train`, where a training keeps everything in between, and from which a run that was stopped goes on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from paceline.errors import SettingsError
from paceline.files import atomic_file, read_json

SETTINGS, REPORT, DRAFTER = "settings.json", "report.json", "drafter"


@dataclass(frozen=True)
class WorkFolder:
    """The folder beside `out`, the folder that will hold the result.

    It has `settings.json` from its first moment to its last, so that nothing of another run is ever taken for this
    one's, and no folder that is not a training's is touched.
    """

    out: Path

    @property
    def path(self) -> Path:
        return self.out.with_name(self.out.name + ".train")

    @property
    def drafter(self) -> Path:
        """The trained drafter, until it is moved to `out`."""
        return self.path / DRAFTER

    def begun(self, settings: Mapping[str, Any]) -> bool:
        """Whether a run with these settings was begun.

        Raises:
            SettingsError: one with others was, or the folder is something else.
        """
        if not os.path.lexists(self.path) or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        if not (self.path / SETTINGS).is_file():
            raise SettingsError(f"{self.path}: is not of a training; move it away, or give another OUT")
        theirs = read_json(self.path / SETTINGS)
        odd = next((key for key in settings if settings[key] != theirs.get(key)), None)
        if odd is not None:
            raise SettingsError(
                f"{self.path}: was begun with {odd} {theirs.get(odd)!r}, which is now {settings[odd]!r}; "
                "give the same settings to go on, or delete the folder"
            )
        return True

    def begin(self, settings: Mapping[str, Any], needed: int) -> None:
        """Make it.

        Args:
            settings: that `begun` compares.
            needed: bytes of disk that the run will take.

        Raises:
            SettingsError: there is no room, or no permission to write.
        """
        parent = next(folder for folder in self.path.absolute().parents if folder.exists())
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise SettingsError(
                f"{self.path}: {needed / 1e9:.1f} GB do not fit; {free / 1e9:.1f} GB are free; "
                "give a smaller --budget, or another OUT"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"{self.path}: cannot be made ({error.strerror}); give another OUT") from error
        write_json(self.path / SETTINGS, settings)

    def remove_parts(self) -> None:
        """Remove files that a killed run did not complete."""
        for part in self.path.glob("*.part"):
            part.unlink(missing_ok=True)

    def finish(self, report: Mapping[str, Any]) -> None:
        """Move the drafter to `out`, and remove the folder; after a kill in between, `finished` goes on with it."""
        write_json(self.path / REPORT, report)
        os.replace(self.drafter, self.out)
        self._remove()

    def finished(self) -> dict[str, Any] | None:
        """The report of a run that was killed after its drafter was there; what is left of the folder is removed."""
        if not (self.out.exists() and (self.path / SETTINGS).is_file() and (self.path / REPORT).is_file()):
            return None
        report = read_json(self.path / REPORT)
        self._remove()
        return report

    def _remove(self) -> None:
        """What the report and the settings are needed for goes first."""
        for path in self.path.iterdir():
            if path.name not in (SETTINGS, REPORT):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name in (REPORT, SETTINGS):
            (self.path / name).unlink(missing_ok=True)
        self.path.rmdir()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears when it is complete.

    Raises:
        SettingsError: there is no room, or no permission to write.
    """
    try:
        with atomic_file(path) as file:
            yield file
    except OSError as error:
        cure = "free some, or give a smaller --budget" if error.errno == errno.ENOSPC else "give another OUT"
        raise SettingsError(f"{path.parent}: cannot be written ({error.strerror}); {cure}") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file at once; see `whole_file`."""
    with whole_file(path) as file:
        file.write(data)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON at once; see `whole_file`."""
    write_bytes(path, json.dumps(content, ensure_ascii=False).encode())


def digest(*texts: str) -> str:
    """What tells texts from others."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def identity(path: Path) -> str:
    """What tells a model's files from others under the same name: their names, sizes and times."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    stats = ((file.name, file.stat()) for file in files)
    return digest(*(f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats))
