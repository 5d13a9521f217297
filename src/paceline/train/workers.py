"""Threads that each run whole single-threaded jobs.

Splitting a batch over threads needs one barrier a step. PyTorch's own threads need one for each operation, which is
slow as soon as another program uses a core.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


class Workers:
    """A fixed number of threads, in each of which PyTorch itself uses `each` threads."""

    def __init__(self, count: int | None = None, each: int = 1) -> None:
        self.count = count or os.cpu_count() or 1
        torch.set_num_threads(each)
        self._pool = ThreadPoolExecutor(self.count, initializer=torch.set_num_threads, initargs=(each,))

    def run(self, jobs: Sequence[Callable[[], Result]], *, together: bool = True) -> list[Result]:
        """Run all jobs and return their results in order; one after the other if not `together` (the first call may
        compile)."""
        if together:
            return [future.result() for future in [self._pool.submit(job) for job in jobs]]
        return [self._pool.submit(job).result() for job in jobs]
