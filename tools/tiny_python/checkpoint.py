"""Training state on disk: written beside its place and moved there, so that an interrupted run can be resumed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tools.tiny_python.optimizer import Optimizer

SAVE_EVERY = 120.0  # seconds of training


@dataclass
class Progress:
    """How far a run has come."""

    path: Path
    seconds: float = 0.0
    tokens: int = 0
    saved: float = 0.0  # `seconds` at the last save

    @classmethod
    def resume(cls, path: Path, optimizer: Optimizer) -> Progress:
        """Progress of the run stored at `path`, whose optimizer state is put into `optimizer`; a new one if none is."""
        if not path.exists():
            return cls(path)
        state = torch.load(path, weights_only=True)
        optimizer.restore(state["optimizer"])
        return cls(path, state["seconds"], state["tokens"], state["seconds"])

    def advance(self, seconds: float, tokens: int, optimizer: Optimizer) -> None:
        self.seconds += seconds
        self.tokens += tokens
        if self.seconds - self.saved > SAVE_EVERY:
            self.save(optimizer)

    def save(self, optimizer: Optimizer) -> None:
        self.saved = self.seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        torch.save({"optimizer": optimizer.state(), "seconds": self.seconds, "tokens": self.tokens}, beside)
        os.replace(beside, self.path)


def trained(path: Path) -> tuple[float, int]:
    """Seconds and tokens of the run stored at `path`."""
    state = torch.load(path, weights_only=True)
    return state["seconds"], state["tokens"]
