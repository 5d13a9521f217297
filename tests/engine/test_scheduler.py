"""Several sequences in flight: their text, their turns, cancellation, the queue."""

from __future__ import annotations

import contextlib
import random
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.engine.draft_control import DraftControl
from paceline.engine.proposers import GrammarProposer, Proposer
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import BusyError
from paceline.types import Draft, Event, SamplingParams, Work
from tests.fixtures.backends import proposers_of, unplaced
from tests.fixtures.scripted_backend import ScriptedBackend


def request(backend: ScriptedBackend, prompt: list[int], **other: object) -> Sequence:
    return unplaced(backend, prompt, **{"draft_tokens": 3, **other})


def drain(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.tick()


def alone(prompt: list[int], **other: object) -> list[int]:
    backend = ScriptedBackend(slots=1)
    sequence = request(backend, prompt, **other)
    scheduler = Scheduler(backend, proposers_of(backend), chunk=8)
    scheduler.submit(sequence)
    drain(scheduler)
    return sequence.generated


class Watch:
    """Keeps the rows of each pass by slot; of a draft that the backend proposes, its length."""

    def __init__(self) -> None:
        self.passes: list[dict[int, int]] = []

    def __call__(self, works: list[Work]) -> None:
        rows = {work.slot: len(work.tokens) + len(work.draft.tokens) + work.draft.length for work in works}
        self.passes.append(rows)


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=60)


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(prompts, st.integers(1, 25), st.integers(0, 6), st.sampled_from([0.0, 1.0]), st.integers(0, 99)),
        min_size=1,
        max_size=12,
    ),
    slots=st.integers(1, 5),
    chunk=st.integers(1, 32),
    seed=st.integers(0, 1 << 30),
)
def test_text_does_not_depend_on_load(requests: list[tuple], slots: int, chunk: int, seed: int) -> None:
    dice = random.Random(seed)
    backend = ScriptedBackend(slots=slots, truth=0.6)
    scheduler = Scheduler(backend, proposers_of(backend), chunk)
    sequences, heard = [], []
    for prompt, most, depth, temperature, noise in requests:
        params = SamplingParams(temperature=temperature, seed=noise)
        sequences.append(request(backend, prompt, max_tokens=most, draft_tokens=depth, params=params))
        events: list[Event] = []
        heard.append(events)
        sequences[-1].deliver = events.append
        scheduler.submit(sequences[-1])
        for _ in range(dice.randrange(4)):
            scheduler.tick()
        if dice.random() < 0.2:
            scheduler.cancel(dice.choice(sequences))
    drain(scheduler)
    for (prompt, most, _, temperature, noise), sequence, events in zip(requests, sequences, heard, strict=True):
        text = alone(prompt, max_tokens=most, params=SamplingParams(temperature=temperature, seed=noise))
        assert [delta.token for event in events for delta in event.deltas] == sequence.generated
        assert sequence.generated == text[: len(sequence.generated)]
        assert sequence.finish == "cancelled" or sequence.generated == text
    assert sorted(backend.open_slot() for _ in range(slots)) == list(range(slots))  # all are free


def test_long_prompts_do_not_stall_others() -> None:
    watch = Watch()
    backend = ScriptedBackend(slots=2, context=2048, max_rows=64, watch=watch)
    scheduler = Scheduler(backend, proposers_of(backend), chunk=64)
    decoding, prefilling = request(backend, [1, 2], max_tokens=500, draft_tokens=0), request(backend, [5] * 1000)
    scheduler.submit(decoding)
    scheduler.tick()
    scheduler.submit(prefilling)
    while prefilling.in_prefill:
        before = len(decoding.generated)
        scheduler.tick()
        assert len(decoding.generated) > before
    assert all(rows <= 64 for one in watch.passes for rows in one.values())


