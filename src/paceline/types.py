"""The nouns that every room shares: rows to run, what came out, what was drafted, what was committed.

A prompt chunk, a plain decode step and a verification are the same thing, a `Batch` of rows, so the path through the
model exists once. This module knows nothing of models, files or processors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Batch:
    """A ragged set of R rows to run through the target in one pass.

    The rows of a slot stand together with ascending, adjacent positions; the first continues the slot's cache. A row
    sees its slot's cache up to and including its own position.
    """

    slots: Int32  # [R] which cache each row belongs to
    positions: Int32  # [R] absolute position in the sequence, from 0
    tokens: Int32  # [R] token ids; negative for one of the last drafts that is not known yet, see `Drafts`
    wanted: Bool  # [R] rows whose logits and hidden state are needed
    samplings: tuple[Sampling, ...] = ()  # [W] how the token behind each wanted row is likely to be drawn

    def __len__(self) -> int:
        return len(self.tokens)


class Row(Protocol):
    """Logits [vocabulary] of one row: an array, or what `numpy.asarray` fetches from a device."""

    def __len__(self) -> int: ...
    def copy(self) -> Float32: ...


class Rows(Protocol):
    """Logits [W, vocabulary] of W rows."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Row]: ...
    @overload
    def __getitem__(self, rows: int) -> Row: ...
    @overload
    def __getitem__(self, rows: slice) -> Rows: ...


@dataclass(frozen=True)
class Output:
    """What a forward pass gives for the W wanted rows of its batch, in batch order."""

    logits: Rows  # [W, vocabulary] after the soft cap
    hidden: Float32  # [W, hidden] after the final norm: what the drafter continues from


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from the target's logits. The default is greedy decoding.

    A token's noise is a pure function of seed, position and token id, so equal settings give equal text. Penalties and
    bias come first, then temperature, then top-k, top-p of what top-k left, and min-p.
    """

    temperature: float = 0.0  # 0: always the most likely token
    top_k: int = 0  # only the k most likely tokens; 0: all
    top_p: float = 1.0  # only the fewest most likely tokens whose probabilities sum to this; 1: all
    min_p: float = 0.0  # only tokens at least this likely compared with the most likely one; 0: all
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of tokens in the prompt or the text
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the text
    frequency_penalty: float = 0.0  # the same for each time they occur in it
    bias: tuple[tuple[int, float], ...] = ()  # added to the logits of these tokens
    suppressed: tuple[int, ...] = ()  # tokens that are never drawn
    seed: int | None = None  # 0 to 2^64 - 1; None: a new one for each generation


GREEDY = Sampling()


@dataclass(frozen=True)
class Plan:
    """How far to draft in one round."""

    depth: int  # drafts at most
    floors: tuple[float, ...] = ()  # [depth]: stop behind a depth when the line's chance is below this; empty: never
    acceptance: tuple[float, ...] = ()  # [CONFIDENCE_BINS]: chance of a draft by the drafter's confidence


CONFIDENCE_BINS = 16  # of equal width, over 0..1


@dataclass(frozen=True)
class Anchors:
    """Where A sequences stand at the start of a round: each one's newest token, which is not in the cache yet."""

    slots: Int32  # [A]
    positions: Int32  # [A] position P of the newest token; the drafter sees cache rows below P
    tokens: Int32  # [A] the newest token
    hidden: Float32  # [A, hidden] the target's hidden state at the row that produced it (position P - 1)
    samplings: tuple[Sampling, ...]  # [A] how drafts are drawn: as the target draws, but for penalties and bias
    plans: tuple[Plan, ...]  # [A]
    streams: tuple[int, ...]  # [A] of the noise: 0 is the target's own
    with_logits: bool = False


@dataclass(frozen=True)
class Drafts:
    """Up to K guesses for each of A anchors, K being the depth of the deepest plan.

    A device need not wait for its guesses: it may return negative stand-ins, which the next batch takes in the place of
    tokens. What they stood for is then said by `settled`.
    """

    tokens: Int32  # [A, K]
    confidence: Float32  # [A, K] the drafter's probability of its guess among those it could have drawn, in 0..1
    lengths: Int32  # [A] guesses made; what stands behind them is void
    logits: Float32 | None = None  # [A, K, vocabulary], -3e38 where the drafter did not look; only if asked for
    later: Callable[[], Drafts] | None = None  # waits for the guesses that stand-ins stand for

    def settled(self) -> Drafts:
        """The guesses themselves."""
        return self.later() if self.later else self


@dataclass(frozen=True)
class Line:
    """What was drafted for one sequence: K tokens, by the drafter or because a grammar leaves nothing else."""

    tokens: tuple[int, ...] = ()
    confidence: tuple[float, ...] = ()
    logits: Float32 | None = None  # [K, vocabulary]
    forced: bool = False  # by a grammar: says nothing of the drafter


@dataclass(frozen=True)
class Logprobs:
    """What the target thought of one committed token: logarithms of probabilities after temperature alone."""

    token: float
    top: tuple[tuple[int, float], ...]  # the most likely tokens, best first


@dataclass(frozen=True)
class Commit:
    """What a verification settled for one sequence: the accepted drafts and then one token of the target's own."""

    tokens: tuple[int, ...]
    accepted: int  # how many of them were drafted; always len(tokens) - 1
    logprobs: tuple[Logprobs, ...] = ()  # one a token, if asked for


@dataclass(frozen=True)
class Piece:
    """One committed token and the text that became certain with it (empty inside a multi-byte character)."""

    token: int
    text: str
    depth: int  # 1 for the first drafted token of its round, 2 for the second, ...; 0 for the target's own
    logprobs: Logprobs | None = None


@dataclass(frozen=True)
class Event:
    """What one round added to one sequence."""

    pieces: tuple[Piece, ...]
    drafted: int
    accepted: int
    finish: FinishReason | None = None
    rest: str = ""  # at the end: text held back for a character that never became whole

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces) + self.rest


@dataclass(frozen=True)
class Statistics:
    """Counts and times of one generation."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt: not read, but taken from what earlier prompts left
    queue_seconds: float = 0.0  # until it had a slot
    prompt_seconds: float = 0.0  # until the first token, the time in the queue included
    tokens: int = 0  # tokens generated
    seconds: float = 0.0  # from the first token to the last
    rounds: int = 0  # verification passes after the first token; a plain step counts as one
    drafted: int = 0
    accepted: int = 0
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
    sampling: Sampling = GREEDY  # what it was drawn with, seed included
    logprobs: tuple[Logprobs, ...] = ()  # one a token, if asked for
