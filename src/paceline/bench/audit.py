"""The audit of a pair: is the text the same, bit for bit, however it is decoded, and does drafting pay as it should?

Every prompt is decoded plainly, which is the reference, and then with several draft lengths, another number of threads
and small prompt chunks. Every row of logits that a token was settled from is compared with the reference's by its bits,
and so are the tokens and the text. The engine is driven as users drive it: only its rule is wrapped, to see the rows.
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

from paceline.backends.cpu.backend import CpuBackend
from paceline.decode.rules import Rule
from paceline.decode.sampling_params import History
from paceline.engine.engine import DraftTokens, Engine, Experience
from paceline.engine.scheduler import Scheduler
from paceline.errors import PromptError
from paceline.types import GREEDY, FinishReason, Float32, Line, Row, SamplingParams, Statistics

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
"""Told what is being done, how many runs are behind it, and of how many."""


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

    position: int  # absolute, of the token that the rows settle
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


@dataclass(frozen=True)
class Speeds:
    """Decoding speed by draft length, prompts not counted."""

    tokens_per_second: dict[DraftTokens, float]  # medians

    @property
    def best_fixed(self) -> DraftTokens:
        return max((n for n in self.tokens_per_second if n != "auto"), key=self.tokens_per_second.__getitem__)

    @property
    def regret_percent(self) -> float:
        """How far "auto" stays behind the best fixed draft length; negative where it is ahead."""
        return 100 * (1 - self.tokens_per_second["auto"] / self.tokens_per_second[self.best_fixed])


def audit(
    engine: Engine,
    prompts: Items[str] = PROMPTS,
    max_tokens: int = 64,
    progress: Progress = lambda *_: None,
) -> Audit:
    """Compare every case with plain decoding, for every prompt and sampling.

    What the engine learns about drafting here is not kept, for watching costs time. A run ends at its first difference.

    Args:
        engine: a loaded model, with or without a drafter; needs a free slot.
        prompts: raw text. The rows of one prompt's reference are held at a time, 4 bytes a logit.
        max_tokens: tokens generated at most in each run.
        progress: told before each run.

    Raises:
        PromptError: a prompt is empty, or too long for the context.
    """
    _check(engine, prompts)
    aside = replace(engine, experience=Experience(engine.experience.priced), notify=lambda _: None)
    cases = cases_of(engine)
    total = len(prompts) * len(SAMPLINGS) * (1 + len(cases))
    runs: list[Run] = []
    for done, (prompt, name) in enumerate(product(prompts, SAMPLINGS)):
        reference = _Keeper(aside.rule("coupled", SAMPLINGS[name]))
        expected = _write(aside, prompt, reference, Case(0), max_tokens)
        for case in cases:
            progress("comparing", len(runs) + done + 1, total)
            rule = _Comparer(aside.rule("coupled", SAMPLINGS[name]), reference)
            found = _write(aside, prompt, rule, case, max_tokens)
            difference = rule.difference or _difference_of_ends(expected, found, rule)
            runs.append(Run(prompt, name, case, rule.compared, found.statistics, difference))
    return Audit(tuple(runs))


def cases_of(engine: Engine) -> tuple[Case, ...]:
    """What is compared with plain decoding; threads where the backend lets their number be changed."""
    drafts = engine.backend.can_draft
    cases = [Case(depth) for depth in DEPTHS if drafts]
    usual = USUAL_DEPTH if drafts else 0
    if isinstance(engine.backend, CpuBackend):
        cases.append(Case(usual, threads=1 if engine.threads > 1 else 2))
    return (*cases, Case(usual, chunk=SMALL_CHUNK))


def measure_speeds(
    engine: Engine,
    prompts: Items[str] = PROMPTS,
    max_tokens: int = 64,
    progress: Progress = lambda *_: None,
) -> Speeds | None:
    """Time the draft lengths, each prompt with all of them in turn; None without a drafter or without text to time.

    Args:
        engine: a loaded model; needs a free slot.
        prompts: raw text.
        max_tokens: tokens generated at most in each run.
        progress: told before each run.

    Raises:
        PromptError: a prompt is empty, or too long for the context.
    """
    _check(engine, prompts)
    if not engine.backend.can_draft:
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
class _Watcher:
    """A rule that settles as another one does."""

    rule: Rule

    @property
    def sampling(self) -> SamplingParams:
        return self.rule.sampling

    @property
    def stream(self) -> int:
        return self.rule.stream

    @property
    def with_logits(self) -> bool:
        return self.rule.with_logits

    def settle(self, logits: Row, position: int, history: History, line: Line, depth: int) -> int:
        token = self.rule.settle(logits, position, history, line, depth)
        self.see(np.asarray(logits, np.float32), token, position)
        return token

    def see(self, logits: Float32, token: int, position: int) -> None:
        raise NotImplementedError

    @property
    def satisfied(self) -> bool:
        """Whether the rest of the run need not be seen."""
        return False


@dataclass
class _Keeper(_Watcher):
    """Keeps the rows [vocabulary] and tokens it sees."""

    rows: list[Float32] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    def see(self, logits: Float32, token: int, position: int) -> None:
        self.rows.append(logits.copy())
        self.tokens.append(token)


@dataclass
class _Comparer(_Watcher):
    """Compares the rows and tokens it sees with those of a reference.

    A round settles all accepted drafts, also those behind a stop token; of these the reference has none, and they are
    not compared.
    """

    reference: _Keeper
    compared: int = 0
    difference: Difference | None = None

    def see(self, logits: Float32, token: int, position: int) -> None:
        if self.difference or self.compared == len(self.reference.rows):
            return
        expected, expected_token = self.reference.rows[self.compared], self.reference.tokens[self.compared]
        self.compared += 1
        if token != expected_token or not np.array_equal(expected.view(np.uint32), logits.view(np.uint32)):
            with np.errstate(invalid="ignore"):
                apart = np.abs(expected.astype(np.float64) - logits)
            at = int(apart.argmax())  # NaN counts as the largest
            tops = top_of(expected), top_of(logits)
            self.difference = Difference(position, expected_token, token, *tops, float(apart[at]), at)

    @property
    def satisfied(self) -> bool:
        return self.difference is not None


@dataclass(frozen=True)
class _Written:
    """What a run wrote."""

    start: int  # position of the first token
    tokens: tuple[int, ...]
    text: str
    finish: FinishReason | None
    statistics: Statistics


def _write(engine: Engine, prompt: str, rule: _Watcher, case: Case, max_tokens: int) -> _Written:
    text = ""
    with (
        _as_in(engine, case) as changed,
        changed.stream(
            prompt, raw=True, sampling=rule.sampling, max_tokens=max_tokens, draft_tokens=case.draft_tokens
        ) as stream,
    ):
        stream.sequence.rule = rule
        for event in stream:
            text += event.text
            if rule.satisfied:
                break
        sequence = stream.sequence
        return _Written(sequence.prompt_length, tuple(sequence.generated), text, sequence.finish, stream.statistics)


@contextmanager
def _as_in(engine: Engine, case: Case) -> Iterator[Engine]:
    """The engine with a case's chunk and threads; the threads are put back afterwards."""
    backend = engine.backend
    changed = replace(engine, scheduler=Scheduler(backend, case.chunk or engine.scheduler.chunk))
    if case.threads is None or not isinstance(backend, CpuBackend):
        yield changed
        return
    before, backend.threads = backend.threads, case.threads
    try:
        yield changed
    finally:
        backend.threads = before


