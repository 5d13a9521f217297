"""Sampling from the command line, on the bundled pair: settings, seeds, stop strings, log-probabilities."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

import paceline
from paceline.cli.conversation import Conversation
from paceline.cli.main import run
from paceline.sampling_params import PARAMETERS, SamplingParams
from paceline.server.schemas import ChatRequest

PROMPT = "class Stack:"


def generate(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run(["generate", PROMPT, "--raw", "--json", "--max-tokens", "40", "--quant", "q8", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_models_own_settings_are_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    found = generate(capsys)["sampling"]
    assert (found["temperature"], found["top_k"], found["top_p"]) == (1.0, 64, 0.95)
    assert 0 <= found["seed"] < 1 << 53


@pytest.mark.parametrize("options", [("--temperature", "0.7"), ("--top-k", "0", "--top-p", "1", "--min-p", "0.05")])
def test_reported_seed_reproduces_the_text(capsys: pytest.CaptureFixture[str], options: tuple[str, ...]) -> None:
    first = generate(capsys, *options, "--draft-tokens", "0")
    seed = str(first["sampling"]["seed"])
    for depth in ("1", "5", "auto"):
        again = generate(capsys, *options, "--seed", seed, "--draft-tokens", depth)
        assert again["text"] == first["text"]
        assert again["sampling"] == first["sampling"]
    assert generate(capsys, *options, "--seed", str(int(seed) ^ 1))["text"] != first["text"]


def test_penalties_and_bias_reach_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    plain = generate(capsys, "--temperature", "0")
    token = plain["tokens"][0]
    assert token not in generate(capsys, "--temperature", "0", "--logit-bias", f"{token}=-1000")["tokens"]
    penalised = generate(capsys, "--temperature", "0", "--repetition-penalty", "1.5", "--frequency-penalty", "2")
    assert len(set(penalised["tokens"])) > len(set(plain["tokens"]))


def test_a_stop_string_ends_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    whole = generate(capsys, "--seed", "1")
    stop = whole["text"][20:24]
    cut = generate(capsys, "--seed", "1", "--stop", "never written", "--stop", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish"] == "stop"


def test_log_probabilities(capsys: pytest.CaptureFixture[str]) -> None:
    drafted = generate(capsys, "--seed", "2", "--logprobs", "3", "--draft-tokens", "4")
    plain = generate(capsys, "--seed", "2", "--logprobs", "3", "--draft-tokens", "0")
    assert drafted["logprobs"] == plain["logprobs"]
    assert len(plain["logprobs"]) == len(plain["tokens"])
    for report in plain["logprobs"]:
        values = [alternative["logprob"] for alternative in report["top"]]
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1.0001
        assert report["logprob"] <= values[0]


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--temperature", "-1"), "temperature is -1.0"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "1.01"), "top_p is 1.01; it must be between 0 and 1"),
        (("--min-p", "-0.5"), "min_p is -0.5"),
        (("--top-k", "-3"), "top_k is -3"),
        (("--repetition-penalty", "0"), "repetition_penalty is 0.0"),
        (("--seed", "-1"), "seed is -1"),
        (("--stop", ""), "a stop string is empty"),
        (("--logit-bias", "99999=1"), "token 99999"),
        (("--logit-bias", "5"), "'5'; give a token id and a number"),
        (("--logit-bias", "5=nan"), "'5=nan'"),
        (("--logprobs", "2"), "needs --json"),
        (("--json", "--logprobs", "101"), "logprobs is 101"),
    ],
)
def test_bad_settings(capsys: pytest.CaptureFixture[str], options: tuple[str, ...], cause: str) -> None:
    assert run(["generate", PROMPT, "--raw", "--quant", "q8", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("paceline: error: ")
    assert cause in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_reaches_all_interfaces(capsys: pytest.CaptureFixture[str], name: str) -> None:
    kind, option = PARAMETERS[name].kind, "--" + name.replace("_", "-")
    assert generate(capsys, option, "1")["sampling"][name] == kind(1)
    assert getattr(ChatRequest(messages=[{"role": "user", "content": "Hi"}], **{name: 1}), name) == kind(1)
    conversation = Conversation(paceline.load("tiny-python", quant="q8", draft_tokens=0), SamplingParams())
    conversation.handle(f"/set {name} 1")
    assert getattr(conversation.sampling, name) == kind(1)
