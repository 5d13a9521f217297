"""Whole sequences through a model, densely and differentiably: for training, and as a reference for tests.

B is a batch of sequences of one length, T the new rows of each, S all rows in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from paceline.models import drafter as drafters
from paceline.models import gemma4, ops
from paceline.models.drafter import Drafter
from paceline.models.gemma4 import Block, Target
from paceline.models.matrix import PLAIN, Matrix

FORMAT_OF = {dtype: name for name, dtype in PLAIN.items()}


@dataclass(frozen=True)
class PlainWeights:
    """Weights as tensors by canonical name, perhaps the leaves of a gradient; see `gemma4.TensorSource`."""

    tensors: Mapping[str, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["norm.weight"].dtype

    def matrix(self, *names: str, precise: bool = False) -> Matrix:
        parts = [self.tensors[name].flatten(0, -2) for name in names]
        return Matrix(torch.cat(parts) if len(parts) > 1 else parts[0], None, FORMAT_OF[parts[0].dtype])

    def table(self, name: str) -> Matrix:
        return self.matrix(name)

    def in_bf16(self, name: str) -> bool:
        return self.tensors[name].dtype == torch.bfloat16

    def vector(self, name: str) -> Tensor:
        return self.tensors[name]


@dataclass
class Cache:
    """Keys and values of B sequences of one length; a smaller length rolls back. Sliding layers keep all rows, too."""

    length: int = 0
    rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # per layer [B, kv_heads, S, head_dim]


@dataclass(frozen=True)
class Dense:
    """B sequences' rows of one pass over a cache, M = B * T; see `gemma4.KeysValues`."""

    cache: Cache
    last: Tensor  # [M]
    batch: int  # B

    def heads(self, block: Block, x: Tensor, angles: tuple[Tensor, Tensor], heads: int, eps: float) -> Tensor:
        queries, keys, values = ops.split_heads(
            x, block.query_norm, block.key_norm, *angles, heads, block.layer.kv_heads, eps, block.value_norm
        )
        if keys is not None and values is not None:
            keys, values = (part.view(self.batch, -1, *part.shape[1:]).transpose(1, 2) for part in (keys, values))
            if self.cache.length:
                old = [part[:, :, : self.cache.length] for part in self.cache.rows[block.kv_source]]
                keys, values = torch.cat((old[0], keys), 2), torch.cat((old[1], values), 2)
            self.cache.rows[block.kv_source] = keys, values
        return queries.flatten(1)

    def attend(self, block: Block, queries: Tensor, window: int) -> Tensor:
        keys, values = self.cache.rows[block.kv_source]  # [B, kv_heads, S, head_dim]
        last = self.last[: len(self.last) // self.batch, None]  # [T, 1]
        place = torch.arange(keys.shape[2], device=last.device)  # [S]
        seen = (place <= last) & (place > last - window)
        queries = queries.view(self.batch, len(last), -1, keys.shape[3]).transpose(1, 2)
        return ops.mix(queries, keys, values, seen).flatten(0, 1)

    def picked(self, numbers: Tensor) -> Self:
        raise NotImplementedError("all rows of a sequence are computed")


def states(target: Target, tokens: Tensor, cache: Cache | None = None) -> Tensor:
    """Run `tokens` [B, T] after the rows in `cache`, and add theirs: states [B, T, H] after the final norm."""
    cache = Cache() if cache is None else cache
    batch, count = tokens.shape
    positions = torch.arange(cache.length, cache.length + count, device=tokens.device).repeat(batch)
    out = gemma4.run(target, ops, tokens.flatten(), Dense(cache, positions, batch))
    cache.length += count
    return out.view(batch, count, -1)


@dataclass(frozen=True)
class DraftRows:
    """Rows that draft: A of each of B sequences, and the target's cache as they see it in every step.

    Args:
        drafter: weights.
        cache: the target's; it may hold rows that are not visible.
        positions: [A] of the rows.
        batch: B.
    """

    drafter: Drafter
    cache: Cache
    positions: Tensor
    batch: int = 1

    def step(self, embedding: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """One draft step, [B, A, backbone] twice; see `drafter.step`: [B, A, H] and [B, A, backbone]."""
        positions = self.positions.repeat(self.batch)
        kv = Dense(self.cache, positions - 1, self.batch)
        angles = gemma4.angles_of(self.drafter.decoder, positions, embedding.dtype)
        out = drafters.step(self.drafter, ops, embedding.flatten(0, 1), hidden.flatten(0, 1), kv, angles)
        return out[0].view(*embedding.shape[:2], -1), out[1].view(embedding.shape)


@torch.no_grad()
def draft(
    target: Target, drafter: Drafter, cache: Cache, token: int, hidden: Tensor, depth: int
) -> tuple[list[int], list[float]]:
    """Draft `depth` tokens after `token`, which stands after the rows in `cache`.

    `hidden` [backbone] is the target's state that `token` was sampled from. Returns the tokens and the drafter's
    probability of each.
    """
    rows = DraftRows(drafter, cache, torch.tensor([cache.length]))
    hidden = hidden.view(1, 1, -1)
    tokens, confidence = [], []
    for _ in range(depth):
        state, hidden = rows.step(gemma4.embed(target, torch.tensor([token]))[None], hidden)
        shares = drafters.logits(drafter, ops, state[0], rows.positions)[0].softmax(-1)
        token = int(shares.argmax())
        tokens.append(token)
        confidence.append(float(shares[token]))
    return tokens, confidence
