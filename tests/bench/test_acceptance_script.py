"""The prompts of bench/acceptance.py, and a run on the bundled pair."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
script = importlib.import_module("acceptance")


def test_prompts() -> None:
    """A hundred different ones, that begin at the beginning of a word."""
    prompts = script.prose(50) + script.code(50)
    assert len(prompts) == len(set(prompts)) == 100
    assert all(len(prompt) > 100 for prompt in prompts)
    assert script.prose(50) == script.prose(50)


def test_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["acceptance.py", "tiny-python", "--prompts", "4", "--tokens", "24"])
    script.main()
    found = json.loads(capsys.readouterr().out)
    for way in ("greedy", "sampled"):
        assert found[way]["texts"] == 4
        assert 1 <= found[way]["tokens_a_round"] <= 5
        assert found[way]["tokens_per_s"].keys() == {"plain", "auto"}
