"""Mutated GGUF files, opened one after the other in one process."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.robustness.gguf_fuzz import check, good_files
from tests.robustness.gguf_mutators import CHANGES, mutated


def attack(cases: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.robustness.gguf_fuzz", "--cases", str(cases)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_mutated_files_are_opened_or_refused() -> None:
    attack(500)


@pytest.mark.slow
def test_thousands_of_mutated_files_are_opened_or_refused() -> None:
    attack(20_000)


def test_every_kind_of_change_shows(tmp_path: Path) -> None:
    """A mutator whose files are all opened, or that fails to change them, would attack nothing."""
    good, *_ = good_files(tmp_path)
    refused = set()
    for seed in range(400):
        kind, data = mutated(random.Random(seed), good)
        assert mutated(random.Random(seed), good) == (kind, data)  # a case depends on its seed alone
        (tmp_path / "case.gguf").write_bytes(data)
        if check(tmp_path / "case.gguf") == "refused":
            refused.add(kind)
    assert refused == CHANGES.keys()
