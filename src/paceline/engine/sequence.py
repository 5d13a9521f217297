"""One request in flight: the only mutable state a request has."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field, replace
from typing import Protocol

from paceline.decode.sampling import Sampling
from paceline.types import Commit, Event, FinishReason, Float32, Piece, Statistics


class TokenDecoder(Protocol):
    """What turns tokens into text as they come, such as `text.detokenizer.Detokenizer`."""

    def push(self, token: int) -> str:
        """The text that became certain with this token."""

    def finish(self) -> str:
        """What was held back."""


@dataclass
class Sequence:
    """Committed tokens, cache position, settings and statistics of one request.

    All tokens but the newest are in the cache once the prompt is read; `hidden` is the target's hidden state at the
    row that produced the newest one, which is where a drafter starts.
    """

    slot: int
    tokens: list[int]  # the prompt, then what was generated
    sampling: Sampling
    draft_tokens: int  # most tokens drafted a round, 0 for plain decoding
    max_tokens: int  # generated tokens at most
    limit: int  # length the cache allows, prompt included
    stop_ids: frozenset[int]
    detokenizer: TokenDecoder
    cached: int = 0  # rows in the cache
    hidden: Float32 | None = None  # [hidden]; None until the prompt is read
    finish: FinishReason | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self._started = time.perf_counter()
        self._first_token = self._started

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.hidden is None

    @property
    def depth(self) -> int:
        """Drafts that can still be of use in the next round: the round's own token is never drafted."""
        if self.reading:
            return 0
        left = min(self.max_tokens - len(self.generated), self.limit - len(self.tokens))
        return max(0, min(self.draft_tokens, left - 1))

    def apply(self, commit: Commit, drafts: Ids[int], hidden: Float32) -> Event:
        """Take over what a verification settled.

        Args:
            commit: accepted drafts and the target's own token.
            drafts: what was drafted, for the statistics.
            hidden: the target's hidden state at the row of the last accepted token.
        """
        first = self.reading
        self.cached += 1 + commit.accepted
        self.hidden = hidden
        pieces = []
        for depth, token in enumerate(commit.tokens, start=1):
            if token in self.stop_ids:
                self.finish = "stop"
                break
            self.tokens.append(token)
            pieces.append(Piece(token, self.detokenizer.push(token), depth if depth <= commit.accepted else 0))
            if len(self.generated) >= self.max_tokens or len(self.tokens) >= self.limit:
                self.finish = "length"
                break
        accepted = sum(piece.depth > 0 for piece in pieces)
        self._count(first, drafts=len(drafts), accepted=accepted, tokens=len(pieces))
        rest = self.detokenizer.finish() if self.finish else ""
        return Event(tuple(pieces), len(drafts), accepted, self.finish, rest)

    def _count(self, first: bool, *, drafts: int, accepted: int, tokens: int) -> None:
        now, old = time.perf_counter(), self.statistics
        if first:
            self._first_token = now
            self.statistics = Statistics(self.prompt_length, now - self._started, tokens)
            return
        by_depth = [*old.accepted_at_depth, *[0] * (drafts - len(old.accepted_at_depth))]
        for depth in range(accepted):
            by_depth[depth] += 1
        self.statistics = replace(
            old,
            tokens=old.tokens + tokens,
            seconds=now - self._first_token,
            rounds=old.rounds + (tokens > 0),
            drafted=old.drafted + drafts,
            accepted=old.accepted + accepted,
            accepted_at_depth=tuple(by_depth),
        )
