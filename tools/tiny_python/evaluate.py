"""Figures on files that neither tokenizer nor models have seen: loss, and acceptance in a plain decoding loop."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tools.tiny_python.tokenizer import BOS
from torch.nn import functional as F

from paceline.models import ops
from paceline.models.drafter import Drafter
from paceline.models.gemma4 import Target, logits
from paceline.train.sequences import Cache, draft, states


@dataclass(frozen=True)
class Loss:
    nats_per_token: float
    bits_per_byte: float
    tokens: int


@dataclass(frozen=True)
class Acceptance:
    """Greedy decoding of several prompts with a fixed number of drafts."""

    tokens: int
    rounds: int
    accepted_at_depth: tuple[int, ...]

    @property
    def length(self) -> float:
        """Tokens per round, the target's own included."""
        return self.tokens / self.rounds

    def __str__(self) -> str:
        """Share of all rounds whose draft at depth 1, 2, ... was accepted."""
        return ", ".join(f"{count / self.rounds:.2f}" for count in self.accepted_at_depth)


@torch.no_grad()
def held_out_loss(target: Target, tokenizer: Tokenizer, files: dict[str, str], length: int = 1024) -> Loss:
    """Every file in stretches of `length` tokens, each after `<bos>`; bytes are those of the tokens predicted."""
    nats, count, size = 0.0, 0, 0
    for text in files.values():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        size += len(text.encode())
        for start in range(0, len(ids), length):
            row = torch.tensor([[BOS, *ids[start : start + length]]])
            scores = logits(target, ops, states(target, row[:, :-1])[0])
            nats += F.cross_entropy(scores, row[0, 1:], reduction="sum").item()
            count += row.shape[1] - 1
    return Loss(nats / count, nats / math.log(2) / size, count)


def held_out_prompts(tokenizer: Tokenizer, files: dict[str, str], per_file: int, length: int) -> list[list[int]]:
    """`<bos>` and `length` tokens from evenly spaced places of every file that is long enough."""
    prompts = []
    for text in files.values():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ends = [len(ids) * (i + 1) // (per_file + 1) for i in range(per_file)]
        prompts += [[BOS, *ids[end - length : end]] for end in ends if end >= length]
    return prompts


@torch.no_grad()
def greedy(
    target: Target, drafter: Drafter | None, prompt: list[int], count: int, depth: int
) -> tuple[list[int], Acceptance]:
    """Generate at least `count` tokens by draft, verify, accept, roll back; without a drafter one at a time.

    A reference for the engine's round: one sequence, arg max, no stop tokens.
    """
    cache = Cache()
    hidden = states(target, torch.tensor([prompt]), cache)[0, -1]
    tokens = [int(logits(target, ops, hidden[None]).argmax())]
    rounds, at_depth = 0, [0] * depth
    while len(tokens) < count:
        drafted = draft(target, drafter, cache, tokens[-1], hidden, depth)[0] if drafter else []
        start = cache.length
        rows = states(target, torch.tensor([[tokens[-1], *drafted]]), cache)[0]
        chosen = logits(target, ops, rows).argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(drafted) if token != chosen[i]), len(drafted))
        tokens += chosen[: accepted + 1]
        hidden = rows[accepted]
        cache.length = start + accepted + 1
        rounds += 1
        for i in range(accepted):
            at_depth[i] += 1
    return tokens, Acceptance(len(tokens) - 1, rounds, tuple(at_depth))


def acceptance(target: Target, drafter: Drafter, prompts: list[list[int]], count: int, depth: int = 4) -> Acceptance:
    """Sum over `count` greedy tokens after each prompt; with a count of 2 that is the first round of each."""
    parts = [greedy(target, drafter, prompt, count, depth)[1] for prompt in prompts]
    at_depth = tuple(sum(part.accepted_at_depth[i] for part in parts) for i in range(depth))
    return Acceptance(sum(p.tokens for p in parts), sum(p.rounds for p in parts), at_depth)
