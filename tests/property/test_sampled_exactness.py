"""The contract under sampling: text, logits and log-probabilities do not depend on drafting. Bit for bit.

Random drafters are hardly ever right, so as many cases have a proposer that knows the text and lies at a chosen rate:
rounds then accept any number of tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.backends.base import Backend
from paceline.decode import sampler
from paceline.decode.draft_length import MAX_DEPTH, Acceptance
from paceline.engine.cost_model import StepCosts
from paceline.engine.draft_control import DraftControl
from paceline.engine.proposers import PromptLookup, Proposer
from paceline.engine.sequence import Sequence
from paceline.engine.step import step
from paceline.quant.recipes import RECIPES
from paceline.sampling_params import check_sampling_params
from paceline.types import GREEDY, Draft, Logprobs, Result, SamplingParams, Work
from tests.fixtures.backends import NATIVE, KnowingProposer, Run, any_backend, examples, only_native, sequence
from tests.fixtures.pairs import SHAPES, VOCABULARY, WINDOW, write_pair

TOKENS = 14
HEADS = ("centroid", "dense")
EXAMPLES = examples(200)  # of each shape and head, for either kind of drafter: 4,800 in all

anything = partial(settings, deadline=None, suppress_health_check=[HealthCheck.too_slow])
tokens = st.integers(0, VOCABULARY - 1)
prompts = st.lists(tokens, min_size=1, max_size=3 * WINDOW)


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory):
    """Backends by shape, weight format and drafter head, loaded once; slots are opened and closed."""
    root = tmp_path_factory.mktemp("pairs")

    @cache
    def pair(shape: str, head: str) -> tuple:
        return write_pair(root / head, shape, seed=3, head=head)

    @cache
    def get(shape: str, quant: str, head: str) -> Backend:
        return any_backend(*pair(shape, head), quant, slots=4)

    return get


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    """Settings of every kind, each of them left alone in about half of the cases."""

    def maybe(strategy: st.SearchStrategy, otherwise: object) -> object:
        return draw(strategy) if draw(st.booleans()) else otherwise

    sampling = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.5])),
        top_k=maybe(st.integers(1, VOCABULARY), 0),
        top_p=maybe(st.floats(0, 1), 1.0),
        min_p=maybe(st.floats(0, 1), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2), 1.0),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        bias=tuple(maybe(st.lists(st.tuples(tokens, st.floats(-8, 8)), max_size=4), [])),
        suppressed=tuple(maybe(st.lists(tokens, max_size=20), [])),
        seed=draw(st.integers(0, 2**64 - 1)),
    )
    return check_sampling_params(sampling, VOCABULARY)


@dataclass(frozen=True)
class Drafting:
    """How far a sequence drafts: to a depth, or as its controller thinks, with any past."""

    draft_tokens: int | None
    costs: tuple[float, ...] = ()  # milliseconds of rounds of 0, 1, ... tokens
    seen: tuple[tuple[float, float], ...] = ()  # drafts at depth 1, 2, ... and the share of them that was accepted
    rested: int = 0
    credit: float = 0.0


@st.composite
def draftings(draw: st.DrawFn) -> Drafting:
    if draw(st.booleans()):
        return Drafting(draw(st.integers(1, MAX_DEPTH)))
    plain = draw(st.floats(0.1, 3))  # milliseconds; what rounds of these models really take is about 1
    steps = draw(st.lists(st.floats(0, 0.6), min_size=1, max_size=MAX_DEPTH))
    return Drafting(
        None,
        costs=tuple(float(ms) for ms in plain * (1 + np.cumsum([0.0, *steps]))),
        seen=tuple(draw(st.tuples(st.floats(0, 30), st.floats(0, 1))) for _ in range(MAX_DEPTH)),
        rested=draw(st.sampled_from([0, 20, 1 << 30])),
        credit=draw(st.sampled_from([-1.0, 1.0, 20.0, 20.0])),
    )


@dataclass(frozen=True)
class Told(Run):
    """A run, what was told about its tokens, and what its rounds accepted of what they drafted."""

    logprobs: list[Logprobs | None]
    rounds: Counter[tuple[int, int]]


class PerSequence(Proposer):
    """Asks another proposer for each sequence."""

    def __init__(self) -> None:
        self.of: dict[Sequence, Proposer] = {}

    def prepare(self, sequences: list[Sequence]) -> None:
        for s in sequences:
            self.of[s].prepare([s])

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        return self.of[sequence].propose(sequence, most)

    def observe(self, rounds: list, seconds: float | None) -> None:
        for s, result in rounds:
            self.of[s].observe([(s, result)], seconds if len(rounds) == 1 else None)


def drafter_proposer(backend: Backend, one: Sequence, drafting: Drafting) -> DraftControl:
    """An engine's, with costs and a past of its own."""
    return with_past(DraftControl(backend.info.has_drafter, backend.info.stops_early), one, drafting)


