"""Muon for the matrices, Adam for everything else, on bfloat16 weights with float32 masters.

Muon replaces each matrix's momentum by the nearest orthogonal matrix, found by a few Newton-Schulz steps: K. Jordan et
al., "Muon: An optimizer for hidden layers in neural networks" (2024). Same-shaped matrices are treated as one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from paceline.train.workers import Workers

Parameters = dict[str, Tensor]
"""A model's weights by canonical name; those that are trained are leaves of the gradient."""

MUON_RATE, ADAM_RATE = 0.02, 0.004
MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)


class Optimizer:
    """Steps the parameters of a model's replicas, whose gradients are summed.

    Muon steps the matrices inside decoder layers, Adam everything else (tables, norms, scalars, heads).
    """

    def __init__(self, replicas: Sequence[Parameters], workers: Workers, decay: float) -> None:
        self.workers, self.decay = workers, decay
        self.parameters = [{n: p for n, p in replica.items() if p.requires_grad} for replica in replicas]
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters[0].items()}
        self.first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name, master in self.masters.items():
            if master.dim() == 2 and "layers." in name:
                groups[tuple(master.shape)].append(name)
        self.muon_groups = list(groups.values())
        muon = {name for group in self.muon_groups for name in group}
        self.adam_names = [name for name in self.masters if name not in muon]
        self.second = {name: torch.zeros_like(self.masters[name]) for name in self.adam_names}
        self.steps = 0
        self._dtype = next(iter(self.parameters[0].values())).dtype

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Apply the gradients once, at `factor` times the base rates, and clear them."""
        self.steps += 1
        jobs = [lambda names=names: self._muon(names, factor * MUON_RATE) for names in self.muon_groups]
        jobs += [lambda name=name: self._adam(name, factor * ADAM_RATE) for name in self.adam_names]
        self.workers.run(jobs)
        self._publish()

    def _publish(self) -> None:
        for parameters in self.parameters:
            for name, parameter in parameters.items():
                parameter.copy_(self.masters[name])
                parameter.grad = None

    @torch.no_grad()
    def _muon(self, names: list[str], rate: float) -> None:
        updates = []
        for name in names:
            gradient, momentum = self._gradient(name), self.first[name]
            momentum.lerp_(gradient, 1 - MUON_MOMENTUM)
            updates.append(gradient.lerp(momentum, MUON_MOMENTUM))
        rows, columns = updates[0].shape
        directions = orthogonal(torch.stack(updates), self._dtype) * max(1.0, rows / columns) ** 0.5
        for name, direction in zip(names, directions, strict=True):
            self.masters[name].mul_(1 - rate * self.decay).sub_(direction.float(), alpha=rate)

    @torch.no_grad()
    def _adam(self, name: str, rate: float) -> None:
        gradient, (beta1, beta2) = self._gradient(name), ADAM_BETAS
        self.first[name].lerp_(gradient, 1 - beta1)
        self.second[name].lerp_(gradient.square(), 1 - beta2)
        mean = self.first[name] / (1 - beta1**self.steps)
        variance = self.second[name] / (1 - beta2**self.steps)
        self.masters[name].sub_(mean / (variance.sqrt() + 1e-8), alpha=rate)

    def _gradient(self, name: str) -> Tensor:
        total = torch.zeros_like(self.masters[name])
        for parameters in self.parameters:
            gradient = parameters[name].grad
            if gradient is not None:
                total += gradient
        return total

    def state(self) -> dict[str, Any]:
        return {"masters": self.masters, "first": self.first, "second": self.second, "steps": self.steps}

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        for mine, kept in ((self.masters, "masters"), (self.first, "first"), (self.second, "second")):
            for name, tensor in mine.items():
                tensor.copy_(state[kept][name])  # from whatever device
        self.steps = state["steps"]
        self._publish()


def orthogonal(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Approximately U V^T of each matrix [N, rows, columns], by five quintic Newton-Schulz steps, in a type."""
    x: Tensor = matrices.to(dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
