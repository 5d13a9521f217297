"""Distillation of a drafter from what was captured of its target.

From positions of each text several draft steps are unrolled on the drafter's own hidden states, with the position and
the visible part of the target's cache held constant, as in decoding. Each step is fitted to the target's distribution
(Kullback-Leibler divergence, and the logarithm of the probability that both distributions share, with which a draft is
accepted), weighted by the chance that decoding reaches it: that the steps before were accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from paceline.checkpoint.names import DRAFT_TOKENS, EMBEDDING, TOKEN_ORDERING
from paceline.config import DrafterConfig, TargetConfig
from paceline.models.drafter import load_drafter
from paceline.train.capture import KINDS, SHARD, Shards
from paceline.train.optimizer import Parameters
from paceline.train.sequences import Cache, DraftRows, PlainWeights
from paceline.train.shape import sources

DEPTH = 4  # draft steps unrolled
GROWTH = 0.3  # share of the training over which they become as many: later ones are of no use before
LEAST_REACH = 0.1  # weight of a step that is hardly ever reached: at first none is, and it must begin somewhere
ACCEPTANCE_WEIGHT = 1.0  # of the logarithm of the probability that a draft is accepted, beside the divergence
LEAST_AGREEMENT = 1e-3  # below, only the divergence leads there
CENTROID_WEIGHT = 0.25  # of the loss of choosing centroids, beside that of tokens
MOST_SCORED = 1 << 15  # tokens that are scored in training; of larger heads the rest is estimated from a sample
LEAST_SAMPLED = 4096


@dataclass(frozen=True)
class Batch:
    """B texts, and A positions in each from which is drafted."""

    positions: Tensor  # [A] of the newest token
    tokens: Tensor  # [B, T] numbers of rows of the embeddings
    lengths: Tensor  # [B]
    states: Tensor  # [B, T, H]
    top_ids: Tensor  # [B, T, K]
    top_logits: Tensor  # [B, T, K]
    rows: dict[str, tuple[Tensor, Tensor]]  # keys and values by kind, [B, kv_heads, T, head_dim]
    depth: int = DEPTH  # steps to unroll

    def numel(self) -> int:
        """Positions that lie within their texts."""
        return int((self.positions < self.lengths[:, None]).sum())

    def to(self, device: str, dtype: torch.dtype) -> Self:
        rows = {kind: (k.to(device, dtype), v.to(device, dtype)) for kind, (k, v) in self.rows.items()}
        return type(self)(
            positions=self.positions.to(device),
            tokens=self.tokens.to(device),
            lengths=self.lengths.to(device),
            states=self.states.to(device, dtype),
            top_ids=self.top_ids.to(device),
            top_logits=self.top_logits.to(device).float(),
            rows=rows,
            depth=self.depth,
        )


@dataclass(frozen=True)
class Data:
    """Batches of captured texts.

    Args:
        shards: where they are.
        count: of shards.
        seed: of the choice.
        embeddings: what tokens are to the target [n, H].
        numbers: the tokens of those rows [n], ascending.
    """

    shards: Shards
    count: int
    seed: int
    embeddings: Tensor
    numbers: Tensor

    @classmethod
    def open(cls, shards: Shards, count: int, seed: int = 0) -> Self:
        """With the embeddings beside the shards."""
        file = load_file(embeddings_path(shards.folder))
        return cls(shards, count, seed, file["embeddings"], file["tokens"])

    def batch(self, step: int, texts: int, positions: int, share: float = 1.0) -> Batch:
        """Texts of training prompts, by the number of the step and the share of the training that is done."""
        dice = np.random.default_rng((self.seed, step))
        shard = int(dice.integers(self.count))
        rows = sorted(dice.choice(SHARD - 1, min(texts, SHARD - 1), replace=False))
        depth = min(DEPTH, 1 + int((DEPTH - 1) * share / GROWTH))
        return replace(self._read(shard, rows, positions, dice), depth=depth)

    def held_out(self, positions: int) -> Iterator[Batch]:
        """The text of a held-out prompt of each shard."""
        for shard in range(self.count):
            yield self._read(shard, [SHARD - 1], positions, np.random.default_rng((self.seed, 1, shard)))

    def _read(self, shard: int, rows: Sequence[int], positions: int, dice: np.random.Generator) -> Batch:
        found = self.shards.read(shard, rows)
        longest = max(2, int(found["lengths"].max()))
        chosen = torch.from_numpy(1 + dice.permutation(longest - 1)[:positions]).sort().values
        cut = {name: x[:, :longest] for name, x in found.items() if name in ("tokens", "states", "top_ids")}
        return Batch(
            positions=chosen,
            tokens=torch.searchsorted(self.numbers, cut["tokens"].contiguous()),
            lengths=found["lengths"],
            states=cut["states"],
            top_ids=cut["top_ids"].long(),
            top_logits=found["top_logits"][:, :longest],
            rows={
                kind: (found[f"{kind}.keys"][:, :, :longest], found[f"{kind}.values"][:, :, :longest]) for kind in KINDS
            },
        )


def embeddings_path(folder: Path) -> Path:
    """Of what the captured tokens are to the target: `embeddings` [n, H], bfloat16, and `tokens` [n], ascending."""
    return folder / "embeddings.safetensors"


class DraftStep(NamedTuple):
    """One of the steps unrolled from [B, A] positions."""

    loss: Tensor  # [B, A] nats
    agreement: Tensor  # [B, A] probability that target and drafter share
    seen: Tensor  # [B, A] whether the text goes so far


@dataclass(frozen=True)
class Distillation:
    """The loss of a drafter with these settings."""

    config: DrafterConfig
    target: TargetConfig
    embeddings: Tensor  # [n, H]

    def loss(self, weights: Parameters, batch: Batch) -> Tensor:
        """Mean nats of a step."""
        total = weight = torch.zeros((), device=batch.positions.device)
        reach = torch.ones((), device=batch.positions.device)
        for step in self.steps(weights, batch):
            share = step.seen * reach.clamp(min=LEAST_REACH)
            total = total + (share * step.loss).sum()
            weight = weight + share.sum()
            reach = reach * step.agreement.detach()
        return total / weight.clamp(min=1)

    @torch.no_grad()
    def agreement(self, weights: Parameters, batch: Batch) -> tuple[Tensor, Tensor]:
        """[DEPTH] sums of the probability that a step and all before it are accepted, and how many were summed up."""
        sums, counts, reach = [], [], torch.ones((), device=batch.positions.device)
        for step in self.steps(weights, batch):
            reach = reach * step.agreement
            sums.append((step.seen * reach).sum())
            counts.append(step.seen.sum())
        return torch.stack(sums), torch.stack(counts)

    def steps(self, weights: Parameters, batch: Batch) -> Iterator[DraftStep]:
        """The steps unrolled from a batch's positions, on the tokens of the texts."""
        drafter = load_drafter(self.config, self.target, PlainWeights(weights))
        layers = dict(zip(KINDS, sources(self.target), strict=True))
        cache = Cache(batch.tokens.shape[1], {layer: batch.rows[kind] for kind, layer in layers.items()})
        rows = DraftRows(drafter, cache, batch.positions, len(batch.tokens))
        feedback = batch.states[:, batch.positions - 1]
        scored, estimate = self._scored(weights, batch)
        head = weights[EMBEDDING] if scored.head is None else weights[EMBEDDING][scored.head]
        last = batch.tokens.shape[1] - 1
        for step in range(batch.depth):
            newest = (batch.positions + step).clamp(max=last)  # what is beyond the texts does not count
            state, feedback = rows.step(self.embeddings[batch.tokens[:, newest]].to(feedback.dtype), feedback)
            ids = batch.top_ids[:, newest]  # [B, A, K]
            expected = batch.top_logits[:, newest].softmax(-1)
            scores = F.linear(state, head).float() + estimate
            shares = scores.log_softmax(-1)
            column = scored.columns[ids]
            found = shares.gather(-1, column.clamp(min=0)).masked_fill(column < 0, -torch.inf)  # [B, A, K]
            loss = (expected * (expected.clamp(min=1e-9).log() - found)).masked_fill(column < 0, 0.0).sum(-1)
            if self.config.centroids:
                loss = loss + CENTROID_WEIGHT * self._centroid_loss(weights, state, ids, expected)
            agreement = torch.minimum(expected, found.exp()).sum(-1)
            loss = loss - ACCEPTANCE_WEIGHT * agreement.clamp(min=LEAST_AGREEMENT).log()
            yield DraftStep(loss, agreement, batch.positions + step < batch.lengths[:, None])

    def _centroid_loss(self, weights: Parameters, state: Tensor, ids: Tensor, expected: Tensor) -> Tensor:
        scores = F.linear(state, weights["masked_embedding.centroids.weight"]).float().log_softmax(-1)
        centroid_of = torch.empty_like(weights[TOKEN_ORDERING], dtype=torch.long)
        size = len(centroid_of) // self.config.centroids
        centroid_of[weights[TOKEN_ORDERING].long()] = torch.arange(len(centroid_of), device=ids.device) // size
        return -(expected * scores.gather(-1, centroid_of[ids])).sum(-1)

    def _scored(self, weights: Parameters, batch: Batch) -> tuple[Scored, Tensor | float]:
        """Which rows of the head are scored, and what is added to their logits so that all others count, too."""
        count, device = self.config.draft_vocab_size, batch.top_ids.device
        columns = torch.full((self.config.vocab_size,), -1, device=device)
        tokens = weights[DRAFT_TOKENS].long() if self.config.restricted else torch.arange(count, device=device)
        if count <= MOST_SCORED:
            columns[tokens] = torch.arange(count, device=device)
            return Scored(None, columns), 0.0
        newest = batch.positions[:, None] + torch.arange(batch.depth, device=device)
        newest = torch.unique(newest.clamp(max=batch.tokens.shape[1] - 1))
        wanted = torch.unique(batch.top_ids[:, newest])
        generator = torch.Generator().manual_seed(int(batch.positions.sum()))
        row_of = columns.clone()
        row_of[tokens] = torch.arange(count, device=device)
        wanted = row_of[wanted][row_of[wanted] >= 0]
        others = torch.ones(count, dtype=torch.bool, device=device)
        others[wanted] = False
        others_rows = others.nonzero()[:, 0]
        picked = torch.randperm(len(others_rows), generator=generator)[: max(LEAST_SAMPLED, MOST_SCORED - len(wanted))]
        head = torch.cat((wanted, others_rows[picked.to(device)]))
        columns[tokens[head]] = torch.arange(len(head), device=device)
        estimate = torch.zeros(len(head), device=device)
        estimate[len(wanted) :] = np.log(len(others_rows) / max(1, len(picked)))  # each stands for so many
        return Scored(head, columns), estimate


class Scored(NamedTuple):
    """Rows of the head that are scored."""

    head: Tensor | None  # [n] their numbers; None: all
    columns: Tensor  # [vocabulary] where a token is among them; -1: it is not
