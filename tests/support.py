"""What several tests need: backends over checkpoints, and a bare decoding loop that keeps the logits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from paceline.backends.base import Backend
from paceline.backends.cpu.backend import CpuBackend
from paceline.backends.cpu.weights import pack_checkpoint
from paceline.checkpoint import Checkpoint, resolve
from paceline.decode.draft_length import Costs
from paceline.engine.proposers import DrafterProposer, GrammarProposer, Proposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.quant.formats import FORMATS
from paceline.types import GREEDY, MAX_DRAFT, Draft, Result, Statistics, Work


class Ids:
    """A detokenizer that writes ids."""

    def push(self, token: int) -> str:
        return f"<{token}>"

    def finish(self) -> str:
        return ""


class KnowingProposer(Proposer):
    """Knows each sequence's text and lies now and then, so that rounds accept any number of tokens.

    Drafts are as long as the sequence says, or of any length where it leaves that open. `texts` is to be filled with
    prompts and what follows them.
    """

    def __init__(self, honesty: float, seed: int, vocab_size: int) -> None:
        self.texts: dict[Sequence, list[int]] = {}
        self._honesty, self._vocab_size = honesty, vocab_size
        self._random = np.random.default_rng(seed)

    def propose(self, sequence: Sequence, most: int) -> Draft:
        length = sequence.draft_tokens
        if length is None:
            length = int(self._random.integers(0, 9))
        length, start = min(length, most), len(sequence.tokens)
        tokens = self._random.integers(0, self._vocab_size, length)
        known = np.array(self.texts[sequence][start : start + length], np.int64)
        honest = self._random.random(len(known)) < self._honesty
        tokens[: len(known)] = np.where(honest, known, tokens[: len(known)])
        return Draft(tuple(tokens.tolist()))


@dataclass(frozen=True)
class Run:
    tokens: list[int]
    logits: np.ndarray  # [tokens, vocabulary]
    statistics: Statistics


def unplaced(backend: Backend, prompt: list[int], **settings: object) -> Sequence:
    """A sequence for a scheduler; its `rows` collect the logits that tokens were sampled from."""
    defaults = {
        "params": GREEDY,
        "draft_tokens": 0,
        "max_tokens": 20,
        "limit": backend.info.context,
        "stop_ids": frozenset(),
        "detokenizer": Ids(),
    }
    one = Sequence(tokens=list(prompt), **{**defaults, **settings})
    one.rows = []

    def keep(result: Result) -> None:
        one.rows += [*result.logits]

    one.tap = keep
    return one


def sequence(backend: Backend, prompt: list[int], **settings: object) -> Sequence:
    """A sequence with a slot."""
    return unplaced(backend, prompt, slot=backend.open_slot(), **settings)


def proposers_of(backend: Backend, costs: Costs | None = None) -> list[Proposer]:
    """The grammar, and the backend's drafter if it has one."""
    drafter = [DrafterProposer(lambda: costs, backend.info.stops_early)] if backend.info.has_drafter else []
    return [GrammarProposer(), *drafter]


def run(
    backend: Backend, sequences: list[Sequence], chunk: int = 8, proposers: list[Proposer] | None = None
) -> list[Run]:
    """Drive sequences to their ends, all in the same steps, and free their slots."""
    while running := [s for s in sequences if s.finish is None]:
        step(backend, proposers_of(backend) if proposers is None else proposers, running, chunk)
    for s in sequences:
        backend.close_slot(s.slot)
    return [Run(s.generated, np.array(s.rows), s.statistics) for s in sequences]


def all_logits(backend: Backend, slot: int, tokens: list[int], position: int = 0) -> np.ndarray:
    """Logits [tokens, vocabulary] of every row, in verifications of at most 16 rows; the slot then holds the tokens."""
    parts = []
    for start in range(0, len(tokens), 1 + MAX_DRAFT):
        rows = tokens[start : start + 1 + MAX_DRAFT]
        draft = Draft(tuple(rows[1:]), simulated=len(rows) - 1)
        (result,) = backend.run([Work(slot, position + start, rows[:1], GREEDY, draft, logits=True)])
        parts.append(result.logits)
    return np.concatenate(parts)


def cpu_backend(
    target: Path, drafter: Path | None, quant: str = "f32", *, threads: int = 1, max_rows: int = 32, **other: object
) -> CpuBackend:
    """A native backend over checkpoint folders."""

    def opened(folder: Path, fmt: str, settings: str) -> tuple:
        checkpoint = Checkpoint.open(folder)
        config = getattr(checkpoint, settings)()
        return config, pack_checkpoint(resolve(checkpoint, config), config, fmt)

    return CpuBackend(
        opened(target, quant, "target_config"),
        opened(drafter, FORMATS[quant].drafter, "drafter_config") if drafter else None,
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
) -> Backend:
    """A PyTorch backend over checkpoint folders, on the processor unless told otherwise."""

    from paceline.backends.torch.backend import TorchBackend
    from paceline.backends.torch.weights import CheckpointSource

    def opened(folder: Path, fmt: str, settings: str) -> tuple:
        checkpoint = Checkpoint.open(folder)
        config = getattr(checkpoint, settings)()
        return config, CheckpointSource(resolve(checkpoint, config), fmt, device or torch.device("cpu"))

    return TorchBackend(
        opened(target, quant, "target_config"),
        opened(drafter, FORMATS[quant].drafter, "drafter_config") if drafter else None,
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
    from paceline.backends.torch.load import open_device

    for name in ("threads", "isa"):
        other.pop(name, None)
    return torch_backend(target, drafter, quant, device=open_device(DEVICE.removeprefix("torch:")), **other)


def examples(count: int) -> int:
    """Examples of a property: PyTorch's small operations take twenty times as long as the native kernels."""
    return count if NATIVE else max(3, count // 20)
