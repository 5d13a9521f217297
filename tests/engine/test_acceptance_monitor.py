"""What is said of low acceptance, and when."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from paceline.engine.acceptance_monitor import ENOUGH, LONG_CONTEXT, SITUATIONS, UNKNOWN, AcceptanceMonitor
from paceline.engine.sequence import Sequence
from paceline.text.detokenizer import Detokenizer
from paceline.types import GREEDY, Bool, SamplingParams


def sequence(*situations: str, tokens: int = 10) -> Sequence:
    return Sequence(
        tokens=[1] * tokens,
        params=GREEDY,
        draft_tokens=None,
        max_tokens=10,
        limit=1 << 20,
        stop_ids=frozenset(),
        detokenizer=Detokenizer(None, lambda _: None),
        situations=situations,
    )


class AnyToken:
    """A grammar that forbids nothing."""

    failed = False

    def allowed(self) -> Bool:
        return np.ones(10, bool)

    def advance(self, token: int) -> None: ...

    def forced(self) -> tuple[int, ...]:
        return ()


class Watched:
    """A monitor, and what it has said."""

    def __init__(self, *doubts: str) -> None:
        self.said: list[str] = []
        self.monitor = AcceptanceMonitor(doubts, self.said.append)
        self._dice = random.Random(0)

    def see(self, one: Sequence, rate: float, count: int) -> None:
        """So many first drafts, with texts that end now and then."""
        for i in range(count):
            self.monitor.observe(one, self._dice.random() < rate)
            if i % 20 == 19:
                self.monitor.examine()
        self.monitor.examine()


@pytest.mark.parametrize("rate", [0.5, 0.75, 0.9, 1.0])
def test_nothing_is_said_of_usual_acceptance(rate: float) -> None:
    watched = Watched("a doubt")
    for _ in range(20):
        watched.see(sequence(), rate, 200)
    assert watched.said == []
    assert watched.monitor.cause == ""
    assert watched.monitor.rate == pytest.approx(rate, abs=0.1)


def test_too_few_drafts_say_nothing() -> None:
    watched = Watched("a doubt")
    watched.see(sequence(), 0.0, ENOUGH - 1)
    assert watched.said == []


def test_a_bad_pair_is_named_with_what_its_files_say() -> None:
    watched = Watched("only one of the pair is named as QAT", "the drafter's file holds weights in 4.5 bits")
    watched.see(sequence(), 0.1, 1000)
    assert watched.monitor.cause == "pair"
    (line,) = watched.said
    assert "75% are usual: only one of the pair is named as QAT; the drafter's file holds weights in 4.5 bits" in line
    assert "texts are not affected" in line


def test_a_bad_pair_without_doubts_is_asked_about() -> None:
    watched = Watched()
    watched.see(sequence(), 0.05, 1000)
    assert UNKNOWN in watched.said[0]


def test_what_all_of_it_had_in_common_is_named() -> None:
    watched = Watched()
    watched.see(sequence("raw_text"), 0.1, 200)
    assert "all of this was in raw text" in watched.said[0]


@pytest.mark.parametrize("name", [name for name in SITUATIONS if name in ("reasoning", "raw_text")])
def test_the_situation_in_which_it_falls_is_named(name: str) -> None:
    watched = Watched("a doubt that does not explain it")
    watched.see(sequence(), 0.8, 200)
    watched.see(sequence(name), 0.1, 600)
    assert watched.monitor.cause == name
    assert SITUATIONS[name] in watched.said[0]
    assert "else" in watched.said[0]


def test_long_contexts_are_seen_by_their_length() -> None:
    watched = Watched()
    watched.see(sequence(tokens=LONG_CONTEXT), 0.8, 200)
    watched.see(sequence(tokens=LONG_CONTEXT + 1), 0.1, 600)
    assert watched.monitor.cause == "long_context"


def test_grammars_are_seen() -> None:
    watched = Watched()
    watched.see(sequence(), 0.8, 200)
    watched.see(replace(sequence(), grammar=AnyToken()), 0.1, 600)
    assert watched.monitor.cause == "grammar"


def test_high_temperatures_are_seen() -> None:
    watched = Watched("a doubt that does not explain it")
    watched.see(sequence(), 0.8, 200)
    watched.see(replace(sequence(), params=SamplingParams(temperature=1.5)), 0.1, 600)
    assert watched.monitor.cause == "high_temperature"


def test_of_several_situations_the_worst_is_named() -> None:
    watched = Watched()
    watched.see(sequence(), 0.8, 200)
    watched.see(sequence("raw_text"), 0.25, 100)
    watched.see(sequence("reasoning"), 0.02, 400)
    assert watched.monitor.cause == "reasoning"


def test_a_fall_that_nothing_explains_is_the_texts() -> None:
    watched = Watched("a doubt that does not explain it")
    watched.see(sequence(), 0.9, 600)
    watched.see(sequence(), 0.1, 3000)
    assert watched.monitor.cause == "text"
    assert len(watched.said) == 1
    assert "more were before" in watched.said[0]


def test_what_gets_better_is_low_no_more() -> None:
    watched = Watched()
    watched.see(sequence(), 0.1, 200)
    assert watched.monitor.cause == "pair"
    watched.see(sequence(), 0.9, 3000)
    assert watched.monitor.cause == ""
    assert len(watched.said) == 1


def test_ordinary_text_after_a_repetitive_one_is_no_fall() -> None:
    watched = Watched()
    watched.see(sequence(), 1.0, 60)
    watched.see(sequence(), 0.42, 2000)
    assert watched.said == []


def test_a_notice_that_cannot_be_given_ends_nothing() -> None:
    def broken(_: str) -> None:
        raise OSError(5, "the terminal is gone")

    monitor = AcceptanceMonitor((), broken)
    for _ in range(100):
        monitor.observe(sequence(), False)
    monitor.examine()
    assert monitor.cause == "pair"
