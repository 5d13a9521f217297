"""The drafter of the real pair, with a tiny target in its place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import paceline
from paceline.checkpoint import Checkpoint
from tests.fixtures.gemma3 import write_gemma3
from tests.fixtures.pairs import tiny_tokenizer, write_tokenizer
from tools import train_assistant


def test_modules_are_no_tests() -> None:
    found = train_assistant.modules()
    assert len(found) > 50
    assert any("class JSONDecoder" in text for text in found)
    assert not any("unittest.main()" in text for text in found)


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_gemma3(tmp_path / "target")
    write_tokenizer(tiny_tokenizer(), target)
    small = {"TARGET": str(target), "BEGINNINGS": 16, "LENGTH": 64, "VOCABULARY": 64, "INTERMEDIATE": 32}
    for name, value in small.items():
        monkeypatch.setattr(train_assistant, name, value)
    monkeypatch.setattr(train_assistant, "modules", lambda: ["import this\n" * 40])
    monkeypatch.setattr(train_assistant, "bundled_prompts", lambda _: ["Once", "Twice"])
    for start in ([], ["--from", str(tmp_path / "drafter")]):
        out = tmp_path / ("again" if start else "drafter")
        monkeypatch.setattr(sys, "argv", ["x", str(out), "--tokens", "1500", "--minutes", "0.03", *start])
        train_assistant.main()
        report = json.loads(capsys.readouterr().out)
        assert "after" in report["acceptance"]
        assert Checkpoint.open(out).drafter_config().draft_vocab_size == 64


def test_beginnings_are_lines_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_assistant, "TARGET", "tiny-python")
    monkeypatch.setattr(train_assistant, "BEGINNINGS", 40)
    engine = paceline.load("tiny-python", drafter="none", slots=16, draft_tokens=0, context=64)
    found = list(train_assistant.beginnings(engine, 0))
    assert 0 < len(found) <= 40
    assert all(line.isascii() and "\n" not in line and len(line.split()) > 3 for line in found)
    assert found == list(train_assistant.beginnings(engine, 0))
