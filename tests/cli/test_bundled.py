"""The main job as a new user meets it: the bundled pairs, no options, no network."""

import json
from typing import Any

import pytest

from paceline.checkpoint.location import ASSETS
from paceline.cli.main import run
from tests.fixtures.real_gguf import installed_model

PROMPT = "def read_lines(path):"


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    """On Gemma 3 270M, or on tiny-python where that is not installed."""
    assert run(["demo", "--max-tokens", "48"]) == 0
    assert capsys.readouterr().out.endswith("same text: yes\n")


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


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_the_drafter_of_gemma3_270m(capsys: pytest.CaptureFixture[str], temperature: str) -> None:
    model = installed_model()
    settings = ["--raw", "--json", "--max-tokens", "64", "--temperature", temperature, "--top-k", "64", "--seed", "1"]
    found = []
    for drafts in ("0", "3"):
        assert run(["generate", "-m", model, "The ship left the harbour", *settings, "--draft-tokens", drafts]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[1]["acceptance_length"] > 1.2


def test_the_drafter_of_gemma3_270m_is_small() -> None:
    folder = ASSETS / "gemma3-270m-assistant"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6  # what the package may carry
    card = (folder / "README.md").read_text()
    assert "Gemma Terms of Use" in card
    assert "subject to the Gemma Terms of Use found at" in (folder / "NOTICE").read_text()
    assert "Section 3.2" in (folder / "GEMMA_TERMS.txt").read_text()