def _difference_of_ends(expected: _Written, found: _Written, rule: _Comparer) -> Difference | None:
    """How texts differ whose compared rows are all the same: one goes on for longer, or is cut in another place."""
    same = (expected.tokens, expected.text, expected.finish) == (found.tokens, found.text, found.finish)
    if same and rule.compared == len(rule.reference.rows):
        return None
    pairs = zip(expected.tokens, found.tokens, strict=False)
    shorter = min(len(expected.tokens), len(found.tokens))
    index = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    tokens = [written.tokens[index] if index < len(written.tokens) else None for written in (expected, found)]
    return Difference(expected.start + index, tokens[0], tokens[1])


def top_of(logits: Float32) -> Top:
    """The TOP most likely tokens of a row [vocabulary]; NaN ranks last."""
    best = np.argsort(-logits, kind="stable")[:TOP]
    return tuple((int(token), float(logits[token])) for token in best)


def _check(engine: Engine, prompts: Items[str]) -> None:
    """Find prompts that cannot be used before the first run."""
    for prompt in prompts:
        count = len(engine.encode(prompt, raw=True))
        if count >= engine.backend.context:
            raise PromptError(
                f"the prompt {shortened(prompt)} has {count} tokens and the context holds {engine.backend.context}; "
                "shorten it"
            )


def shortened(prompt: str, length: int = 50) -> str:
    """A prompt's beginning in quotes, on one line."""
    return repr(prompt if len(prompt) <= length else prompt[:length] + "...")


def finite(value: float | None) -> float | None:
    """The value if JSON has it."""
    return value if value is not None and math.isfinite(value) else None
