"""Acceptance of drafts, and the engine's step over the fake backend."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.backends.fake import FakeBackend
from paceline.decode.rules import Coupled
from paceline.decode.sampling_params import History
from paceline.decode.verify import verify
from paceline.engine.sequence import Sequence
from paceline.errors import BackendError
from paceline.types import Line
from tests.support import run, sequence


def rows_for(*tokens: int, vocab: int = 8) -> np.ndarray:
    """Logits whose arg max is the given tokens, one a row."""
    return np.eye(vocab, dtype=np.float32)[list(tokens)]


@pytest.mark.parametrize(
    ("drafts", "truth", "committed"),
    [
        ([], [3], (3,)),
        ([3], [3, 4], (3, 4)),
        ([2], [3, 4], (3,)),
        ([3, 4, 5], [3, 4, 5, 6], (3, 4, 5, 6)),
        ([3, 4, 5], [3, 1, 5, 6], (3, 1)),  # agreement after a rejection counts for nothing
    ],
)
def test_accepts_exactly_what_the_target_draws(drafts: list[int], truth: list[int], committed: tuple[int, ...]) -> None:
    history = History()
    commit = verify(rows_for(*truth), Line(tuple(drafts)), Coupled(), history, position=10)
    assert commit.tokens == committed
    assert history.text == Counter(committed)
    assert commit.accepted == len(committed) - 1


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert Coupled().settle(np.array([1, 5, 5, 2], np.float32), 0, History(), Line(), 0) == 1


def test_strategies_are_told_the_position_of_the_token_they_draw() -> None:
    seen = []

    class Spy(Coupled):
        def settle(self, logits: np.ndarray, position: int, history: History, line: Line, depth: int) -> int:
            seen.append(position)
            return int(logits.argmax())

    verify(rows_for(1, 2, 3), Line((1, 2)), Spy(), History(), position=41)
    assert seen == [42, 43, 44]


def tokens_of(backend: FakeBackend, sequences: list[Sequence], chunk: int = 8) -> list[list[int]]:
    return [finished.tokens for finished in run(backend, sequences, chunk)]


def alone(prompt: list[int], max_tokens: int) -> list[int]:
    backend = FakeBackend()
    return tokens_of(backend, [sequence(backend, prompt, max_tokens=max_tokens)])[0]


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(prompt=prompts, truth=st.sampled_from([0.0, 0.5, 0.9, 1.0]), depth=st.integers(0, 15), chunk=st.integers(1, 32))
def test_text_does_not_depend_on_drafting_or_chunks(prompt: list[int], truth: float, depth: int, chunk: int) -> None:
    backend = FakeBackend(truth=truth)
    (tokens,) = tokens_of(backend, [sequence(backend, prompt, draft_tokens=depth)], chunk)
    assert tokens == alone(prompt, 20)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(0, 6), st.integers(1, 30)), min_size=1, max_size=4),
    chunk=st.integers(1, 16),
)
def test_text_does_not_depend_on_company(requests: list[tuple[list[int], int, int]], chunk: int) -> None:
    backend = FakeBackend()
    sequences = [sequence(backend, p, draft_tokens=depth, max_tokens=most) for p, depth, most in requests]
    assert tokens_of(backend, sequences, chunk) == [alone(p, most) for p, _, most in requests]


@settings(max_examples=40, deadline=None)
@given(prompt=prompts, depth=st.integers(0, 8), stop=st.integers(0, 63))
def test_a_stop_token_ends_the_text_even_among_accepted_drafts(prompt: list[int], depth: int, stop: int) -> None:
    backend = FakeBackend(truth=1.0)
    s = sequence(backend, prompt, draft_tokens=depth, max_tokens=60, stop_ids=frozenset({stop}))
    (tokens,) = tokens_of(backend, [s])
    plain = alone(prompt, 60)
    cut = plain.index(stop) if stop in plain else 60
    assert tokens == plain[:cut]
    assert s.finish == ("stop" if cut < 60 else "length")


def test_statistics_add_up() -> None:
    backend = FakeBackend(truth=0.6)
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
    backend = FakeBackend(context=16, truth=1.0)
    s = sequence(backend, [1, 2, 3], draft_tokens=5, max_tokens=1000)
    run(backend, [s])
    assert len(s.tokens) == 16
    assert s.finish == "length"


def test_without_a_drafter_nothing_is_drafted() -> None:
    backend = FakeBackend(can_draft=False)
    s = sequence(backend, [1, 2, 3], draft_tokens=4)
    run(backend, [s])
    assert s.statistics.drafted == 0
    assert s.statistics.acceptance_length == 1.0


def test_the_fake_refuses_what_a_backend_must_refuse() -> None:
    backend = FakeBackend(slots=1)
    slot = backend.open_slot()
    with pytest.raises(BackendError, match="slots are taken"):
        backend.open_slot()
    with pytest.raises(BackendError, match="truncate"):
        backend.truncate(slot, 1)
