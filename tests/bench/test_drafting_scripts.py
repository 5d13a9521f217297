"""What bench/ measures about drafting is what it says."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from paceline.bench.demand import experts_read
from paceline.bench.shapes import official_target

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
drafting, expert_prices, head_index = map(importlib.import_module, ("drafting", "expert_prices", "head_index"))


class Writing(drafting.Text):
    """A text that gets so many tokens a round, which takes a second on a clock of its own."""

    def __init__(self, tokens: int, rounds: list[int]) -> None:
        self.made = self.closed = 0

        def advance() -> None:
            rounds.append(tokens)
            self.made += tokens

        super().__init__(lambda: 7 + self.made, advance, lambda: setattr(self, "closed", 1))


def test_ways_take_turns_and_write_equally_much(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[int] = []
    monkeypatch.setattr("time.perf_counter", lambda: float(len(rounds)))
    texts = {0: Writing(1, rounds), "auto": Writing(3, rounds)}
    speeds = drafting.one_run(texts, 30, 10, texts.__getitem__, random.Random(0))
    assert [text.made for text in texts.values()] == [30, 30]
    assert all(text.closed for text in texts.values())
    assert sum(one != other for one, other in itertools.pairwise(rounds)) >= 3  # three turns each, in any order
    assert speeds == {0: 1, "auto": 3}


def test_lists_are_taken_whole_and_the_best_first() -> None:
    lists = np.array([[0, 2], [1, 5], [3, 4]], np.int32)
    logits = np.array([1, 9, 3, 4, 5, 1], np.float32)  # means: 2, 5, 4.5
    assert head_index.reached(logits, lists, 1).tolist() == [False, True, False, False, False, True]
    assert head_index.reached(logits, lists, 2).tolist() == [False, True, False, True, True, True]
    assert head_index.reached(logits, lists, 3).all()


@pytest.mark.parametrize("overlap", [0.0625, 0.6])
def test_as_many_experts_are_read_as_the_formula_says(overlap: float) -> None:
    config = official_target("26b")
    assert config.experts
    counts = expert_prices.read(overlap, 400, np.random.default_rng(0)).mean(axis=0) / len(config.layers)
    expected = [experts_read(config.experts, rows, overlap) for rows in range(1, expert_prices.MOST + 2)]
    assert counts == pytest.approx(expected, rel=0.02)


def test_a_policy_that_knows_prices_is_not_slower() -> None:
    dice = np.random.default_rng(0)
    prices = np.outer(1 + dice.random(500), [1, 1.1, 1.2]) + dice.random((500, 3)) * [0, 2, 4]
    accepted = (dice.random(500)[:, None] < [0.8, 0.6]).sum(axis=1)
    mean = np.broadcast_to(prices.mean(axis=0), prices.shape)
    gains = np.array([0, 0.8, 1.4])
    known, alike = (expert_prices.speed(prices, believed, accepted, gains) for believed in (prices, mean))
    assert known > 1.05 * alike
