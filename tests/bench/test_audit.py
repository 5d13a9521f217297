"""The audit over the scripted backend: what it compares, and that it sees every kind of difference."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from paceline.bench.audit import (
    SAMPLINGS,
    TIMED,
    TIMED_DEPTHS,
    Audit,
    Case,
    Run,
    Speeds,
    audit,
    cases_of,
    measure_speeds,
    shortened,
    top_of,
)
from paceline.engine.engine import Engine
from paceline.engine.scheduler import Scheduler
from paceline.errors import PromptError
from paceline.types import Result, SamplingParams, Statistics, Work
from tests.engine.test_engine import engine as scripted_engine
from tests.fixtures.scripted_backend import ScriptedBackend

PROMPTS = ("Ask me.", "A prompt of more than one chunk.")
TOKENS = 24


def engine(backend: ScriptedBackend | None = None, **settings: object) -> Engine:
    return scripted_engine(backend=backend or ScriptedBackend(slots=1, context=128), prompt_chunk=16, **settings)


class RowsMatter(ScriptedBackend):
    """Logits that depend on how many rows a round has, in their last bit alone."""

    def run(self, works: list[Work]) -> list[Result]:
        results = super().run(works)
        for result in results:
            if result.drafted and result.logits is not None:
                result.logits[:, 7] = np.nextafter(result.logits[:, 7], np.float32(9))
        return results


class ChunksMatter(ScriptedBackend):
    """The last row of a prompt that is run in chunks has a NaN."""

    def run(self, works: list[Work]) -> list[Result]:
        results = super().run(works)
        for work, result in zip(works, results, strict=True):
            if work.position and len(work.tokens) > 1 and result.logits is not None:
                result.logits[0, 7] = np.nan
        return results


class Forgetful(ScriptedBackend):
    """Samples another token than it did the first time at a position."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self._seen: set[int] = set()

    def run(self, works: list[Work]) -> list[Result]:
        results = []
        for work, result in zip(works, super().run(works), strict=True):
            again = work.position in self._seen and bool(result.sampled)
            self._seen.add(work.position)
            last = (result.sampled[-1] + again) % self.info.vocab_size if result.sampled else None
            results.append(replace(result, sampled=(*result.sampled[:-1], last)) if result.sampled else result)
        return results


def test_an_exact_backend_is_identical() -> None:
    found = audit(engine(), PROMPTS, TOKENS)
    assert found.identical
    assert len(found.runs) == len(PROMPTS) * len(SAMPLINGS) * 7
    assert {str(run.case) for run in found.runs} == {
        "1 draft",
        "2 drafts",
        "4 drafts",
        "8 drafts",
        "as many drafts as pay",
        "4 drafts, 2 threads",
        "4 drafts, prompt chunks of 5",
    }
    assert {run.rows for run in found.runs} == {TOKENS}  # every row of every run
    assert all(run.statistics.drafted for run in found.runs if run.case != Case("auto"))


def test_a_stop_token_in_mid_round_is_no_difference() -> None:
    e = engine(ScriptedBackend(slots=1, context=128, truth=1.0), stop_ids=frozenset(range(0, 64, 5)))
    found = audit(e, PROMPTS, TOKENS)
    assert found.identical
    assert any(run.rows < TOKENS for run in found.runs)


def test_without_a_drafter_chunks_are_compared() -> None:
    e = engine(ScriptedBackend(slots=1, context=128, has_drafter=False))
    found = audit(e, PROMPTS, TOKENS)
    assert found.identical
    assert {run.case for run in found.runs} == set(cases_of(e)) == {Case(0, threads=2), Case(0, chunk=5)}
    assert found.acceptance_by_depth == ()
    assert measure_speeds(e, PROMPTS, TOKENS) is None


def test_one_bit_of_one_logit_is_a_difference() -> None:
    e = engine(RowsMatter(slots=1, context=128))
    found = audit(e, PROMPTS, TOKENS)
    run = found.different[0]
    assert run == found.runs[0]
    assert (run.prompt, run.sampling, run.case) == (PROMPTS[0], "greedy", Case(1))
    where = run.difference
    assert where is not None
    # The first token comes from the prompt, the second from the first round, which has two rows.
    assert where.position == len(e.encode(PROMPTS[0], raw=True)) + 1
    assert run.rows == 2
    assert where.expected_token == where.found_token
    assert where.largest is not None
    assert 0 < where.largest < 1e-6
    assert where.largest_at == 7
    assert len(where.expected_top) == len(where.found_top) == 5
    plain = e.stream(PROMPTS[0], raw=True, draft_tokens=0, sampling=SamplingParams(), logprobs=0)
    next(plain)
    assert where.expected_top[0][0] == next(plain).deltas[0].token


def test_a_broken_prompt_chunk_is_a_difference() -> None:
    e = engine(ChunksMatter(slots=1, context=128, max_rows=64))
    e = replace(e, scheduler=Scheduler(e.backend, e.scheduler.proposers, 64))
    found = audit(e, PROMPTS, TOKENS)
    assert {run.case for run in found.different} == {Case(4, chunk=5)}
    where = found.different[0].difference
    assert where is not None
    assert where.position == len(e.encode(PROMPTS[0], raw=True))
    assert where.largest is not None
    assert math.isnan(where.largest)
    assert where.largest_at == 7


