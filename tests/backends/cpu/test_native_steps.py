"""What the native code must answer with an exception, never a crash or a hang: works, slots, failures, forks, exits.

Cases that would corrupt memory if a check were missing run in a forked child, so that a crash is one failed test. Under
`.ci/sanitize` the same tests find what would not crash. Nothing here needs PyTorch.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paceline import _cpu
from paceline.types import GREEDY, NO_DRAFT, Draft, SamplingParams, Work
from tests.fixtures.checkpoints import VOCAB
from tests.fixtures.native import ISAS, MOE, SAMPLED, SANITIZED, TARGET_CONFIG, WILD, attempt, decoder, pair, replace
from tests.fixtures.processes import LIMIT, in_child

# Works


PROMPT = [3, 14, 15, 92, 65, 35]


def greedy(made: _cpu.Decoder, count: int, slot: int = 0) -> list[int]:
    tokens = list(PROMPT)
    made.run([Work(slot, 0, PROMPT[:-1])])
    for position in range(len(PROMPT) - 1, len(PROMPT) + count - 1):
        tokens += made.run([Work(slot, position, [tokens[-1]], GREEDY)])[0][0]
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize(
    "work",
    [
        Work(3, 0, [1], GREEDY),
        Work(-1, 0, [1], GREEDY),
        Work(2**31, 0, [1], GREEDY),
        Work(2**32, 5, [1], GREEDY),  # the low half is a slot
        Work(2**64, 5, [1], GREEDY),
        Work(0, 4, [1], GREEDY),
        Work(0, 6, [1], GREEDY),
        Work(0, -1, [1], GREEDY),
        Work(0, 2**32 + 5, [1], GREEDY),  # the low half is the position
        Work(0, 2**64 + 5, [1], GREEDY),
        Work(0, 5, [], GREEDY),
        Work(0, 5, [VOCAB], GREEDY),
        Work(0, 5, [-1], GREEDY),
        Work(0, 5, [2**32 + 1], GREEDY),
        Work(0, 5, [1, 2**70], GREEDY),
        Work(0, 5, [1] * 17, GREEDY),
        Work(0, 5, [1], GREEDY, Draft((VOCAB,))),
        Work(0, 5, [1], GREEDY, Draft((-1, 1))),
        Work(0, 5, [1], GREEDY, Draft((2**32 + 1,))),
        Work(0, 5, [1], GREEDY, Draft((1,) * 16)),
        Work(0, 5, [1], GREEDY, Draft((1,), length=1)),
        Work(0, 5, [1], GREEDY, Draft(length=-1)),
        Work(0, 5, [1], GREEDY, Draft(length=16)),
        Work(0, 5, [1], GREEDY, Draft(length=2**31)),
        Work(0, 5, [1], GREEDY, Draft(length=2**63 - 1)),
        Work(0, 5, [1], GREEDY, Draft(length=2**64)),
        Work(0, 5, [1], GREEDY, Draft(length=3, floors=(0.5,) * 2, acceptance=(0.5,) * 16)),
        Work(0, 5, [1], GREEDY, Draft(length=3, floors=(0.5,) * 3, acceptance=(0.5,) * 15)),
        Work(0, 5, [1], GREEDY, Draft(floors=(0.5,) * 3, acceptance=(0.5,) * 16)),
        Work(0, 5, [1], GREEDY, Draft((1,), simulated=-1)),
        Work(0, 5, [1], GREEDY, Draft((1,), simulated=2**64)),
        Work(0, 5, [1, 2], GREEDY, Draft(length=3)),
        Work(1, 0, [1], GREEDY, Draft(length=3)),  # nothing was sampled there
        Work(0, 5, "ab", GREEDY),  # type: ignore[arg-type]
        Work(0, 5, [1.5], GREEDY),  # type: ignore[list-item]
        Work(0, 5, [None], GREEDY),  # type: ignore[list-item]
        Work(0, "5", [1], GREEDY),  # type: ignore[arg-type]
        Work(0, 5, [1], "greedy"),  # type: ignore[arg-type]
        Work(0, 5, [1], GREEDY, None),  # type: ignore[arg-type]
        Work(0, 5, [1], GREEDY, NO_DRAFT, "constraint"),  # type: ignore[arg-type]
        None,
    ],
)
def test_works_are_checked_before_anything_runs(work: Any) -> None:
    def attack() -> None:
        made, other = pair(), pair()
        expected = [other.run([Work(slot, 0, [7, 8, 9, 10, 11], GREEDY)])[0] for slot in (0, 2)]
        for slot in (0, 2):
            made.run([Work(slot, 0, [7, 8, 9, 10, 11], GREEDY)])
        hidden = made.hidden(0)
        good = Work(2, 5, [4], GREEDY, Draft(length=2))
        for works in ([work], [good, work], [work, good]):
            with pytest.raises((ValueError, TypeError, AttributeError)):
                made.run(works)
        assert [made.length(slot) for slot in range(3)] == [5, 0, 5]
        np.testing.assert_array_equal(made.hidden(0), hidden)
        assert made.run([good]) == other.run([good])
        assert expected

    in_child(attack)


def test_a_slot_has_one_work_a_step() -> None:
    made = decoder()
    with pytest.raises(ValueError, match="two works"):
        made.run([Work(0, 0, [1]), Work(0, 1, [2])])
    with pytest.raises(ValueError, match="two works"):
        made.run([Work(0, 0, [1]), Work(0, 0, [1])])
    assert made.length(0) == 0
    assert made.run([]) == []


def test_a_context_is_filled_to_its_last_position_and_no_further() -> None:
    made = decoder(context=20)
    made.run([Work(0, 0, [1] * 16)])
    made.run([Work(0, 16, [1] * 3, GREEDY)])
    for draft in (Draft((1,)), Draft((1, 2))):
        with pytest.raises(ValueError, match="past the context"):
            made.run([Work(0, 19, [1], GREEDY, draft)])
    made.run([Work(0, 19, [1], GREEDY)])
    with pytest.raises(ValueError, match="past the context"):
        made.run([Work(0, 20, [1], GREEDY)])


def test_wild_works_never_crash() -> None:
    in_child(lambda: wild_works(seed=0, count=60 if SANITIZED else 300))


def wild_works(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    made, clean = pair(), pair()
    expected = greedy(clean, 12)

    def pick(*likely: Any) -> Any:
        return likely[random.integers(len(likely))] if random.random() < 0.85 else WILD[random.integers(len(WILD))]

    for _ in range(count):
        works = []
        for _ in range(random.integers(1, 4)):
            slot = pick(1, 2)
            length = made.length(slot) if slot in (1, 2) else 0
            tokens = [pick(1, 2, 3, 400) for _ in range(random.integers(0, 9) if random.random() < 0.3 else 1)]
            drafted = pick(0, 1, 3)
            draft = Draft(tuple(pick(1, 2, 3) for _ in range(random.integers(0, 4))))
            if random.random() < 0.5:
                floors = (0.1,) * int(random.integers(0, 5)) if random.random() < 0.2 else ()
                draft = Draft(length=drafted, floors=floors, acceptance=(0.9,) * 16, simulated=None)
            params = [GREEDY, SAMPLED, None][random.integers(3)]
            works.append(Work(slot, pick(length), tokens, params, draft, logits=bool(random.random() < 0.3)))
        before = [made.length(slot) for slot in range(3)]
        results = attempt(lambda w=works: made.run(w))
        if results is None:
            assert [made.length(slot) for slot in range(3)] == before
        else:
            assert all(0 <= token < VOCAB for result in results for token in (*result[0], *result[1]))
        for slot in (1, 2):
            if made.length(slot) > 40:
                made.clear(slot)
        call, value = [made.truncate, made.clear, made.save, made.hidden][random.integers(4)], pick(1, 2)
        attempt(lambda c=call, v=value: c(v, pick(0, 5)) if c == made.truncate else c(v))
    assert greedy(made, 12) == expected


# Slots, snapshots, rows


@pytest.mark.parametrize("slot", [3, -1, 2**31, 2**63 - 1, -(2**63)])
def test_slots_that_do_not_exist(slot: int) -> None:
    made = decoder()
    snapshot = made.save(0)
    for call in (
        made.length,
        made.clear,
        made.save,
        made.hidden,
        lambda n: made.truncate(n, 0),
        lambda n: made.restore(n, snapshot),
    ):
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            call(slot)
    with pytest.raises(TypeError):
        made.length(2**64)


def test_slots_that_cannot_be_cut_or_read() -> None:
    made = decoder()
    made.restore(1, made.save(0))  # of nothing
    with pytest.raises(ValueError, match="no hidden state"):
        made.hidden(0)
    made.run([Work(0, 0, [1, 2, 3], GREEDY)])
    for length in (4, -1, 2**63 - 1, -(2**63)):
        with pytest.raises(ValueError, match="cannot truncate"):
            made.truncate(0, length)
    with pytest.raises(ValueError, match="not empty"):
        made.restore(0, made.save(0))
    made.clear(0)
    with pytest.raises(ValueError, match="no hidden state"):
        made.hidden(0)


def test_rows_of_the_last_draft() -> None:
    with pytest.raises(ValueError, match="no drafter"):
        decoder().last_draft_step(0)
    made = pair()
    with pytest.raises(IndexError, match="no row 0"):
        made.last_draft_step(0)
    made.run([Work(slot, 0, [1, 2], GREEDY) for slot in (0, 1)])
    made.run([Work(slot, 2, [3], GREEDY, Draft(length=2)) for slot in (0, 1)])
    assert [part.shape for part in made.last_draft_step(1)] == [(VOCAB,), (32,)]
    for row in (2, -1, 2**40, 2**63 - 1):
        with pytest.raises(IndexError, match="no row"):
            made.last_draft_step(row)


@pytest.mark.parametrize(
    "other",
    [
        {"context": 128},
        {"max_rows": 32, "context": 256},
        {"kv": "f32"},
        {"target": replace(TARGET_CONFIG, sliding_window=16)},
        {"target": MOE, "context": 80},
        {"target": replace(TARGET_CONFIG, heads=4, layers=tuple(replace(x, kv_heads=2) for x in TARGET_CONFIG.layers))},
    ],
)
def test_a_snapshot_of_another_cache_is_refused(other: dict[str, Any]) -> None:
    def attack() -> None:
        one, two = decoder(), decoder(**other)
        one.run([Work(0, 0, [1, 2, 3, 4, 5, 6, 7], GREEDY)])
        two.run([Work(0, 0, [1, 2, 3, 4, 5, 6, 7], GREEDY)])
        for source, goal in ((one, two), (two, one)):
            with pytest.raises(ValueError, match="another layout"):
                goal.restore(1, source.save(0))
            assert goal.length(1) == 0

    in_child(attack)


def test_objects_that_were_never_made() -> None:
    def attack() -> None:
        for kind in (_cpu.Decoder, _cpu.Matrix, _cpu.Snapshot):
            with pytest.raises((TypeError, RuntimeError)):
                getattr(kind.__new__(kind), "threads" if kind is _cpu.Decoder else "nbytes")
        with pytest.raises(TypeError):
            _cpu.Snapshot()
        with pytest.raises((TypeError, ValueError)):
            decoder(None, {})
        with pytest.raises((TypeError, ValueError, AttributeError)):
            decoder(object(), {})

    in_child(attack)


# A step is a transaction


class Failing:
    """A constraint that raises at its k-th call of all calls; it forbids one token, so that it takes part."""

    def __init__(self, calls: list[int]) -> None:
        self.calls = calls

    def _count(self) -> None:
        self.calls[0] -= 1
        if self.calls[0] == 0:
            raise KeyError("the constraint fails")

    def apply(self, logits: np.ndarray) -> None:
        self._count()
        logits[5] = -np.inf

    def commit(self, token: int) -> None:
        self._count()


def equal(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return all(a[:3] == b[:3] and np.array_equal(a[3], b[3]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_step_that_fails_changes_nothing(params: SamplingParams, isa: str) -> None:
    made, clean = pair(isa=isa), pair(isa=isa)
    for each in (made, clean):
        each.run([Work(slot, 0, PROMPT[slot:], params) for slot in range(3)])
    probe = clean.run([Work(1, 5, [3], params, logits=True)])[0][0]
    clean.truncate(1, 5)
    failures = 0
    for step in range(4):
        lengths = [made.length(slot) for slot in range(3)]

        def works(calls: list[int], lengths: list[int] = lengths) -> list[Work]:
            rule = Failing(calls)
            return [
                Work(0, lengths[0], [3], params, Draft(length=4), rule, logits=True),
                Work(1, lengths[1], [3], params, Draft((*probe, 9, 9)), rule, logits=True),
                Work(2, lengths[2], [3, 4], params, NO_DRAFT, rule, logits=True),
            ]

        hidden = [made.hidden(slot) for slot in range(3)]
        expected = clean.run(works([0]))
        calls = -2 * sum(-len(result[0]) for result in expected)
        for k in range(1, calls + 1):
            with pytest.raises(KeyError, match="the constraint fails"):
                made.run(works([k]))
            failures += 1
            assert [made.length(slot) for slot in range(3)] == lengths
            for slot in range(3):
                np.testing.assert_array_equal(made.hidden(slot), hidden[slot])
        assert equal(made.run(works([0])), expected), step
        assert [made.length(slot) for slot in range(3)] == [clean.length(slot) for slot in range(3)]
    assert failures >= 24


def test_a_constraint_cannot_call_its_decoder() -> None:
    def attack() -> None:
        made = decoder()

        class Calling:
            def __init__(self, call: Callable[[], Any]) -> None:
                self.call = call

            def apply(self, logits: np.ndarray) -> None:
                self.call()

            def commit(self, token: int) -> None: ...

        calls: list[Callable[[], Any]] = [
            lambda: made.run([Work(1, 0, [1])]),
            lambda: made.clear(0),
            lambda: made.length(0),
            lambda: made.threads,
            lambda: setattr(made, "threads", 1),
            lambda: made.hidden(0),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="called the decoder that calls it"):
                made.run([Work(0, 0, [1], GREEDY, NO_DRAFT, Calling(call))])
        assert made.length(0) == 0
        made.run([Work(0, 0, [1], GREEDY)])

    in_child(attack)


# Processes


def test_a_forked_child_is_told_so() -> None:
    holder = [pair(threads=3)]
    holder[0].run([Work(0, 0, [1, 2], GREEDY)])
    snapshot = holder[0].save(0)

    def child() -> None:
        for call in (
            lambda: holder[0].run([Work(0, 2, [1], GREEDY)]),
            lambda: holder[0].clear(0),
            lambda: holder[0].restore(1, snapshot),
            lambda: setattr(holder[0], "threads", 2),
            lambda: holder[0].hidden(0),
        ):
            with pytest.raises(
                RuntimeError, match=r"was forked after the model was loaded.*load the model in the child"
            ):
                call()
        own = pair(threads=3)
        assert own.run([Work(0, 0, [1, 2], GREEDY)])

    in_child(child)
    holder[0].run([Work(0, 2, [1], GREEDY)])

    def destroy() -> None:
        holder.clear()  # does not wait for threads that are not there, nor end the process
        gc.collect()

    in_child(destroy)
    holder[0].run([Work(0, 3, [1], GREEDY)])


PREPARE = """
import sys, threading, time
from tests.backends.cpu.test_native_steps import *
made = pair(threads=2, context=4096)

class Slow:
    def apply(self, logits):
        sum(range(20000))
    def commit(self, token): ...

def generate(constraint=None):
    made.run([Work(0, 0, [1], GREEDY)])
    while True:
        position = made.length(0)
        if position > 4000:
            made.truncate(0, position - 2) if position % 2 else made.clear(0)
            position = made.length(0)
        made.run([Work(0, position, [3], GREEDY, NO_DRAFT, constraint)])
"""


@pytest.mark.parametrize("constraint", ["None", "Slow()"])
def test_a_process_ends_while_a_thread_generates(constraint: str) -> None:
    program = PREPARE + textwrap.dedent(f"""
        threading.Thread(target=generate, args=({constraint},), daemon=True).start()
        time.sleep(float(sys.argv[1]))
    """)
    for delay in ("0.1", "0.13", "0.17", "0.2"):
        done = subprocess.run(
            [sys.executable, "-c", program, delay], capture_output=True, text=True, timeout=LIMIT, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
