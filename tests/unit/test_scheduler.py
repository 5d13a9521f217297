"""Several sequences in flight: their text, their turns, cancellation, the queue."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.backends.fake import FakeBackend
from paceline.decode.draft_length import Costs
from paceline.decode.rules import Coupled
from paceline.engine.scheduler import Scheduler
from paceline.engine.sequence import Sequence
from paceline.errors import BusyError
from paceline.types import Batch, Event, Output, SamplingParams
from tests.support import unplaced


def request(backend: FakeBackend, prompt: list[int], **other: object) -> Sequence:
    return unplaced(backend, prompt, **{"rule": Coupled(drawer=backend.draw), "draft_tokens": 3, **other})


def drain(scheduler: Scheduler) -> None:
    while scheduler.busy:
        scheduler.tick()


def alone(prompt: list[int], **other: object) -> list[int]:
    backend = FakeBackend(slots=1)
    sequence = request(backend, prompt, **other)
    scheduler = Scheduler(backend, chunk=8)
    scheduler.submit(sequence, lambda _: None)
    drain(scheduler)
    return sequence.generated


class Watched(FakeBackend):
    """Keeps the rows of each pass, by slot."""

    def __init__(self, **settings: object) -> None:
        super().__init__(**settings)
        self.passes: list[dict[int, int]] = []

    def forward(self, batch: Batch) -> Output:
        slots = batch.slots.tolist()
        self.passes.append({slot: slots.count(slot) for slot in slots})
        return super().forward(batch)


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
def test_text_does_not_depend_on_arrivals_company_or_cancellations(
    requests: list[tuple], slots: int, chunk: int, seed: int
) -> None:
    dice = random.Random(seed)
    backend = FakeBackend(slots=slots, truth=0.6)
    scheduler = Scheduler(backend, chunk)
    sequences, heard = [], []
    for prompt, most, depth, temperature, noise in requests:
        sampling = SamplingParams(temperature=temperature, seed=noise)
        rule = Coupled(sampling, backend.draw)
        sequences.append(request(backend, prompt, max_tokens=most, draft_tokens=depth, rule=rule))
        events: list[Event] = []
        heard.append(events)
        scheduler.submit(sequences[-1], events.append)
        for _ in range(dice.randrange(4)):
            scheduler.tick()
        if dice.random() < 0.2:
            scheduler.cancel(dice.choice(sequences))
    drain(scheduler)
    for (prompt, most, _, temperature, noise), sequence, events in zip(requests, sequences, heard, strict=True):
        text = alone(
            prompt, max_tokens=most, rule=Coupled(SamplingParams(temperature=temperature, seed=noise), backend.draw)
        )
        assert [piece.token for event in events for piece in event.pieces] == sequence.generated
        assert sequence.generated == text[: len(sequence.generated)]
        assert sequence.finish == "cancelled" or sequence.generated == text
    assert sorted(backend.open_slot() for _ in range(slots)) == list(range(slots))  # all given back


def test_a_long_prompt_does_not_hold_others_up() -> None:
    backend = Watched(slots=2, context=2048, max_rows=64)
    scheduler = Scheduler(backend, chunk=64)
    writing, reading = request(backend, [1, 2], max_tokens=500, draft_tokens=0), request(backend, [5] * 1000)
    scheduler.submit(writing, lambda _: None)
    scheduler.tick()
    scheduler.submit(reading, lambda _: None)
    before = len(writing.generated)
    while reading.reading:
        scheduler.tick()
        assert len(writing.generated) > before
        before = len(writing.generated)
    assert max(backend.passes[-1].values()) <= 64


def test_prompts_are_read_in_turns() -> None:
    backend = Watched(slots=3, context=2048)
    scheduler = Scheduler(backend, chunk=16)
    sequences = [request(backend, [n] * 160) for n in (1, 2, 3)]
    for sequence in sequences:
        scheduler.submit(sequence, lambda _: None)
    for _ in range(15):
        scheduler.tick()
    assert [sequence.cached for sequence in sequences] == [80, 80, 80]


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler(FakeBackend(slots=1), chunk=8, most_waiting=2)
    for _ in range(3):  # one for the slot
        scheduler.submit(request(scheduler.backend, [1]), lambda _: None)
    for _ in range(2):
        with pytest.raises(BusyError, match="try again later"):
            scheduler.submit(request(scheduler.backend, [1]), lambda _: None)
        scheduler.tick()
        assert scheduler.waiting == 2
    drain(scheduler)
    scheduler.submit(request(scheduler.backend, [1]), lambda _: None)


def test_a_cancelled_sequence_leaves_before_the_next_round() -> None:
    backend = Watched(slots=2)
    scheduler = Scheduler(backend, chunk=8)
    stays, goes, waits = (request(backend, [n], max_tokens=50) for n in (1, 2, 3))
    for sequence in (stays, goes, waits):
        scheduler.submit(sequence, lambda _: None)
    for _ in range(3):
        scheduler.tick()
    scheduler.cancel(goes)
    scheduler.cancel(waits)
    length = len(goes.generated)
    scheduler.tick()
    assert (len(goes.generated), goes.finish, waits.finish) == (length, "cancelled", "cancelled")
    assert set(backend.passes[-1]) == {stays.slot}
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


@pytest.mark.parametrize("depth", [None, 0, 3])
@pytest.mark.parametrize("can_draft", [True, False])
@pytest.mark.parametrize("honest", [0, 7, 10])
def test_what_a_grammar_forces_is_drafted_and_changes_nothing(depth: int | None, can_draft: bool, honest: int) -> None:
    backend = Watched(slots=1, can_draft=can_draft)
    scheduler = Scheduler(backend, chunk=8)
    costs = Costs((1.0, 1.2, 1.4))
    sequence = request(backend, [1, 2], max_tokens=100, draft_tokens=depth, grammar=Litany(honest), costs=costs)
    scheduler.submit(sequence, lambda _: None)
    drain(scheduler)
    assert sequence.generated == alone([1, 2], max_tokens=100, draft_tokens=0, grammar=Litany(honest))
    assert max(rows for one in backend.passes for rows in one.values()) <= 16
    if honest == 10 and depth != 0:
        assert len(backend.passes) <= 1 + 10  # rounds of sixteen tokens, less where fifty of them end
    assert sequence.control.drafted == (0 if honest == 10 else sequence.control.drafted)  # no credit to the drafter