def test_another_token_from_the_same_row_is_a_difference() -> None:
    found = audit(engine(Forgetful(slots=1, context=128)), PROMPTS[:1], TOKENS)
    where = found.runs[0].difference
    assert where is not None
    assert where.expected_token != where.found_token
    assert where.expected_top == where.found_top
    assert where.largest == 0


def test_a_text_that_ends_early_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Engine.stream

    def cut(self: Engine, *prompt: object, max_tokens: int, draft_tokens: object, **settings: object) -> object:
        most = max_tokens - 3 * (draft_tokens == 2)
        return whole(self, *prompt, max_tokens=most, draft_tokens=draft_tokens, **settings)

    monkeypatch.setattr(Engine, "stream", cut)
    e = engine()
    found = audit(e, PROMPTS[:1], TOKENS)
    assert {run.case for run in found.different} == {Case(2)}
    where = found.different[0].difference
    assert where is not None
    assert where.position == len(e.encode(PROMPTS[0], raw=True)) + TOKENS - 3
    assert where.expected_token is not None
    assert where.found_token is None
    assert where.expected_top == where.found_top == ()


def test_acceptance_is_of_rounds_at_the_greatest_depth() -> None:
    def run(case: Case, sampling: str, rounds: int, *accepted: int) -> Run:
        return Run("x", sampling, case, 1, Statistics(rounds=rounds, accepted_at_depth=accepted), None)

    found = Audit(
        (
            run(Case(8), "greedy", 10, 8, 4, 1),
            run(Case(8), "sampled", 30, 12, 6),
            run(Case(8), "sampled hot", 50),
            run(Case(8, chunk=5), "greedy", 50),
            run(Case(4), "greedy", 50, 50, 50, 50, 50),
        )
    )
    assert found.acceptance_by_depth == (0.5, 0.25, 0.025, 0, 0, 0, 0, 0)
    fake = audit(engine(ScriptedBackend(slots=1, context=128, truth=1.0)), PROMPTS, TOKENS)
    assert fake.acceptance_by_depth[0] == 1


def test_acceptance_by_proposer_is_of_runs_with_as_many_drafts_as_pay() -> None:
    def run(case: Case, *counts: int) -> Run:
        names = ("drafted", "accepted", "drafted_by_engine", "accepted_by_engine")
        return Run("x", "greedy", case, 1, Statistics(**dict(zip(names, counts, strict=True))), None)

    found = Audit((run(Case("auto"), 10, 7, 4, 3), run(Case("auto"), 1, 1, 0, 0), run(Case(8), 80, 8, 0, 0)))
    assert found.acceptance_by_proposer == {"drafter": (7, 5), "prompt lookup": (4, 3)}


def test_slots_are_free_afterwards() -> None:
    e = engine()
    audit(e, PROMPTS, TOKENS)
    assert e.generate(PROMPTS[0], raw=True, max_tokens=3).tokens


def test_speeds() -> None:
    speeds = measure_speeds(engine(), PROMPTS[:1], 6)
    assert speeds is not None
    assert tuple(speeds.tokens_per_second) == TIMED_DEPTHS
    assert all(speed > 0 for speed in speeds.tokens_per_second.values())
    assert measure_speeds(engine(stop_ids=frozenset(range(64))), PROMPTS, 6) is None


def test_regret() -> None:
    behind = Speeds({0: 10.0, 3: 20.0, 4: 15.0, "auto": 19.0})
    assert behind.best_fixed == 3
    assert behind.regret_percent == pytest.approx(5)
    assert Speeds({0: 10.0, "auto": 11.0}).regret_percent == pytest.approx(-10)


def test_progress_reaches_its_end() -> None:
    seen: list[tuple[str, int, int]] = []
    audit(engine(), PROMPTS, 2, lambda *state: seen.append(state))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (len(PROMPTS) * len(SAMPLINGS) * 8 - 1, len(PROMPTS) * len(SAMPLINGS) * 8)
    seen.clear()
    measure_speeds(engine(), PROMPTS, 2, lambda *state: seen.append(state))
    total = 3 * len(PROMPTS) * len(TIMED) * len(TIMED_DEPTHS)
    assert [done for _, done, _ in seen] == list(range(total))


def test_a_prompt_too_long_is_found_before_the_first_run() -> None:
    seen: list[object] = []
    with pytest.raises(PromptError, match=r"'xxx.*': the prompt has at least 200 tokens"):
        audit(engine(), ("fine", "x" * 200), 4, lambda *state: seen.append(state))
    assert seen == []


def test_top_ranks_by_logit_and_id() -> None:
    row = np.array([1, np.nan, 3, 3, -1, 2, 0], np.float32)
    assert top_of(row) == ((2, 3.0), (3, 3.0), (5, 2.0), (0, 1.0), (6, 0.0))


def test_prompts_are_named_on_one_line() -> None:
    assert shortened("a\nb") == r"'a\nb'"
    assert shortened("x" * 60) == "'" + "x" * 50 + "...'"
