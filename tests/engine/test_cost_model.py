"""Costs of rounds: measured once, kept, and measured again when what is kept cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.decode.draft_length import MAX_DEPTH
from paceline.engine.cost_model import load_costs, measure_costs
from paceline.types import SamplingParams
from tests.fixtures.scripted_backend import ScriptedBackend

GREEDY = SamplingParams()


def test_costs_of_every_depth() -> None:
    backend = ScriptedBackend(slots=1)
    costs = measure_costs(backend, GREEDY)
    assert len(costs.rounds) == MAX_DEPTH + 1
    assert min(costs.rounds) > 0 <= costs.token
    assert costs.shared == ()
    assert backend.open_slot() == 0  # given back


def test_costs_of_several_at_once() -> None:
    costs = measure_costs(ScriptedBackend(slots=5), GREEDY)
    assert [count for count, _ in costs.shared] == [2, 4, 5]
    assert {len(rounds) for _, rounds in costs.shared} == {len(costs.rounds)}


def test_a_short_context_is_priced_as_far_as_it_goes() -> None:
    costs = measure_costs(ScriptedBackend(context=16), GREEDY)
    assert len(costs.rounds) == 5


DAMAGED = [
    "",
    "{}",
    "[1]",
    '{"rounds_ms": {"1": [0, 0]}, "token_ms": 0}',
    '{"rounds_ms": {"2": [1, 1]}, "token_ms": 0}',
    '{"rounds_ms": {"1": ["x"]}, "token_ms": 0}',
    '{"rounds_ms": [1, 2], "token_ms": 0}',
    '{"rounds_ms": {"1": [1, 2], "2": [1, 2, 3]}, "token_ms": 0}',  # of unlike lengths
    '{"rounds_ms": {"1": [1, 2], "x": [1, 2]}, "token_ms": 0}',
    '{"rounds_ms": {"1": [1, 1e999]}, "token_ms": 0}',
    '{"rounds_ms": {"1": [1, NaN]}, "token_ms": 0}',
    '{"rounds_ms": {"1": [1, 2]}, "token_ms": ' + "9" * 400 + "}",
    '{"rounds_ms": {"1": [1, 2]}, "token_ms": null}',
    "[" * 100_000,
]


@pytest.mark.parametrize("damage", [None, *DAMAGED])
def test_costs_are_kept(tmp_path: Path, damage: str | None) -> None:
    backend = ScriptedBackend(slots=2)
    first = load_costs(backend, GREEDY, "about", tmp_path / "new", print)
    (path,) = (tmp_path / "new").iterdir()
    if damage is not None:
        path.write_text(damage)
    again = load_costs(backend, GREEDY, "about", tmp_path / "new", print)
    assert (again == first) == (damage is None)
    assert json.loads(path.read_text())["rounds_ms"]["1"] == list(again.rounds)
    assert [p.suffix for p in path.parent.iterdir()] == [".json"]


@pytest.mark.slow
def test_other_settings_have_other_costs(tmp_path: Path) -> None:
    for about, sampling in (("a", GREEDY), ("b", GREEDY), ("a", SamplingParams(temperature=1.0))):
        load_costs(ScriptedBackend(), sampling, about, tmp_path, print)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load_costs(ScriptedBackend(), GREEDY, "about", blocked, print).rounds
