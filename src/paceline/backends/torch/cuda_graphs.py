"""Runs programs of fixed shape: on CUDA devices each is recorded once as a graph and then replayed.

A program takes one tensor of 32-bit words, whatever they stand for, and returns words for the host and other tensors
that stay on the device. So a run costs one copy each way, and waits once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paceline.errors import BackendError
from paceline.types import Int32

Program = Callable[[Tensor], tuple[Tensor, ...]]
"""Takes words [n] int32."""


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    staged: Tensor  # in page-locked memory of the host, which copies need not wait for
    words: Tensor
    outputs: tuple[Tensor, ...]


class Recorder:
    """Programs by key: one key must always stand for the same work.

    What a program returns lives in memory that all recordings share: the next run, of whichever, may overwrite it.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recordings: dict[Hashable, _Recording] = {}
        self._pool: Any = None  # one for all: they never run at once

    def run(self, key: Hashable, program: Program, words: Int32) -> tuple[Tensor, ...]:
        """Start a program; the words it is given must stay as they are until `fetch`."""
        if self._device.type != "cuda":
            with self._able():
                return program(torch.from_numpy(words).to(self._device))
        with torch.cuda.device(self._device):
            if key not in self._recordings:
                self._recordings[key] = self._record(program, words)
            recording = self._recordings[key]
            recording.staged.numpy()[:] = words
            recording.words.copy_(recording.staged, non_blocking=True)
            recording.graph.replay()
        return recording.outputs

    def fetch(self, *words: Tensor) -> list[Int32]:
        """Copies of words on the host, once everything that was started is done."""
        if self._device.type != "cuda":
            with self._able():
                return [part.cpu().numpy() for part in words]
        copies = [torch.empty_like(part, device="cpu", pin_memory=True) for part in words]
        for copy, part in zip(copies, words, strict=True):
            copy.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return [copy.numpy() for copy in copies]

    @contextmanager
    def _able(self) -> Iterator[None]:
        """Says so where PyTorch lacks an operation on a device."""
        try:
            yield
        except NotImplementedError as error:
            first = str(error).splitlines()[0]
            raise BackendError(f"PyTorch cannot run this on {self._device} ({first}); use --device cpu") from error

    def _record(self, program: Program, words: Int32) -> _Recording:
        staged = torch.from_numpy(words.copy()).pin_memory()
        static = staged.to(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles kernels, which must not happen while recording
            program(static)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = program(static)
        self._pool = self._pool or graph.pool()
        return _Recording(graph, staged, static, outputs)