def with_past(control: DraftControl, one: Sequence, drafting: Drafting) -> DraftControl:
    control.begin(one)
    if drafting.draft_tokens is None:
        costs = StepCosts(1, drafting.credit)
        for length, ms in enumerate(drafting.costs * 2):
            costs.observe(length % len(drafting.costs), length % len(drafting.costs), ms)
        control._costs[1] = costs
        tried = [tried for tried, _ in drafting.seen]
        kept = [tried * share for tried, share in drafting.seen]
        control._states[one].acceptance = Acceptance(tried, kept, rested=drafting.rested)
    return control


def prepared(
    backend: Backend,
    prompt: list[int],
    params: SamplingParams,
    drafting: Drafting | None = None,
    logprobs: int | None = None,
) -> Sequence:
    drafts = drafting.draft_tokens if drafting else 0
    return sequence(backend, prompt, params=params, max_tokens=TOKENS, draft_tokens=drafts, logprobs=logprobs)


def finish(
    backend: Backend, sequences: list[Sequence], proposer: Proposer | None = None, chunk: int = 32
) -> list[Told]:
    """Drive sequences to their ends, all in the same steps, and free their slots, also if that fails."""
    told: dict[int, list[Logprobs | None]] = {s.slot: [] for s in sequences}
    rounds: dict[int, Counter[tuple[int, int]]] = {s.slot: Counter() for s in sequences}
    proposers = [proposer] if proposer else []
    try:
        while running := [s for s in sequences if s.finish is None]:
            for s, event in zip(running, step(backend, proposers, running, chunk), strict=True):
                if event:
                    told[s.slot] += [delta.logprobs for delta in event.deltas]
                    rounds[s.slot][event.drafted, event.accepted] += 1
    finally:
        for s in sequences:
            backend.close_slot(s.slot)
    return [Told(s.generated, np.array(s.rows), s.statistics, told[s.slot], rounds[s.slot]) for s in sequences]


def alone(backend: Backend, prompt: list[int], params: SamplingParams, logprobs: int | None = None) -> Told:
    """Plain decoding."""
    (run,) = finish(backend, [prepared(backend, prompt, params, logprobs=logprobs)])
    assert run.statistics.drafted == 0
    return run


