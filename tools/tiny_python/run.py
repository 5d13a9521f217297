"""A training run: replicas of a model on threads, boxed in time, resumed from where it was stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from tools.tiny_python.checkpoint import Progress
from tools.tiny_python.optimizer import Optimizer, Parameters
from tools.tiny_python.workers import Workers
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """One training run; the schedule is a function of the share of `minutes` spent.

    Args:
        path: of the training state.
        minutes: of training.
        workers: threads, each with a replica.
        decay: of the weights that Muon steps.
        report: receives a line every 20 steps.
    """

    path: Path
    minutes: float
    workers: Workers
    decay: float = 0.0
    report: Callable[[str], None] = print

    def train(
        self,
        weights: Parameters,
        loss: Callable[[Parameters, Tensor], Tensor],
        batch: Callable[[float, int], Tensor],
    ) -> Parameters:
        """Train, or resume; returns the weights in bfloat16.

        Args:
            weights: the first ones.
            loss: mean over some of a batch's sequences.
            batch: tokens [sequences, T], by the share of the time and the number of the step.
        """
        replicas = [replica(weights) for _ in range(self.workers.count)]
        optimizer = Optimizer(replicas, self.workers, self.decay)
        progress = Progress.resume(self.path, optimizer)
        compiled = torch.compile(loss, dynamic=False, fullgraph=True)
        shapes: set[torch.Size] = set()  # of batches that the loss was compiled for
        losses: deque[float] = deque(maxlen=50)
        while progress.seconds < 60 * self.minutes:
            tick = time.monotonic()
            share = progress.seconds / (60 * self.minutes)
            tokens = batch(share, optimizer.steps)

            def backward(weights: Parameters, part: Tensor, sequences: int = len(tokens)) -> float:
                value = compiled(weights, part) * (len(part) / sequences)
                value.backward()  # type: ignore[no-untyped-call]
                return value.item()

            parts = tokens.chunk(self.workers.count)
            jobs = [partial(backward, *pair) for pair in zip(replicas, parts, strict=False)]
            losses.append(sum(self.workers.run(jobs, together=tokens.shape in shapes)))
            shapes.add(tokens.shape)
            optimizer.step(schedule(share, optimizer.steps))
            progress.advance(time.monotonic() - tick, tokens.numel(), optimizer)
            if optimizer.steps % 20 == 0:
                rate = progress.tokens / progress.seconds
                self.report(f"step {optimizer.steps} share {share:.3f} loss {fmean(losses):.4f} tokens/s {rate:.0f}")
        progress.save(optimizer)
        return replicas[0]


def replica(weights: Parameters) -> Parameters:
    """A copy in bfloat16, whose floating-point tensors are leaves of the gradient."""
    copies = {name: w.bfloat16() if w.is_floating_point() else w for name, w in weights.items()}
    return {name: w.requires_grad_(w.is_floating_point()) for name, w in copies.items()}


def schedule(share: float, step: int, warm_up: int = 20, final_share: float = 0.5) -> float:
    """Linear warm-up, a plateau, then linear to zero over the last `final_share` of the run."""
    return min(1.0, (step + 1) / warm_up, max(0.0, (1 - share) / final_share))
