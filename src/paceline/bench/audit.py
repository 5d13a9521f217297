"""The audit of a pair: is the text the same, bit for bit, however it is decoded, and does drafting pay as it should?

Every prompt is decoded plainly, which is the reference, and then with several draft lengths, another number of threads
and small prompt chunks. Every row of logits that a token was sampled from is compared with the reference's by its bits,
and so are the tokens and the text. The engine is driven as users drive it; a tap on the sequence sees the results.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np

from paceline.engine.engine import DraftTokens, Engine
from paceline.engine.scheduler import Scheduler
from paceline.errors import ContextError
from paceline.types import GREEDY, FinishReason, Float32, Result, SamplingParams, Statistics

PROMPTS = (  # raw text, so that every checkpoint can continue them
    "def fibonacci(n):\n",
    "The lighthouse keeper climbed the stairs one last time. Outside, the sea",
    "Things to bring:\n- a tent\n- two blankets\n- matches\n-",
    '{"name": "Ada", "born": 1815, "languages": ["English", "French"], "works": [',
    "Question: Why is the sky blue?\nAnswer:",
    "one two three, one two three, one two three, one",
)
SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=1.0, top_k=64, top_p=0.95, seed=1),
    "sampled hot": SamplingParams(temperature=1.3, repetition_penalty=1.1, seed=2),
}
TIMED = ("greedy", "sampled")  # what speed and acceptance are measured with
DEPTHS: tuple[DraftTokens, ...] = (1, 2, 4, 8, "auto")
DEEPEST = 8
USUAL_DEPTH = 4  # where something else is varied
SMALL_CHUNK = 5  # prompt tokens
TIMED_DEPTHS: tuple[DraftTokens, ...] = (0, 1, 2, 3, 4, 6, 8, "auto")
REPEATS = 3
TOP = 5  # logits shown of rows that differ

Top = tuple[tuple[int, float], ...]
"""The most likely tokens of a row, best first, each with its logit."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many runs are done, and of how many."""


