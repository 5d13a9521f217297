"""The prefix cache: what is found, what is stored, and that texts stay the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.prefix_cache import PrefixCache
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.types import SamplingParams
from tests.engine.test_scheduler import Watch, alone, drain, request
from tests.fixtures.backends import proposers_of
from tests.fixtures.scripted_backend import ScriptedBackend


def scheduler(backend: ScriptedBackend, memory: int = 1 << 20, chunk: int = 8) -> Scheduler:
    return Scheduler(backend, proposers_of(backend), chunk, prefix_cache=PrefixCache(backend, memory))


def serve(scheduler: Scheduler, *prompts: list[int], **other: object) -> list[Sequence]:
    """Run requests together, to their ends."""
    sequences = [request(scheduler.backend, prompt, **other) for prompt in prompts]
    for sequence in sequences:
        scheduler.submit(sequence)
    drain(scheduler)
    return sequences


def cached(scheduler: Scheduler, *prompts: list[int], **other: object) -> list[int]:
    return [s.statistics.cached_tokens for s in serve(scheduler, *prompts, **other)]


def test_next_turn_runs_only_what_is_new() -> None:
    watch = Watch()
    mine = scheduler(ScriptedBackend(slots=1, watch=watch))
    [first] = serve(mine, list(range(40)), max_tokens=30)
    watch.passes.clear()
    [second] = serve(mine, [*first.tokens, 1, 2, 3], max_tokens=1)
    assert second.statistics.cached_tokens == len(first.tokens) - 1  # the newest token was never run
    assert watch.passes == [{0: 4}]


def test_same_prompt_again_runs_one_token() -> None:
    mine = scheduler(ScriptedBackend(slots=1))
    assert cached(mine, list(range(40)), max_tokens=1) == [0]
    assert cached(mine, list(range(40)), max_tokens=1) == [39]


def test_branch_points_get_snapshots() -> None:
    """There is no snapshot at the end of the shared part, so the second prompt runs it too, and the third does not."""
    mine = scheduler(ScriptedBackend(slots=1, reach=4))
    shared = [7] * 50
    prompts = [[*shared, *[n] * 60] for n in (1, 2, 3)]
    assert [cached(mine, prompt, max_tokens=1) for prompt in prompts] == [[0], [0], [50]]


def test_shared_prefix_of_concurrent_prompts() -> None:
    watch = Watch()
    mine = scheduler(ScriptedBackend(slots=4, watch=watch))
    shared = [7] * 60
    assert cached(mine, *[[*shared, *[n] * 20] for n in (1, 2, 3)], max_tokens=1) == [0, 60, 60]
    assert sum(sum(rows.values()) for rows in watch.passes) == 60 + 3 * 20


def test_followers_go_on_when_their_leader_is_cancelled() -> None:
    backend = ScriptedBackend(slots=2)
    mine = scheduler(backend)
    reads, waits = (request(backend, [7] * 100, max_tokens=5) for _ in range(2))
    for sequence in (reads, waits):
        mine.submit(sequence)
    for _ in range(3):
        mine.tick()
    mine.cancel(reads)
    drain(mine)
    assert (reads.finish, waits.finish) == ("cancelled", "length")
    assert waits.statistics.cached_tokens == 24  # the prefix that the other had run
    assert waits.generated == alone([7] * 100, max_tokens=5)


def test_memory_is_bounded_by_least_recent_use() -> None:
    mine = scheduler(ScriptedBackend(slots=1), memory=4 * 150)  # three prompts of 40 tokens, four bytes each
    first, second, third, fourth = ([n] * 40 for n in range(4))
    for prompt in (first, second, third, first, fourth):
        serve(mine, prompt, max_tokens=1)
        assert mine.prefix_cache.nbytes <= 4 * 150
    assert cached(mine, first, max_tokens=1) == [39]
    assert cached(mine, second, max_tokens=1) == [0]


def test_snapshots_larger_than_memory() -> None:
    mine = scheduler(ScriptedBackend(slots=1), memory=4 * 30)
    serve(mine, [1] * 40, max_tokens=1)
    assert mine.prefix_cache.count == 0


def test_longer_snapshots_replace_shorter_ones() -> None:
    mine = scheduler(ScriptedBackend(slots=1, reach=1000))
    serve(mine, [1] * 40, max_tokens=60)
    assert mine.prefix_cache.count == 1


texts = st.lists(st.integers(0, 2), max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(0, 2), texts, st.integers(1, 25), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12
    ),
    slots=st.integers(1, 4),
    chunk=st.integers(1, 32),
    reach=st.integers(0, 40),
    memory=st.sampled_from([0, 400, 1 << 20]),
    seed=st.integers(0, 1 << 30),
)
def test_text_does_not_depend_on_the_cache(
    requests: list[tuple], slots: int, chunk: int, reach: int, memory: int, seed: int
) -> None:
    dice = random.Random(seed)
    backend = ScriptedBackend(slots=slots, truth=0.6, reach=reach)
    mine = scheduler(backend, memory, chunk)
    sequences: list[Sequence] = []
    for shared, own, most, temperature in requests:
        prompt = [9, *[shared] * (20 * shared), *own]
        if sequences and dice.random() < 0.3:  # a next turn
            prompt = [*dice.choice(sequences).tokens, *own, 5]
        params = SamplingParams(temperature=temperature, seed=len(sequences))
        sequences.append(request(backend, prompt, max_tokens=most, params=params, draft_tokens=dice.randrange(5)))
        mine.submit(sequences[-1])
        for _ in range(dice.randrange(6)):
            mine.tick()
        if dice.random() < 0.2:
            mine.cancel(dice.choice(sequences))
    drain(mine)
    for s in sequences:
        text = alone(s.tokens[: s.prompt_length], max_tokens=s.max_tokens, params=s.params)
        assert s.generated == text[: len(s.generated)]
        assert s.finish == "cancelled" or s.generated == text
    assert mine.prefix_cache.nbytes <= memory
    assert sorted(backend.open_slot() for _ in range(slots)) == list(range(slots))


def test_the_property_can_fail() -> None:
    class Forgetful(ScriptedBackend):
        def restore(self, slot: int, snapshot: object) -> None:
            super().restore(slot, snapshot)
            self._cache[slot][0] += 1

    mine = scheduler(Forgetful(slots=1))
    serve(mine, [1] * 40, max_tokens=1)
    with pytest.raises(AssertionError):
        assert serve(mine, [1] * 50, max_tokens=20)[0].generated == alone([1] * 50, max_tokens=20)
