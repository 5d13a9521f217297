"""Training state on disk: written beside its place and moved there, so that an interrupted run can be resumed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from paceline.train.optimizer import Optimizer
from paceline.train.work import whole_file


@dataclass
class Progress:
    """How far a run has come."""

    path: Path
    seconds: float = 0.0
    tokens: int = 0
    saved: float = 0.0  # `seconds` at the last save
    history: list[dict[str, Any]] = field(default_factory=list)  # what was found at every save

    @classmethod
    def resume(cls, path: Path, optimizer: Optimizer) -> Progress:
        """Progress of the run stored at `path`, whose optimizer state is put into `optimizer`; a new one if none is."""
        if not path.exists():
            return cls(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.restore(state["optimizer"])
        return _from(path, state)

    def save(self, optimizer: Optimizer) -> None:
        self.saved = self.seconds
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {"optimizer": optimizer.state(), "seconds": self.seconds, "tokens": self.tokens}
        with whole_file(self.path) as file:
            torch.save({**state, "history": self.history}, file)


def trained(path: Path) -> Progress:
    """Progress of the run stored at `path`."""
    return _from(path, torch.load(path, map_location="cpu", weights_only=True))


def _from(path: Path, state: dict[str, Any]) -> Progress:
    return Progress(path, state["seconds"], state["tokens"], state["seconds"], state["history"])