def test_prompts_take_turns() -> None:
    backend = ScriptedBackend(slots=3, context=2048)
    scheduler = Scheduler(backend, proposers_of(backend), chunk=16)
    sequences = [request(backend, [n] * 160) for n in (1, 2, 3)]
    for sequence in sequences:
        scheduler.submit(sequence)
    for _ in range(15):
        scheduler.tick()
    assert [sequence.cached for sequence in sequences] == [80, 80, 80]


def test_full_queue_refuses() -> None:
    scheduler = Scheduler(ScriptedBackend(slots=1), (), chunk=8, max_waiting=2)
    for _ in range(3):  # one for the slot
        scheduler.submit(request(scheduler.backend, [1]))
    for _ in range(2):
        with pytest.raises(BusyError, match="try again later"):
            scheduler.submit(request(scheduler.backend, [1]))
        scheduler.tick()
        assert scheduler.waiting == 2
    drain(scheduler)
    scheduler.submit(request(scheduler.backend, [1]))


def test_clients_take_turns_and_every_choice_counts() -> None:
    scheduler = Scheduler(ScriptedBackend(slots=2), (), chunk=8)
    first = [request(scheduler.backend, [1], max_tokens=5, client="a") for _ in range(12)]
    for sequence in first:
        scheduler.submit(sequence)
    scheduler.tick()
    later = request(scheduler.backend, [2], max_tokens=5, client="b")
    scheduler.submit(later)
    while not later.finish:
        scheduler.tick()
    assert sum(bool(sequence.finish) for sequence in first) <= 4  # those that ran, and those beside it
    drain(scheduler)
    assert [sequence.finish for sequence in first] == ["length"] * 12


def test_a_full_queue_takes_from_the_client_that_has_most() -> None:
    scheduler = Scheduler(ScriptedBackend(slots=1), (), chunk=8, max_waiting=4)
    heard: list[Event | Exception] = []
    first = [request(scheduler.backend, [1], client="a", deliver=heard.append) for _ in range(5)]
    for sequence in first:
        scheduler.submit(sequence)
    scheduler.tick()
    for _ in range(2):
        scheduler.submit(request(scheduler.backend, [2], client="b"))
    with pytest.raises(BusyError, match="try again later"):  # now it would have more than the other
        scheduler.submit(request(scheduler.backend, [2], client="b"))
    drain(scheduler)
    assert [sequence.finish for sequence in first] == ["length"] * 3 + ["cancelled"] * 2
    assert [type(one) for one in heard if isinstance(one, Exception)] == [BusyError, BusyError]


def test_a_failed_step_ends_all_with_its_error_and_frees_their_slots() -> None:
    def fail(works: list[Work]) -> None:
        if len(works) == 2 and works[0].position > 4:
            raise MemoryError("no room")

    backend = ScriptedBackend(slots=2, watch=fail)
    scheduler = Scheduler(backend, proposers_of(backend), chunk=8)
    heard: list[list[Event | Exception]] = [[], [], []]
    for number, events in enumerate(heard):
        scheduler.submit(request(backend, [number + 1], deliver=events.append))
    drain(scheduler)
    assert all(isinstance(events[-1], MemoryError) for events in heard)
    sequence = request(backend, [1], max_tokens=20)
    scheduler.submit(sequence)
    drain(scheduler)
    assert sequence.generated == alone([1], max_tokens=20)
    assert {backend.open_slot(), backend.open_slot()} == {0, 1}


def test_a_sequence_whose_owner_has_gone_is_cancelled() -> None:
    class Owner:
        pass

    owner = Owner()
    scheduler = Scheduler(ScriptedBackend(slots=1), (), chunk=8)
    sequences = [request(scheduler.backend, [1], owner=weakref.ref(owner)) for _ in range(2)]
    for sequence in sequences:
        scheduler.submit(sequence)
    scheduler.tick()
    assert scheduler.busy
    del owner
    scheduler.tick()
    assert not scheduler.busy
    assert [sequence.finish for sequence in sequences] == ["cancelled"] * 2


