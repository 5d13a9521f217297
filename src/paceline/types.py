"""The types that all modules share: work for a backend, its result, sampling parameters, events, statistics.

A chunk of a prompt, a plain decode step and a verification are all a `Work`, so the path through the model exists once.
This module knows nothing of models, files or processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from paceline.sampling_params import GREEDY as GREEDY
from paceline.sampling_params import SamplingParams as SamplingParams

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Draft:
    """What a proposer offers for one round: tokens of its own, or how far the backend's drafter is to go."""

    tokens: tuple[int, ...] = ()  # proposed by the engine: a grammar, n-grams
    length: int = 0  # tokens that the backend's drafter proposes at most; 0 if there are `tokens`
    floors: tuple[float, ...] = ()  # [length]: stop after a token when the draft's chance is below this; empty: never
    acceptance: tuple[float, ...] = ()  # [CONFIDENCE_BINS]: chance of acceptance by the drafter's confidence
    simulated: int | None = None  # for benchmarks only: SIMULATED number of accepted tokens, whatever is sampled


NO_DRAFT = Draft()
CONFIDENCE_BINS = 16  # of equal width, over 0..1
MAX_DRAFT = 15  # tokens of a draft: a verification is at most 16 rows


class Constraint(Protocol):
    """Changes logits by the tokens before them: penalties, biases, a grammar."""

    def apply(self, logits: Float32) -> None:
        """Change the logits [vocabulary] of the next token, in place."""

    def commit(self, token: int) -> None:
        """The next token is this one."""


@dataclass(frozen=True)
class Work:
    """What one sequence runs in a step: a chunk of its prompt, or one round of decoding.

    A round runs the newest token and its draft through the target, samples a token after each row, and accepts the
    longest common prefix of what was drafted and what was sampled. The end of a prompt is a round, too.
    """

    slot: int
    position: int  # of tokens[0]; it must be the length of the slot's KV cache
    tokens: Sequence[int]  # [T] committed tokens that are not in the cache yet; T is 1 while decoding
    params: SamplingParams | None = None  # None: the chunk is not the prompt's last, and nothing is sampled after it
    draft: Draft = NO_DRAFT
    constraint: Constraint | None = None  # asked for one row after the other, up to the first rejected token
    logits: bool = False  # whether the result holds logits


@dataclass(frozen=True)
class Result:
    """What a `Work` gave. The KV cache then holds its tokens and the accepted ones of its draft."""

    sampled: tuple[int, ...] = ()  # [accepted + 1] by the target; empty for a chunk that is not the prompt's last
    drafted: tuple[int, ...] = ()  # [K] by whichever proposer
    confidence: tuple[float, ...] = ()  # [K] the drafter's probability of each of its tokens; empty for others' drafts
    logits: Float32 | None = None  # [accepted + 1, vocabulary] before constraints; only where the work asks for them

    @property
    def accepted(self) -> int:
        """Drafted tokens that the target sampled, too."""
        return max(0, len(self.sampled) - 1)


@dataclass(frozen=True)
class BackendInfo:
    """What a backend is: sizes of a loaded pair, and the device it runs on."""

    vocab_size: int
    context: int  # positions a slot holds
    slots: int  # sequences at once
    max_rows: int  # rows of one slot in one pass at most: the largest prompt chunk
    has_drafter: bool
    stops_early: bool  # whether its drafter stops at the floors of a draft; else it goes to the full length
    quant: str  # weight format of the target
    kv: str  # format of the KV cache
    weight_bytes: int  # of the target's matrices; per-layer-embedding tables that stay in a mapped file do not count
    device: str  # instruction set, or name of the GPU


@dataclass(frozen=True)
class Logprobs:
    """What the target thought of one committed token: logarithms of probabilities after temperature alone."""

    token: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


@dataclass(frozen=True)
class TokenDelta:
    """One committed token and the text that became certain with it (empty inside a multi-byte character)."""

    token: int
    text: str
    depth: int  # 1 for the first drafted token of its round, 2 for the second, ...; 0 for the target's own
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Event:
    """What one round added to one sequence."""

    deltas: tuple[TokenDelta, ...]
    drafted: int
    accepted: int
    finish: FinishReason | None = None
    rest: str = ""  # at the end: text held back for a character that never became whole
    by_drafter: bool = False  # whether the backend's drafter proposed them, and not the engine (grammar, prompt lookup)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas) + self.rest


@dataclass(frozen=True)
class Statistics:
    """Counts and times of one generation."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, from the prefix cache
    queue_seconds: float = 0.0  # until it had a slot
    prompt_seconds: float = 0.0  # until the first token, the time in the queue included
    tokens: int = 0  # tokens generated
    seconds: float = 0.0  # from the first token to the last
    rounds: int = 0  # verification passes after the first token; a plain step counts as one
    drafted: int = 0
    accepted: int = 0
    drafted_by_engine: int = 0  # of the drafted: by a grammar or prompt lookup
    accepted_by_engine: int = 0  # of the accepted, likewise
    accepted_at_depth: tuple[int, ...] = ()  # rounds whose draft at depth 1, 2, ... was accepted

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; the first token belongs to the prompt and is not counted."""
        return (self.tokens - 1) / self.seconds if self.seconds > 0 and self.tokens > 1 else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens per round, the target's own included; 1 for plain decoding."""
        return (self.tokens - 1) / self.rounds if self.rounds else 0.0

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Share of all rounds whose draft at depth 1, 2, ... was accepted; it never rises with depth."""
        return tuple(count / self.rounds for count in self.accepted_at_depth) if self.rounds else ()


@dataclass(frozen=True)
class Generation:
    """A finished generation."""

    text: str
    tokens: tuple[int, ...]
    finish: FinishReason
    statistics: Statistics
    sampling: SamplingParams = GREEDY  # seed included
    logprobs: tuple[Logprobs, ...] = ()  # one a token, if asked for
