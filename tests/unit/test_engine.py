"""The engine over the fake backend: prompts, limits, and streams that are left early."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from paceline.backends.fake import FakeBackend
from paceline.engine.engine import Engine, Stream
from paceline.errors import BackendError, PromptError, SettingsError
from tests.support import Ids


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [2] * bos + [ord(letter) % 64 for letter in text]

    def detokenizer(self) -> Ids:
        return Ids()


class Template:
    def render(self, messages: list) -> str:
        return "".join(f"[{message['role']}]{message['content']}" for message in messages)


def engine(**settings: object) -> Engine:
    backend = FakeBackend(slots=1, context=64)
    defaults = {
        "backend": backend,
        "tokenizer": Letters(),
        "chat_template": Template(),
        "target_config": SimpleNamespace(),
        "drafter_config": None,
        "stop_ids": frozenset(),
        "quant": "f32",
        "threads": 1,
        "weight_bytes": 0,
        "draft_tokens": 4,
        "prompt_chunk": 8,
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


@pytest.mark.parametrize("settings", [{"max_tokens": 0}, {"draft_tokens": -1}, {"draft_tokens": 16}])
def test_settings_out_of_range(settings: dict) -> None:
    with pytest.raises(SettingsError):
        engine().stream([1], **settings)


def test_generate_and_stream_agree() -> None:
    e = engine()
    whole = e.generate([1, 2, 3], max_tokens=20)
    events = list(e.stream([1, 2, 3], max_tokens=20, draft_tokens=0))
    assert "".join(event.text for event in events) == whole.text
    assert tuple(piece.token for event in events for piece in event.pieces) == whole.tokens
    assert whole.finish == events[-1].finish == "length"
    assert whole.statistics.drafted > 0


def test_a_stream_holds_its_slot_until_it_ends() -> None:
    e = engine()
    with e.stream([1, 2, 3]) as stream:
        next(stream)
        with pytest.raises(BackendError, match="slots are taken"):
            e.stream([4])
    assert stream.sequence.finish == "cancelled"
    assert list(stream) == []
    assert e.generate([4], max_tokens=3).finish == "length"


def test_a_stream_left_early_gives_its_slot_back() -> None:
    e = engine()
    for _ in e.stream([1, 2, 3]):
        break
    assert isinstance(e.stream([4]), Stream)