def assert_same(one: Told, other: Told) -> None:
    assert one.tokens == other.tokens
    np.testing.assert_array_equal(one.logits.view(np.uint32), other.logits.view(np.uint32))  # bits, not values
    assert one.logprobs == other.logprobs


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_drafter(backends, shape: str, head: str) -> None:
    seen: Counter[int] = Counter()

    @anything(max_examples=EXAMPLES)
    @given(
        quant=st.sampled_from([*RECIPES]),
        prompt=prompts,
        sampling=samplings(),
        drafting=draftings(),
        chunk=st.integers(1, 32),
        logprobs=st.sampled_from([None, 0, 5]),
    )
    def holds(
        quant: str, prompt: list[int], sampling: SamplingParams, drafting: Drafting, chunk: int, logprobs: int | None
    ) -> None:
        backend = backends(shape, quant, head)
        plain = alone(backend, prompt, sampling, logprobs)
        s = prepared(backend, prompt, sampling, drafting, logprobs)
        (drafted,) = finish(backend, [s], drafter_proposer(backend, s, drafting), chunk)
        assert_same(plain, drafted)
        seen.update(depth for depth, _ in drafted.rounds.elements())

    holds()
    assert len(seen) > (MAX_DEPTH / 2 if NATIVE else 1)  # depths: the cases are what they are meant to be


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_pattern_of_acceptance(backends, shape: str, head: str) -> None:
    seen: Counter[tuple[int, int]] = Counter()

    @anything(max_examples=EXAMPLES)
    @given(
        quant=st.sampled_from([*RECIPES]),
        prompt=prompts,
        sampling=samplings(),
        drafting=draftings(),
        chunk=st.integers(1, 32),
        honesty=st.sampled_from([0.3, 0.7, 0.9, 1.0]),
        seed=st.integers(0, 999),
        logprobs=st.sampled_from([None, 0, 5]),
    )
    def holds(
        quant: str,
        prompt: list[int],
        sampling: SamplingParams,
        drafting: Drafting,
        chunk: int,
        honesty: float,
        seed: int,
        logprobs: int | None,
    ) -> None:
        backend = backends(shape, quant, head)
        plain = alone(backend, prompt, sampling, logprobs)
        knowing = KnowingProposer(honesty, seed, VOCABULARY)
        s = prepared(backend, prompt, sampling, drafting, logprobs)
        knowing.texts[s] = [*prompt, *plain.tokens]
        (drafted,) = finish(backend, [s], knowing, chunk)
        assert_same(plain, drafted)
        if honesty == 1.0:
            assert drafted.statistics.accepted == drafted.statistics.drafted
        seen.update(drafted.rounds)

    holds()
    if not NATIVE:  # too few examples for all kinds of rounds
        return
    assert len({depth for depth, _ in seen}) > MAX_DEPTH / 2
    assert len({accepted for _, accepted in seen}) > MAX_DEPTH / 2
    assert sum(accepted < depth for depth, accepted in seen) > MAX_DEPTH  # kinds of rounds with a rejection


@dataclass
class Liar(DraftControl):
    """Its lookups claim to be certain, and are right at a chosen rate; the drafter has the other rounds."""

    knowing: KnowingProposer | None = None
    share: float = 0.5  # of rounds with a guess

    def guess(self, sequence: Sequence, lookup: PromptLookup, most: int) -> tuple[list[int], list[float]]:
        assert self.knowing
        super().guess(sequence, lookup, most)
        if self.knowing._random.random() >= self.share:
            return [], []
        tokens = [*self.knowing.propose(sequence, most).tokens]
        return tokens, [1.0] * len(tokens)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("shape", SHAPES)
def test_proposers_mixed_within_one_text(backends, shape: str, head: str) -> None:
    seen: Counter[bool] = Counter()  # rounds by whether the drafter had them

    @anything(max_examples=examples(60))
    @given(
        quant=st.sampled_from([*RECIPES]),
        prompt=prompts,
        sampling=samplings(),
        drafting=draftings().filter(lambda one: one.draft_tokens is None),
        honesty=st.sampled_from([0.0, 0.5, 0.9]),
        share=st.sampled_from([0.3, 0.7]),
        seed=st.integers(0, 999),
    )
    def holds(
        quant: str,
        prompt: list[int],
        sampling: SamplingParams,
        drafting: Drafting,
        honesty: float,
        share: float,
        seed: int,
    ) -> None:
        backend = backends(shape, quant, head)
        plain = alone(backend, prompt, sampling, 5)
        knowing = KnowingProposer(honesty, seed, VOCABULARY)
        liar = Liar(True, backend.info.stops_early, knowing=knowing, share=share)
        s = prepared(backend, prompt, sampling, drafting, 5)
        knowing.texts[s] = [*prompt, *plain.tokens]
        with_past(liar, s, drafting)
        assert s.tap
        kept = s.tap

        def tap(result: Result) -> None:
            kept(result)
            if result.drafted:
                seen[bool(result.confidence)] += 1

        s.tap = tap
        (drafted,) = finish(backend, [s], liar)
        assert_same(plain, drafted)

    holds()
    # other backends run few examples, which need not have both
    assert min(seen[True], seen[False]) > 20 if NATIVE else seen.total()


