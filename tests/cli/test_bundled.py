"""The main job as a new user meets it: the bundled pair, no options, no network."""

import json
from typing import Any

import pytest

from paceline.cli.main import run

PROMPT = "def read_lines(path):"


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--max-tokens", "48"]) == 0
    out, _ = capsys.readouterr()
    same = next(line for line in out.splitlines() if line.startswith("same text"))
    assert same.split()[-1] == "yes"


def generate(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run(["generate", PROMPT, "--raw", "--json", "--max-tokens", "64", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("quant", ["f32", "bf16", "q8", "q4"])
def test_the_drafter_saves_rounds(capsys: pytest.CaptureFixture[str], quant: str) -> None:
    plain = generate(capsys, "--quant", quant, "--seed", "1", "--draft-tokens", "0")
    drafted = generate(capsys, "--quant", quant, "--seed", "1", "--draft-tokens", "4")
    assert drafted["text"] == plain["text"]
    assert drafted["tokens"] == plain["tokens"]
    assert drafted["rounds"] < plain["rounds"]
    assert drafted["acceptance_length"] > 1.3
    assert generate(capsys, "--quant", quant, "--seed", "1")["text"] == plain["text"]
    shares = drafted["acceptance_by_depth"]
    assert shares == sorted(shares, reverse=True)


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "tiny-python", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["drafter"]["fits"]
    assert found["skipped"] == {}
    files = {**found["files"], **{f"drafter/{name}": size for name, size in found["drafter"]["files"].items()}}
    assert sum(files.values()) <= 40e6  # what the package may carry
