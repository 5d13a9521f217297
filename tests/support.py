"""What several tests need: backends over checkpoints, and a bare decoding loop that keeps the logits."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import CheckpointWeights
from paceline.backends.formats import DRAFTER_FORMAT
from paceline.backends.torch.backend import TorchBackend
from paceline.backends.torch.load import open_device
from paceline.backends.torch.weights import CheckpointSource
from paceline.checkpoint import Checkpoint, resolve
from paceline.engine.proposers import DrafterProposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.types import GREEDY, Result, Statistics


class Ids:
    """A detokenizer that writes ids."""

    def push(self, token: int) -> str:
        return f"<{token}>"

    def finish(self) -> str:
        return ""


@dataclass
class Tap:
    """Keeps every row of logits that a token was sampled from."""

    rows: list[np.ndarray] = field(default_factory=list)

    def __call__(self, result: Result) -> None:
        self.rows += list(result.logits)


@dataclass(frozen=True)
class Run:
    tokens: list[int]
    logits: np.ndarray  # [tokens, vocabulary]
    statistics: Statistics


def unplaced(backend: Backend, prompt: list[int], **settings: object) -> Sequence:
    """A sequence for a scheduler."""
    defaults = {
        "params": GREEDY,
        "tap": Tap(),
        "draft_tokens": 0,
        "max_tokens": 20,
        "limit": backend.info.context,
        "stop_ids": frozenset(),
        "detokenizer": Ids(),
    }
    return Sequence(tokens=list(prompt), **{**defaults, **settings})


def sequence(backend: Backend, prompt: list[int], **settings: object) -> Sequence:
    """A sequence with a slot."""
    return unplaced(backend, prompt, slot=backend.open_slot(), **settings)


def run(backend: Backend, sequences: list[Sequence], chunk: int = 8) -> list[Run]:
    """Drive sequences to their ends, all in the same batches, and give their slots back."""
    proposers = [DrafterProposer(lambda: pytest.fail("no costs"), False)] if backend.info.has_drafter else []
    while running := [s for s in sequences if s.finish is None]:
        step(backend, proposers, running, chunk)
    for s in sequences:
        backend.close_slot(s.slot)
    return [Run(s.generated, np.array(s.tap.rows), s.statistics) for s in sequences]


def cpu_backend(
    target: Path, drafter: Path | None, quant: str = "f32", *, threads: int = 1, max_rows: int = 32, **other: object
) -> CpuBackend:
    """A native backend over checkpoint folders."""

    def opened(folder: Path, fmt: str, settings: str) -> tuple:
        checkpoint = Checkpoint.open(folder)
        config = getattr(checkpoint, settings)()
        return config, CheckpointWeights(resolve(checkpoint, config), fmt)

    return CpuBackend(
        opened(target, quant, "target_config"),
        opened(drafter, DRAFTER_FORMAT[quant], "drafter_config") if drafter else None,
        threads=threads,
        context=other.pop("context", 128),
        max_rows=max_rows,
        **other,
    )


def torch_backend(
    target: Path,
    drafter: Path | None,
    quant: str = "f32",
    *,
    max_rows: int = 32,
    device: torch.device | None = None,
    **other: object,
) -> TorchBackend:
    """A PyTorch backend over checkpoint folders, on the processor unless told otherwise."""

    def opened(folder: Path, fmt: str, settings: str) -> tuple:
        checkpoint = Checkpoint.open(folder)
        config = getattr(checkpoint, settings)()
        return config, CheckpointSource(resolve(checkpoint, config), fmt, device or torch.device("cpu"))

    return TorchBackend(
        opened(target, quant, "target_config"),
        opened(drafter, DRAFTER_FORMAT[quant], "drafter_config") if drafter else None,
        quant=quant,
        context=other.pop("context", 128),
        max_rows=max_rows,
        **other,
    )


DEVICE = os.environ.get("PACELINE_TEST_DEVICE", "cpu")  # what the tests of exactness and parity run on
NATIVE = DEVICE == "cpu"
only_native = pytest.mark.skipif(not NATIVE, reason="of the native kernels")


def any_backend(target: Path, drafter: Path | None, quant: str = "f32", **other: object) -> Backend:
    """The backend that PACELINE_TEST_DEVICE names, over checkpoint folders."""
    if NATIVE:
        return cpu_backend(target, drafter, quant, **other)
    for name in ("threads", "isa"):
        other.pop(name, None)
    return torch_backend(target, drafter, quant, device=open_device(DEVICE.removeprefix("torch:")), **other)


def examples(count: int) -> int:
    """Examples of a property: PyTorch's small operations take twenty times as long as the native kernels."""
    return count if NATIVE else max(3, count // 20)
