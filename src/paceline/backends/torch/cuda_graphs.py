"""Runs programs of fixed shape: on CUDA devices each is captured once as a CUDA graph and then replayed.

A program takes one tensor of 32-bit words, whatever they stand for, and returns tensors on the device. So a run costs
one copy each way, and waits once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from paceline.errors import BackendError
from paceline.types import Int32

Program = Callable[[Tensor], tuple[Tensor, ...]]
"""Takes words [n] int32."""


@dataclass(frozen=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    staged: Tensor  # in page-locked memory of the host, from which copies are asynchronous
    words: Tensor
    outputs: tuple[Tensor, ...]


class Recorder:
    """Programs by key: one key must always stand for the same work.

    What a program returns is in memory that all graphs share: the next run, of any program, may overwrite it.

    Args:
        device: where they run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, _Graph] = {}
        self._pool: Any = None  # one for all: they never run at once

    def run(self, key: Hashable, program: Program, words: Int32) -> tuple[Tensor, ...]:
        """Start a program; it may not be started again before `fetch`."""
        if self._device.type != "cuda":
            with self._supported():
                return program(torch.from_numpy(words).to(self._device))
        with torch.cuda.device(self._device):
            if key not in self._graphs:
                self._graphs[key] = self._capture(program, words)
            graph = self._graphs[key]
            graph.staged.numpy()[:] = words
            graph.words.copy_(graph.staged, non_blocking=True)
            graph.graph.replay()
        return graph.outputs

    def fetch(self, *tensors: Tensor) -> list[NDArray[Any]]:
        """Copies on the host, once everything that was started is done."""
        if self._device.type != "cuda":
            with self._supported():
                return [part.cpu().numpy() for part in tensors]
        copies = [torch.empty_like(part, device="cpu", pin_memory=True) for part in tensors]
        for copy, part in zip(copies, tensors, strict=True):
            copy.copy_(part, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return [copy.numpy() for copy in copies]

    @contextmanager
    def _supported(self) -> Iterator[None]:
        """Explains where PyTorch lacks an operation on a device."""
        try:
            yield
        except NotImplementedError as error:
            first = str(error).splitlines()[0]
            raise BackendError(f"PyTorch cannot run this on {self._device} ({first}); use --device cpu") from error

    def _capture(self, program: Program, words: Int32) -> _Graph:
        staged = torch.from_numpy(words.copy()).pin_memory()
        static = staged.to(self._device)
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles kernels, which must not happen during capture
            program(static)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = program(static)
        self._pool = self._pool or graph.pool()
        return _Graph(graph, staged, static, outputs)