@pytest.mark.parametrize("shape", SHAPES)
@anything(max_examples=examples(40))
@given(
    quant=st.sampled_from([*RECIPES]),
    requests=st.lists(st.tuples(prompts, samplings(), draftings()), min_size=2, max_size=4),
    chunk=st.integers(1, 32),
    honesty=st.sampled_from([None, 0.7, 0.9]),
)
def test_batch_invariance(
    backends,
    shape: str,
    quant: str,
    requests: list[tuple[list[int], SamplingParams, Drafting]],
    chunk: int,
    honesty: float | None,
) -> None:
    """Sequences with settings of their own in one batch, drafted by the native drafter or by a knowing proposer."""
    backend = backends(shape, quant, "dense")
    plain = [alone(backend, prompt, params, 5) for prompt, params, _ in requests]
    proposer = PerSequence()
    sequences = []
    for (prompt, params, drafting), mine in zip(requests, plain, strict=True):
        s = prepared(backend, prompt, params, drafting, 5)
        knowing = KnowingProposer(honesty or 0, len(sequences), VOCABULARY)
        knowing.texts[s] = [*prompt, *mine.tokens]
        proposer.of[s] = drafter_proposer(backend, s, drafting) if honesty is None else knowing
        sequences.append(s)
    for mine, together in zip(plain, finish(backend, sequences, proposer, chunk), strict=True):
        assert_same(mine, together)


@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_are_those_of_plain_decoding(backends, shape: str) -> None:
    """Equal as floats, and those of the settings' temperature alone."""
    backend = backends(shape, "f32", "centroid")
    sampling = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, presence_penalty=1.0, seed=6)
    prompt = list(range(40, 60))
    plain = alone(backend, prompt, sampling, 5)
    knowing = KnowingProposer(0.8, 1, VOCABULARY)
    s = prepared(backend, prompt, sampling, Drafting(4), 5)
    knowing.texts[s] = [*prompt, *plain.tokens]
    (drafted,) = finish(backend, [s], knowing)
    assert 0 < drafted.statistics.accepted < drafted.statistics.drafted
    assert drafted.logprobs == plain.logprobs
    for token, row, mine in zip(plain.tokens, plain.logits.astype(np.float64) / 0.7, drafted.logprobs, strict=True):
        logs = row - row.max() - math.log(np.exp(row - row.max()).sum())
        best = np.argsort(-logs, kind="stable")[:5]
        assert mine is not None
        assert mine.token == pytest.approx(logs[token], abs=1e-9)
        assert [i for i, _ in mine.top] == best.tolist()
        assert [value for _, value in mine.top] == pytest.approx(logs[best].tolist(), abs=1e-9)


@only_native
@pytest.mark.parametrize("head", HEADS)
@anything(max_examples=60)
@given(shape=st.sampled_from(SHAPES), params=samplings(), length=st.integers(1, MAX_DEPTH), seed=st.integers(0, 99))
def test_drafter_samples_as_the_target_does(
    backends, head: str, shape: str, params: SamplingParams, length: int, seed: int
) -> None:
    """From the drafter's logits, without constraints; confidence is the token's share of what was allowed."""
    backend = backends(shape, "f32", head)
    slot = backend.open_slot()
    try:
        (first,) = backend.run([Work(slot, 0, [5, 6, 7, 8 + seed], GREEDY)])
        (result,) = backend.run([Work(slot, 4, first.sampled, params, Draft(length=length))])
        logits, _ = backend._decoder.last_draft_step(0)
    finally:
        backend.close_slot(slot)
    assert len(result.drafted) == len(result.confidence) == length
    token = result.drafted[-1]
    assert token == sampler.sample(logits, params, 4 + length)
    if params.temperature > 0:
        ids, weights = sampler.allowed(logits, params)
        assert np.float32(result.confidence[-1]) == np.float32(weights[ids == token].sum() / weights.sum())
