"""Acceptance of drafts, and the engine's step over the scripted backend."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.decode.acceptance import accept
from paceline.engine.sequence import Sequence
from paceline.errors import BackendError
from paceline.types import GREEDY, Draft, Work
from tests.fixtures.backends import run, sequence
from tests.fixtures.scripted_backend import ScriptedBackend


class Committed:
    """A constraint that only keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def apply(self, logits: object) -> None: ...

    def commit(self, token: int) -> None:
        self.tokens.append(token)


@pytest.mark.parametrize(
    ("drafted", "truth", "sampled"),
    [
        ([], [3], (3,)),
        ([3], [3, 4], (3, 4)),
        ([2], [3, 4], (3,)),
        ([3, 4, 5], [3, 4, 5, 6], (3, 4, 5, 6)),
        ([3, 4, 5], [3, 1, 5, 6], (3, 1)),  # agreement after a rejection counts for nothing
    ],
)
def test_accepts_the_longest_common_prefix(drafted: list[int], truth: list[int], sampled: tuple[int, ...]) -> None:
    constraint = Committed()
    work = Work(0, 0, [1], GREEDY, constraint=constraint)
    assert accept(work, drafted, truth.__getitem__) == sampled
    assert tuple(constraint.tokens) == sampled


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_simulated_acceptance(accepted: int) -> None:
    work = Work(0, 0, [1], GREEDY, Draft((5, 0, 7), simulated=accepted))
    tokens = accept(work, (5, 0, 7), lambda row: 9)
    assert tokens[:accepted] == (5, 0, 7)[:accepted]
    assert len(tokens) == accepted + 1


def tokens_of(backend: ScriptedBackend, sequences: list[Sequence], chunk: int = 8) -> list[list[int]]:
    return [finished.tokens for finished in run(backend, sequences, chunk)]


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    backend = ScriptedBackend()
    return tokens_of(backend, [sequence(backend, prompt, max_tokens=max_tokens)])[0]


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompt=prompts, truth=st.sampled_from([0.0, 0.5, 0.9, 1.0]), depth=st.integers(0, 15), chunk=st.integers(1, 32))
def test_text_does_not_depend_on_drafting_or_chunks(prompt: list[int], truth: float, depth: int, chunk: int) -> None:
    backend = ScriptedBackend(truth=truth)
    (tokens,) = tokens_of(backend, [sequence(backend, prompt, draft_tokens=depth)], chunk)
    assert tokens == alone(prompt, 20)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=4),
    chunk=st.integers(1, 16),
)
def test_text_does_not_depend_on_the_batch(requests: list[tuple[list[int], int, int]], chunk: int) -> None:
    backend = ScriptedBackend()
    sequences = [sequence(backend, p, draft_tokens=depth, max_tokens=most) for p, depth, most in requests]
    assert tokens_of(backend, sequences, chunk) == [alone(p, most) for p, _, most in requests]


@settings(max_examples=40, deadline=None)
@given(prompt=prompts, depth=st.integers(0, 8), stop=st.integers(0, 63))
def test_stop_tokens_among_accepted_drafts(prompt: list[int], depth: int, stop: int) -> None:
    backend = ScriptedBackend(truth=1.0)
    s = sequence(backend, prompt, draft_tokens=depth, max_tokens=60, stop_ids=frozenset({stop}))
    (tokens,) = tokens_of(backend, [s])
    plain = alone(prompt, 60)
    cut = plain.index(stop) if stop in plain else 60
    assert tokens == plain[:cut]
    assert s.finish == ("stop" if cut < 60 else "length")


def test_statistics_add_up() -> None:
    backend = ScriptedBackend(truth=0.6)
    s = sequence(backend, [1, 2, 3], draft_tokens=4, max_tokens=50)
    run(backend, [s])
    stats = s.statistics
    assert stats.tokens == 50
    assert stats.tokens - 1 == stats.rounds + stats.accepted
    assert stats.accepted == sum(stats.accepted_at_depth)
    assert list(stats.accepted_at_depth) == sorted(stats.accepted_at_depth, reverse=True)
    assert stats.acceptance_length == pytest.approx(1 + sum(stats.acceptance_by_depth))
    assert 0 < stats.acceptance_by_depth[0] <= 1


def test_a_full_context_ends_the_text() -> None:
    backend = ScriptedBackend(context=16, truth=1.0)
    s = sequence(backend, [1, 2, 3], draft_tokens=5, max_tokens=1000)
    run(backend, [s])
    assert len(s.tokens) == 16
    assert s.finish == "length"


def test_without_a_drafter_nothing_is_drafted() -> None:
    backend = ScriptedBackend(has_drafter=False)
    s = sequence(backend, [1, 2, 3], draft_tokens=4)
    run(backend, [s])
    assert s.statistics.drafted == 0
    assert s.statistics.acceptance_length == 1.0


def test_scripted_backend_refuses_what_backends_must() -> None:
    backend = ScriptedBackend(slots=1)
    slot = backend.open_slot()
    with pytest.raises(BackendError, match="slots are taken"):
        backend.open_slot()
    with pytest.raises(BackendError, match="truncate"):
        backend.truncate(slot, 1)
