"""`--device`: the PyTorch backend from the command line, and one line for each device that is none."""

from __future__ import annotations

import json
import sys

import pytest

from paceline.cli.main import run

ARGUMENTS = (
    "generate",
    "--raw",
    "--json",
    "--quant",
    "f32",
    "--temperature",
    "0",
    "--max-tokens",
    "30",
    "class Stack:",
)


def test_the_text_is_that_of_the_cpu_backend(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for device in ("cpu", "torch:cpu"):
        assert run([*ARGUMENTS, "--device", device]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert len(texts[0]) > 30


@pytest.mark.parametrize("quant", ["q8", "q4"])
def test_quantised_weights(quant: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The CPU backend has the same grids, but quantises activations too: texts may part ways, though not at once."""
    texts = []
    for device in ("cpu", "torch:cpu"):
        assert run([*ARGUMENTS, "--quant", quant, "--device", device]) == 0
        out = capsys.readouterr()
        texts.append(json.loads(out.out)["text"])
    assert f"weights: {quant}" in out.err
    assert texts[0][:12] == texts[1][:12]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("nowhere", "PyTorch cannot use the device 'nowhere'"),
        ("cuda:77", "PyTorch cannot use the device 'cuda:77'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(device: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--device", device]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"paceline: error: {message}")


@pytest.mark.parametrize(
    "verb", [("chat",), ("serve",), ("verify", "tiny-python"), ("bench", "decode", "-m", "tiny-python")]
)
def test_every_verb_that_loads_takes_a_device(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*verb, "--device", "nowhere"]) == 2
    assert "PyTorch cannot use the device 'nowhere'" in capsys.readouterr().err.splitlines()[-1]


def test_without_pytorch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("paceline.backends.torch.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run([*ARGUMENTS, "--device", "cuda"]) == 2
    assert "pip install 'paceline[cuda]'" in capsys.readouterr().err


@pytest.mark.parametrize("drafts", ["0", "3"])
def test_cache_formats(drafts: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With f32 weights `auto` is f32, and the others give nearly its logits."""
    texts = []
    for kv in ("auto", "f32", "bf16", "q8"):
        assert run([*ARGUMENTS, "--kv", kv, "--draft-tokens", drafts]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
    assert all(text[:12] == texts[0][:12] for text in texts)


def test_unknown_cache_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--kv", "q4"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "paceline: error: unknown KV cache format 'q4'; use one of f32, bf16, q8 or auto"


def test_other_devices_choose_their_cache_format(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGUMENTS, "--device", "torch:cpu", "--kv", "q8"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("--device torch:cpu chooses the format of its KV cache; --kv q8 is for --device cpu")
