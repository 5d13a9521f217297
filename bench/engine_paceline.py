"""paceline's CPU backend as an engine to compare: the target alone, straight from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import paceline
from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.build import load
from paceline.checkpoint import Checkpoint, resolve
from paceline.types import GREEDY, Draft, Work

CHUNK = 256  # prompt rows read in one pass: the engine's default


class Paceline:
    """See `worker.Engine`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._slot = self._backend.open_slot()
        self._cached = self._kept = 0
        self._logits: NDArray[np.float32]
        self.version = f"paceline {paceline.__version__} ({self._backend.info.device})"

    def read(self, tokens: list[int]) -> None:
        self._backend.close_slot(self._slot)
        self._slot = self._backend.open_slot()
        last = (len(tokens) - 1) // CHUNK * CHUNK
        for start in range(0, last, CHUNK):
            self._backend.run([Work(self._slot, start, tokens[start : start + CHUNK])])
        self._run(Work(self._slot, last, tokens[last:], GREEDY, logits=True))
        self._cached = self._kept = len(tokens)

    def extend(self, tokens: list[int]) -> None:
        draft = Draft(tuple(tokens[1:]), simulated=len(tokens) - 1)  # one pass with logits of all rows
        self._run(Work(self._slot, self._cached, tokens[:1], GREEDY, draft, logits=True))
        self._cached += len(tokens)

    def rewind(self) -> None:
        self._backend.truncate(self._slot, self._kept)
        self._cached = self._kept

    def best(self) -> int:
        return int(self._logits[-1].argmax())

    def logits(self) -> NDArray[np.float32]:
        return self._logits

    def _run(self, work: Work) -> None:
        (result,) = self._backend.run([work])
        assert result.logits is not None
        self._logits = result.logits


def open_engine(path: str, fmt: str, threads: int, room: int) -> Paceline:
    """A checkpoint in a recipe, or a GGUF file as it is."""
    if Path(path).is_file():
        engine = load(path, drafter="none", threads=threads, context=room, prompt_chunk=CHUNK, draft_tokens=0)
        return Paceline(engine.backend)
    checkpoint = Checkpoint.open(Path(path))
    config = checkpoint.target_config()
    weights = pack_checkpoint(resolve(checkpoint, config), config, fmt)
    return Paceline(CpuBackend((config, weights), threads=threads, context=room, max_rows=CHUNK))
