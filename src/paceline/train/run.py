"""A training run: replicas of a model on threads, boxed in time, resumed from where it was stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from paceline.train.optimizer import Optimizer, Parameters
from paceline.train.progress import Progress
from paceline.train.workers import Workers

SAVE_EVERY = 60.0  # seconds of training
LEAST_SAVES = 20  # of a run, however short
SAVE_SHARE = 0.05  # of the time, at most


class Examples(Protocol):
    """What a loss is the mean over."""

    def numel(self) -> int: ...


Batch = TypeVar("Batch", bound=Examples)


@dataclass(frozen=True)
class Step:
    """What has been done after a step."""

    number: int
    seconds: float  # of training
    total: float  # seconds that it will take
    tokens: int
    loss: float  # mean of the last ones

    def __str__(self) -> str:
        rate = self.tokens / max(self.seconds, 1e-9)
        share = self.seconds / self.total
        return f"step {self.number} share {share:.3f} loss {self.loss:.4f} tokens/s {rate:.0f}"


@dataclass(frozen=True)
class Run(Generic[Batch]):
    """One training run; the schedule is a function of the share of `minutes` spent.

    Args:
        path: of the training state.
        minutes: of training.
        workers: threads, each with a replica.
        decay: of the weights that Muon steps.
        rate: factor of all steps.
        dtype: of the replicas.
        device: of the replicas.
        compiled: whether the loss is compiled, which needs a C++ compiler and gains on small models.
        report: receives each step.
        examine: measures the weights; what it gives is kept in the state at every save.
    """

    path: Path
    minutes: float
    workers: Workers
    decay: float = 0.0
    rate: float = 1.0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    compiled: bool = False
    report: Callable[[Step], None] = lambda _: None
    examine: Callable[[Parameters], dict[str, Any]] | None = None

    def train(
        self,
        weights: Parameters,
        loss: Callable[[Parameters, Batch], Tensor],
        batch: Callable[[float, int], Sequence[Batch]],
    ) -> Parameters:
        """Train, or resume; returns the weights in the replicas' dtype.

        Args:
            weights: the first ones.
            loss: mean over a part.
            batch: at most a part for each worker, by the share of the time and the number of the step.
        """
        replicas = [replica(weights, self.dtype, self.device) for _ in range(self.workers.count)]
        optimizer = Optimizer(replicas, self.workers, self.decay)
        progress = Progress.resume(self.path, optimizer)
        compiled = torch.compile(loss, dynamic=False, fullgraph=True) if self.compiled else loss
        sizes: set[int] = set()  # of batches that the loss was compiled for
        losses: deque[float] = deque(maxlen=50)
        total = 60 * self.minutes
        every = min(SAVE_EVERY, total / LEAST_SAVES)
        while progress.seconds < total:
            tick = time.monotonic()
            share = progress.seconds / total
            parts = batch(share, optimizer.steps)
            count = sum(part.numel() for part in parts)

            def backward(weights: Parameters, part: Batch, count: int = count) -> float:
                value = compiled(weights, part) * (part.numel() / count)
                value.backward()  # type: ignore[no-untyped-call]
                return float(value.item())

            jobs = [partial(backward, *pair) for pair in zip(replicas, parts, strict=False)]
            losses.append(sum(self.workers.run(jobs, together=not self.compiled or count in sizes)))
            sizes.add(count)
            optimizer.step(self.rate * schedule(share, optimizer.steps))
            progress.seconds += time.monotonic() - tick
            progress.tokens += count
            self.report(Step(optimizer.steps, progress.seconds, total, progress.tokens, fmean(losses)))
            if progress.seconds - progress.saved > every:
                every = max(every, self._save(progress, optimizer, replicas[0], losses) / SAVE_SHARE)
        if not progress.history or progress.saved < progress.seconds:
            self._save(progress, optimizer, replicas[0], losses)
        return replicas[0]

    def _save(self, progress: Progress, optimizer: Optimizer, weights: Parameters, losses: deque[float]) -> float:
        """Examine and save, which takes no time of the training; returns the seconds that it took."""
        began = time.monotonic()
        found = {"seconds": progress.seconds, "loss": fmean(losses) if losses else None}
        progress.history.append(found | (self.examine(weights) if self.examine else {}))
        progress.save(optimizer)
        return time.monotonic() - began


def replica(weights: Parameters, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Parameters:
    """A copy in a type, whose floating-point tensors are leaves of the gradient."""
    copies = {name: w.to(device, dtype if w.is_floating_point() else w.dtype) for name, w in weights.items()}
    return {name: w.detach().clone().requires_grad_(w.is_floating_point()) for name, w in copies.items()}


def schedule(share: float, step: int, warm_up: int = 20, final_share: float = 0.5) -> float:
    """Linear warm-up, a plateau, then linear to zero over the last `final_share` of the run."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (1 - share) / final_share))
