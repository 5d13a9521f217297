"""The engine over the scripted backend: prompts, limits, and streams that are dropped early."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from paceline.engine.acceptance_monitor import AcceptanceMonitor
from paceline.engine.draft_control import DraftControl
from paceline.engine.engine import Engine, Stream
from paceline.engine.scheduler import Scheduler
from paceline.errors import ContextError, PromptError, SettingsError
from paceline.types import SamplingParams
from tests.fixtures.backends import Ids, proposers_of
from tests.fixtures.scripted_backend import ScriptedBackend


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [2] * bos + [ord(letter) % 64 for letter in text]

    def fewest_tokens(self, text: str) -> int:
        return len(text)

    def detokenizer(self, marks: object = None) -> Ids:
        return Ids()


class Template:
    def render(self, messages: list) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)


def engine(**settings: object) -> Engine:
    backend = settings.setdefault("backend", ScriptedBackend(slots=1, context=64))
    chunk = settings.pop("prompt_chunk", 8)
    defaults = {
        "tokenizer": Letters(),
        "chat_template": Template(),
        "target_config": SimpleNamespace(),
        "drafter_config": None,
        "stop_ids": frozenset(),
        "sampling": SamplingParams(),
        "draft_tokens": 4,
        "scheduler": Scheduler(backend, proposers_of(backend), chunk),
    }
    return Engine(**{**defaults, **settings})


def test_prompts_of_every_kind() -> None:
    e = engine()
    assert e.encode("ab", raw=True) == [2, 33, 34]
    assert e.encode("ab") == e.tokenizer.encode("[user]ab")
    assert e.encode([{"role": "system", "content": "x"}]) == e.tokenizer.encode("[system]x")
    assert e.encode([5, 6]) == e.encode(np.array([5, 6])) == [5, 6]


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ([], "empty"),
        ([5, 64], "token 64 is outside"),
        ([-1], "token -1 is outside"),
        ([5, {"role": "user", "content": "x"}], "mixes"),
        ([5, "x"], "'x', which is neither"),
        ([5, True], "True, which is neither"),
        ([5.5], "5.5, which is neither"),
        ([1] * 64, "64 tokens and the context holds 64"),
    ],
)
def test_prompts_that_cannot_be_used(prompt: list, cause: str) -> None:
    with pytest.raises(PromptError, match=cause):
        engine().stream(prompt)


def test_no_template_means_raw() -> None:
    with pytest.raises(PromptError, match="--raw"):
        engine(chat_template=None).stream("hello")


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"draft_tokens": -1},
        {"draft_tokens": 16},
        {"draft_tokens": "many"},
        {"logprobs": 101},
        {"logprobs": -1},
        {"regex": "a", "schema": {}},
        {"stop": [""]},
        {"stop": ""},
    ],
)
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(SettingsError):
        engine().stream([1], **settings)


def test_generate_and_stream_agree() -> None:
    e = engine()
    whole = e.generate([1, 2, 3], max_tokens=20)
    events = list(e.stream([1, 2, 3], max_tokens=20, draft_tokens=0))
    assert "".join(event.text for event in events) == whole.text
    assert tuple(delta.token for event in events for delta in event.deltas) == whole.tokens
    assert whole.finish == events[-1].finish == "length"
    assert whole.statistics.drafted > 0


def test_streams_wait_for_a_slot() -> None:
    e = engine()
    first, second = e.stream([1, 2, 3], max_tokens=20), e.stream([4], max_tokens=3)
    next(first)
    written = [event.text for event in second]
    assert "".join(written) == e.generate([4], max_tokens=3).text
    assert first.sequence.finish == "length"
    assert len([delta for event in first for delta in event.deltas]) > 0
    assert e.backend.open_slot() == 0


def test_closing_a_stream_frees_its_slot() -> None:
    e = engine()
    with e.stream([1, 2, 3]) as stream:
        next(stream)
    assert stream.sequence.finish == "cancelled"
    assert list(stream) == []
    assert e.backend.open_slot() == 0


def test_streams_share_passes() -> None:
    e = engine(backend=ScriptedBackend(slots=3, context=128))
    prompts = [[1, 2, 3], list(range(40)), [9]]
    alone = [e.generate(prompt, max_tokens=30).tokens for prompt in prompts]
    streams = [e.stream(prompt, max_tokens=30) for prompt in prompts]
    passes = 0
    while e.scheduler.busy:
        e.scheduler.tick()
        passes += 1
    assert [tuple(stream.sequence.generated) for stream in streams] == alone
    assert passes < 40  # alone they take 30 and more each without drafts, 3 times


def test_dropped_streams_free_their_slots() -> None:
    e = engine()
    for _ in e.stream([1, 2, 3]):
        break
    assert isinstance(e.stream([4]), Stream)


def test_seeds_are_taken_and_reported() -> None:
    e = engine(sampling=SamplingParams(temperature=1.0))
    one, two = (e.generate([1, 2, 3], max_tokens=20) for _ in range(2))
    assert one.sampling.seed != two.sampling.seed
    assert one.tokens != two.tokens
    assert e.generate([1, 2, 3], sampling=one.sampling, max_tokens=20, draft_tokens=0).tokens == one.tokens


def test_stop_strings_with_any_draft() -> None:
    e = engine()
    whole = e.generate([1, 2, 3], max_tokens=40).text
    stop = whole[len(whole) // 2 :][:9]
    cut = [e.generate([1, 2, 3], stop=[stop], max_tokens=40, draft_tokens=depth) for depth in (0, 2, 7, "auto")]
    assert {(g.text, g.tokens, g.finish) for g in cut} == {(whole[: whole.index(stop)], cut[0].tokens, "stop")}
    assert len(cut[0].tokens) < 40


def test_logprobs_do_not_depend_on_drafts() -> None:
    e = engine(sampling=SamplingParams(temperature=0.8, top_k=5, seed=3))
    plain, drafted = (e.generate([1, 2, 3], logprobs=4, max_tokens=30, draft_tokens=depth) for depth in (0, 5))
    assert plain.logprobs == drafted.logprobs
    assert len(plain.logprobs) == len(plain.tokens) == 30
    assert all(len(report.top) == 4 and report.token <= report.top[0][1] for report in plain.logprobs)
    assert e.generate([1, 2, 3], max_tokens=3).logprobs == ()


def test_useless_drafters_are_named_once() -> None:
    said: list[str] = []
    backend = ScriptedBackend(slots=1, context=2048, truth=0.0)
    proposer = DraftControl(True, False, AcceptanceMonitor(("the model is fine-tuned",), said.append))
    e = replace(engine(backend=backend), scheduler=Scheduler(backend, [proposer], 8))
    for _ in range(4):
        e.generate([1, 2, 3], draft_tokens="auto", max_tokens=1500)
    assert e.acceptance
    assert e.acceptance.cause == "pair"
    assert len(said) == 1
    assert "0% of first drafts are accepted, 75% are usual: the model is fine-tuned" in said[0]


def test_what_cannot_fit_is_refused_by_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(self: Letters, text: str, *, bos: bool = False) -> list[int]:
        raise AssertionError("tokenized")

    monkeypatch.setattr(Letters, "encode", encode)
    e = engine()
    for ask in (
        lambda: e.stream("x" * 64, raw=True),
        lambda: e.stream("x" * 64),
        lambda: e.stream([{"role": "user", "content": "x" * 64}]),
        lambda: e.encode_text("x" * 64),
    ):
        with pytest.raises(ContextError, match="at least"):
            ask()