@dataclass(frozen=True)
class Case:
    """A way of decoding that must not show in the text."""

    draft_tokens: DraftTokens
    threads: int | None = None  # None: as loaded
    chunk: int | None = None  # prompt tokens a pass; None: as loaded

    def __str__(self) -> str:
        drafts = f"{self.draft_tokens} draft{'s' * (self.draft_tokens != 1)}"
        if self.draft_tokens == "auto":
            drafts = "as many drafts as pay"
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        return drafts + threads + (f", prompt chunks of {self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Difference:
    """Where a run first departs from its reference.

    Tokens are None where a text had ended. Of rows nothing is kept if only the ends of the texts differ.
    """

    position: int  # absolute, of the token sampled from the rows
    expected_token: int | None
    found_token: int | None
    expected_top: Top = ()
    found_top: Top = ()
    largest: float | None = None  # absolute difference of two logits of the rows; not finite where one of them is not
    largest_at: int | None = None  # whose logits these are: a token id


@dataclass(frozen=True)
class Run:
    """One case compared with plain decoding."""

    prompt: str
    sampling: str  # a key of SAMPLINGS
    case: Case
    rows: int  # compared
    statistics: Statistics
    difference: Difference | None


@dataclass(frozen=True)
class Audit:
    """All runs of an audit."""

    runs: tuple[Run, ...]

    @property
    def different(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.difference)

    @property
    def identical(self) -> bool:
        return not self.different

    @property
    def rows(self) -> int:
        return sum(run.rows for run in self.runs)

    @property
    def acceptance_by_depth(self) -> tuple[float, ...]:
        """Share of rounds of DEEPEST drafts whose draft at depth 1, 2, ... was accepted; empty without such rounds."""
        seen = [run.statistics for run in self.runs if run.case == Case(DEEPEST) and run.sampling in TIMED]
        rounds = sum(s.rounds for s in seen)
        if not rounds:
            return ()
        return tuple(
            sum(sum(s.accepted_at_depth[depth : depth + 1]) for s in seen) / rounds for depth in range(DEEPEST)
        )

    @property
    def acceptance_by_proposer(self) -> dict[str, tuple[int, int]]:
        """Drafted and accepted tokens of runs with as many drafts as pay, by who drafted them."""
        seen = [run.statistics for run in self.runs if run.case == Case("auto")]
        engine = sum(s.drafted_by_engine for s in seen), sum(s.accepted_by_engine for s in seen)
        drafted, accepted = sum(s.drafted for s in seen), sum(s.accepted for s in seen)
        return {"drafter": (drafted - engine[0], accepted - engine[1]), "prompt lookup": engine}


@dataclass(frozen=True)
class Speeds:
    """Decoding speed by draft length, prompts not counted."""

    tokens_per_second: dict[DraftTokens, float]  # medians

    @property
    def best_fixed(self) -> DraftTokens:
        return max((n for n in self.tokens_per_second if n != "auto"), key=self.tokens_per_second.__getitem__)

    @property
    def regret_percent(self) -> float:
        """How much slower "auto" is than the best fixed draft length; negative where it is faster."""
        return 100 * (1 - self.tokens_per_second["auto"] / self.tokens_per_second[self.best_fixed])


def audit(
    engine: Engine,
    prompts: Items[str] = PROMPTS,
    max_tokens: int = 64,
    progress: Progress = lambda *_: None,
) -> Audit:
    """Compare every case with plain decoding, for every prompt and sampling.

    A run ends at its first difference.

    Args:
        engine: a loaded model, with or without a drafter; needs a free slot.
        prompts: raw text. The rows of one prompt's reference are held at a time, 4 bytes a logit.
        max_tokens: tokens generated at most in each run.
        progress: told before each run.

    Raises:
        ContextError: a prompt is empty, or too long for the context.
    """
    _check(engine, prompts)
    cases = cases_of(engine)
    total = len(prompts) * len(SAMPLINGS) * (1 + len(cases))
    runs: list[Run] = []
    for done, (prompt, name) in enumerate(product(prompts, SAMPLINGS)):
        reference = _Recording()
        expected = _decode(engine, prompt, name, Case(0), max_tokens, reference)
        for case in cases:
            progress("comparing", len(runs) + done + 1, total)
            comparison = _Comparison(reference, expected.start)
            found = _decode(engine, prompt, name, case, max_tokens, comparison)
            difference = comparison.difference or _difference_of_ends(expected, found, comparison)
            runs.append(Run(prompt, name, case, comparison.compared, found.statistics, difference))
    return Audit(tuple(runs))


def cases_of(engine: Engine) -> tuple[Case, ...]:
    """What is compared with plain decoding."""
    drafts = engine.backend.info.has_drafter
    usual = USUAL_DEPTH if drafts else 0
    cases = [Case(depth) for depth in DEPTHS if drafts]
    return (*cases, Case(usual, threads=1 if engine.backend.threads > 1 else 2), Case(usual, chunk=SMALL_CHUNK))


def measure_speeds(
    engine: Engine,
    prompts: Items[str] = PROMPTS,
    max_tokens: int = 64,
    progress: Progress = lambda *_: None,
) -> Speeds | None:
    """Time the draft lengths, interleaved for each prompt; None without a drafter or without text to time.

    Args:
        engine: a loaded model; needs a free slot.
        prompts: raw text.
        max_tokens: tokens generated at most in each run.
        progress: told before each run.

    Raises:
        ContextError: a prompt is empty, or too long for the context.
    """
    _check(engine, prompts)
    if not engine.backend.info.has_drafter:
        return None
    speeds: dict[DraftTokens, list[float]] = {depth: [] for depth in TIMED_DEPTHS}
    texts = list(product(prompts, TIMED))
    done, total = 0, REPEATS * len(texts) * len(TIMED_DEPTHS)
    for _ in range(REPEATS):
        tokens: dict[DraftTokens, int] = dict.fromkeys(TIMED_DEPTHS, 0)
        seconds: dict[DraftTokens, float] = dict.fromkeys(TIMED_DEPTHS, 0.0)
        for (prompt, name), depth in product(texts, TIMED_DEPTHS):
            progress("timing", done, total)
            settings = {"sampling": SAMPLINGS[name], "max_tokens": max_tokens, "draft_tokens": depth}
            made = engine.generate(prompt, raw=True, **settings).statistics
            tokens[depth] += max(0, made.tokens - 1)  # the first belongs to the prompt
            seconds[depth] += made.seconds
            done += 1
        if not all(tokens.values()):
            return None
        for depth, seen in speeds.items():
            seen.append(tokens[depth] / seconds[depth])
    return Speeds({depth: statistics.median(seen) for depth, seen in speeds.items()})


@dataclass
class _Recording:
    """Keeps the rows of logits [vocabulary] and the tokens of a run."""

    rows: list[Float32] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    difference: Difference | None = None

    def see(self, result: Result) -> None:
        assert result.logits is not None
        self.rows += [*result.logits]
        self.tokens += result.sampled


@dataclass
class _Comparison:
    """Compares the rows and tokens of a run with those of a reference.

    A round samples all accepted drafts, also those after a stop token; of these the reference has none, and they are
    not compared.
    """

    reference: _Recording
    start: int  # position of the first sampled token
    compared: int = 0
    difference: Difference | None = None

    def see(self, result: Result) -> None:
        assert result.logits is not None
        for logits, token in zip(result.logits, result.sampled, strict=True):
            if self.difference is None and self.compared < len(self.reference.rows):
                self.difference = self._compare(logits, token)
                self.compared += 1

    def _compare(self, logits: Float32, token: int) -> Difference | None:
        expected, expected_token = self.reference.rows[self.compared], self.reference.tokens[self.compared]
        if token == expected_token and np.array_equal(expected.view(np.uint32), logits.view(np.uint32)):
            return None
        with np.errstate(invalid="ignore"):
            apart = np.abs(expected.astype(np.float64) - logits)
        at = int(apart.argmax())  # NaN counts as the largest
        tops = top_of(expected), top_of(logits)
        return Difference(self.start + self.compared, expected_token, token, *tops, float(apart[at]), at)


@dataclass(frozen=True)
class _Decoded:
    """The text of a run."""

    start: int  # position of the first token
    tokens: tuple[int, ...]
    text: str
    finish: FinishReason | None
    statistics: Statistics


def _decode(
    engine: Engine, prompt: str, sampling: str, case: Case, max_tokens: int, tap: _Recording | _Comparison
) -> _Decoded:
    text = ""
    params, drafts = SAMPLINGS[sampling], case.draft_tokens
    with (
        _as_in(engine, case) as changed,
        changed.stream(prompt, raw=True, sampling=params, max_tokens=max_tokens, draft_tokens=drafts) as stream,
    ):
        sequence = stream.sequence
        sequence.tap = tap.see
        for event in stream:
            text += event.text
            if tap.difference:
                break
        return _Decoded(sequence.prompt_length, tuple(sequence.generated), text, sequence.finish, stream.statistics)


@contextmanager
def _as_in(engine: Engine, case: Case) -> Iterator[Engine]:
    """The engine with a case's chunk and threads; the threads are put back afterwards."""
    backend, usual = engine.backend, engine.scheduler
    changed = replace(engine, scheduler=Scheduler(backend, usual.proposers, case.chunk or usual.chunk))
    if case.threads is None:
        yield changed
        return
    before, backend.threads = backend.threads, case.threads
    try:
        yield changed
    finally:
        backend.threads = before


def _difference_of_ends(expected: _Decoded, found: _Decoded, comparison: _Comparison) -> Difference | None:
    """How texts differ whose compared rows are all the same: one goes on for longer, or is cut in another place."""
    same = (expected.tokens, expected.text, expected.finish) == (found.tokens, found.text, found.finish)
    if same and comparison.compared == len(comparison.reference.rows):
        return None
    pairs = zip(expected.tokens, found.tokens, strict=False)
    shorter = min(len(expected.tokens), len(found.tokens))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    tokens = [run.tokens[index] if index < len(run.tokens) else None for run in (expected, found)]
    return Difference(expected.start + index, tokens[0], tokens[1])


def top_of(logits: Float32) -> Top:
    """The TOP most likely tokens of a row [vocabulary]; NaN ranks last."""
    best = np.argsort(-logits, kind="stable")[:TOP]
    return tuple((int(token), float(logits[token])) for token in best)


def _check(engine: Engine, prompts: Items[str]) -> None:
    """Find prompts that cannot be used before the first run."""
    for prompt in prompts:
        try:
            engine.check_length(engine.encode(prompt, raw=True))
        except ContextError as error:
            raise ContextError(f"{shortened(prompt)}: {error}") from error


def shortened(prompt: str, length: int = 50) -> str:
    """The start of a prompt in quotes, on one line."""
    return repr(prompt if len(prompt) <= length else prompt[:length] + "...")


def finite(value: float | None) -> float | None:
    """The value if JSON has it."""
    return value if value is not None and math.isfinite(value) else None
