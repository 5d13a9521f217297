"""paceline's CPU backend as an engine to compare: the target alone, straight from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import paceline
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.types import Batch

CHUNK = 256  # prompt rows read in one pass: the engine's default


class Paceline:
    """See `worker.Engine`."""

    def __init__(self, folder: Path, fmt: str, threads: int, room: int) -> None:
        checkpoint = Checkpoint.open(folder)
        config = checkpoint.target_config()
        weights = pack_checkpoint(resolve(checkpoint, config), config, fmt)
        self._backend = CpuBackend((config, weights), threads=threads, context=room, max_rows=CHUNK)
        self._slot = self._backend.open_slot()
        self._cached = self._kept = 0
        self._logits: NDArray[np.float32]
        self.version = f"paceline {paceline.__version__} ({self._backend.isa})"

    def read(self, tokens: list[int]) -> None:
        self._backend.close_slot(self._slot)
        self._slot = self._backend.open_slot()
        self._cached = 0
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            self._run(chunk, wanted=int(start + len(chunk) == len(tokens)))
        self._kept = self._cached

    def extend(self, tokens: list[int]) -> None:
        self._run(tokens, wanted=len(tokens))

    def rewind(self) -> None:
        self._backend.truncate(self._slot, self._kept)
        self._cached = self._kept

    def best(self) -> int:
        return int(self._logits[-1].argmax())

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _run(self, tokens: list[int], wanted: int) -> None:
        rows = len(tokens)
        batch = Batch(
            slots=np.full(rows, self._slot, np.int32),
            positions=np.arange(self._cached, self._cached + rows, dtype=np.int32),
            tokens=np.array(tokens, np.int32),
            wanted=np.arange(rows) >= rows - wanted,
        )
        self._logits = self._backend.forward(batch).logits
        self._cached += rows


def open_engine(path: str, fmt: str, threads: int, room: int) -> Paceline:
    return Paceline(Path(path), fmt, threads, room)