def test_cancelled_sequences_leave_before_the_next_round() -> None:
    watch = Watch()
    backend = ScriptedBackend(slots=2, watch=watch)
    scheduler = Scheduler(backend, proposers_of(backend), chunk=8)
    stays, goes, waits = (request(backend, [n], max_tokens=50) for n in (1, 2, 3))
    for sequence in (stays, goes, waits):
        scheduler.submit(sequence)
    for _ in range(3):
        scheduler.tick()
    scheduler.cancel(goes)
    scheduler.cancel(waits)
    length = len(goes.generated)
    scheduler.tick()
    assert (len(goes.generated), goes.finish, waits.finish) == (length, "cancelled", "cancelled")
    assert set(watch.passes[-1]) == {stays.slot}
    drain(scheduler)
    assert stays.finish == "length"
    assert waits.generated == []


class Litany:
    """A grammar that allows two tokens at each place, and claims that one of them is forced: now and then wrongly."""

    failed = False

    def __init__(self, honest: int) -> None:
        self.place, self.honest = 0, honest

    def allowed(self) -> np.ndarray:
        return np.isin(np.arange(64), self._choice(self.place))

    def _choice(self, place: int) -> list[int]:
        return [place % 50] if place % 10 < self.honest else [place % 50, 60]

    def advance(self, token: int) -> None:
        assert token in self._choice(self.place)
        self.place += 1

    def forced(self) -> tuple[int, ...]:
        return tuple(range(self.place % 50, min(50, self.place % 50 + 30)))


@pytest.mark.parametrize("draft_tokens", [None, 0, 3])
@pytest.mark.parametrize("has_drafter", [True, False])
@pytest.mark.parametrize("honest", [0, 7, 10])
def test_forced_tokens_are_drafted(draft_tokens: int | None, has_drafter: bool, honest: int) -> None:
    watch = Watch()
    backend = ScriptedBackend(slots=1, has_drafter=has_drafter, watch=watch)
    proposers = proposers_of(backend)
    scheduler = Scheduler(backend, proposers, chunk=8)
    sequence = request(backend, [1, 2], max_tokens=100, draft_tokens=draft_tokens, grammar=Litany(honest))
    scheduler.submit(sequence)
    drain(scheduler)
    assert sequence.generated == alone([1, 2], max_tokens=100, draft_tokens=0, grammar=Litany(honest))
    assert max(rows for one in watch.passes for rows in one.values()) <= 16
    if draft_tokens != 0 and honest == 10:
        assert len(watch.passes) <= 1 + 10  # rounds of sixteen tokens, fewer where fifty of them end
        assert sequence.statistics.accepted_by_engine == sequence.statistics.accepted > 80
    if has_drafter and draft_tokens is None:
        assert proposers[-1].learned.tried_long < 50  # the grammar's drafts say nothing of the drafter


class LastToken(Proposer):
    """Proposes the newest token once more."""

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        return Draft((sequence.tokens[-1],) * min(2, most)) if most else None


def test_a_proposer_that_fails_at_the_end_of_a_text_keeps_no_slot() -> None:
    class Failing(LastToken):
        def finish(self, sequence: Sequence) -> None:
            raise RuntimeError("a mistake")

    backend = ScriptedBackend(slots=1)
    scheduler = Scheduler(backend, [Failing()], chunk=8)
    scheduler.submit(request(backend, [1, 2], max_tokens=3))
    with contextlib.suppress(RuntimeError):
        drain(scheduler)
    assert backend.open_slot() == 0


def test_proposers_are_asked_in_order() -> None:
    watch = Watch()
    backend = ScriptedBackend(slots=1, watch=watch)
    proposers = [GrammarProposer(), LastToken(), DraftControl(True, False)]
    scheduler = Scheduler(backend, proposers, chunk=8)
    sequence = request(backend, [1, 2], max_tokens=10)
    scheduler.submit(sequence)
    drain(scheduler)
    assert sequence.generated == alone([1, 2], max_tokens=10, draft_tokens=0)
    assert {rows[0] for rows in watch.passes[1:-2]} == {3}  # never the drafter's one token
