"""Grammars come from clients, and tokenizers from files: they compile in bounded time, or are refused with one line."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from paceline.checkpoint.location import ASSETS
from paceline.errors import SettingsError
from paceline.text.grammar import Grammars, json_rule, regex_rule
from paceline.text.tool_grammar import call_grammar
from tests.fixtures.text_samples import byte_level, gemma_like

TOKENIZER = (ASSETS / "tiny-python" / "tokenizer.json").read_text()
TEXTS = {token: text for text, token in json.loads(TOKENIZER)["model"]["vocab"].items()}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOKENIZER, 4096, [1, 5])


@pytest.mark.parametrize("stop_ids", [[], [-1], [4096, 1 << 40]])
def test_a_model_whose_texts_have_no_end(stop_ids: list[int]) -> None:
    with pytest.raises(SettingsError, match="a token that ends the text"):
        Grammars(TOKENIZER, 4096, stop_ids)


def test_stop_ids_beyond_the_vocabulary_are_left_out() -> None:
    matcher = Grammars(TOKENIZER, 4096, [5000, 1, -7]).regex("a?")
    assert matcher.allowed()[1]
    matcher.failed = True  # whatever happens to the matcher, the text can end
    assert np.flatnonzero(matcher.allowed()).tolist() == [1]
    assert matcher.failed


@pytest.mark.parametrize("kind", [gemma_like, byte_level])
@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "Sequence", "decoders": []},
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "Fuse"},
        None,
        7,
    ],
)
def test_tokenizers_that_the_compiler_does_not_know(kind: Any, decoder: object) -> None:
    content = json.loads(kind().to_str()) | {"decoder": decoder}
    with pytest.raises(SettingsError, match="cannot be used with this model's tokenizer"):
        Grammars(json.dumps(content), 600, [1])


def chain(count: int) -> str:
    rules = [f'r{i}: "a" r{i + 1} | "b"' for i in range(count)]
    return "\n".join(["start: r0", *rules, f'r{count}: "c"'])


def test_long_chains_of_rules_do_not_overflow_the_stack() -> None:
    """In a process of its own, which an overflow would end."""
    program = (
        "from tests.text.test_grammar import *\n"
        "matcher = Grammars(TOKENIZER, 4096, [1]).lark(chain(20_000), composed=True)\n"
        "for _ in range(50): assert matcher.copy().allowed().any(); matcher.advance(matcher.allowed().argmax())\n"
        "string = {'type': 'string'}; schema = string\n"
        "for i in range(9): schema = {'properties': {**{f'p{j}': string for j in range(200)}, 'inner': schema}}\n"
        "grammar = call_grammar([{'name': 'f', 'parameters': schema}], lambda name: 7, several=True)\n"
        "Grammars(TOKENIZER, 4096, [1]).lark(grammar, composed=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("pattern", ["a" * 40_000, "(", "(" * 1000, "[a-z]?" * 3000, "\ud800", r"(a)\1", "(?=a)"])
def test_expressions_that_cannot_be_used(pattern: str, grammars: Grammars) -> None:
    with pytest.raises(SettingsError, match="regular expression"):
        grammars.regex(pattern)
    with pytest.raises(SettingsError, match=r"regular expression|the grammar cannot be used"):
        grammars.lark(f"start: {regex_rule(pattern)}")


LARGE = {
    "characters": {"const": "x" * 300_000},
    "keys": {"properties": {"x" * 300_000: True}},
    "an expression": {"type": "string", "pattern": "x" * 40_000},
    "several": {"properties": {f"p{i}": {"pattern": "x" * 10_000} for i in range(4)}},
    "keys that are expressions": {"patternProperties": {"x" * 40_000: True}},
    "bytes": {"const": b"x"},
    "a set": {"enum": {1, 2}},
    "a number as a key": {"properties": {1: True}},
    "digits": {"const": 10**5000},
}


@pytest.mark.parametrize("name", LARGE)
def test_schemas_that_cannot_be_used(name: str, grammars: Grammars) -> None:
    with pytest.raises(SettingsError):
        json_rule(LARGE[name])
    with pytest.raises(SettingsError):
        call_grammar([{"name": "f", "parameters": LARGE[name]}], lambda _: 7, several=True)


@pytest.mark.parametrize("grammar", ["", "nonsense", "start: (" + "(" * 5000, "start: start", "\ud800", "\x00"])
def test_grammars_that_cannot_be_used(grammar: str, grammars: Grammars) -> None:
    with pytest.raises(SettingsError, match="the grammar cannot be used"):
        grammars.lark(grammar)
    with pytest.raises(SettingsError, match="may have 65536 characters"):
        grammars.lark("start: " + '"a" ' * 20_000)
    with pytest.raises(SettingsError, match="larger than"):
        grammars.lark("start: " + '"a" ' * 300_000, composed=True)


def test_large_schemas_of_ordinary_kinds_compile(grammars: Grammars) -> None:
    kinds = ["date-time", "email", "uuid", "uri", "ipv4", "ipv6", "hostname"]
    for inner in (
        lambda i: {"type": ["string", "null"], "description": "what it means " * 20},
        lambda i: {"type": "string", "format": kinds[i % len(kinds)]},
        lambda i: {"type": "integer", "minimum": -i * 7, "maximum": i * 1234567},
        lambda i: {"enum": [f"value {i} {j}" for j in range(20)]},
    ):
        schema = {"type": "object", "properties": {f"property_{i}": inner(i) for i in range(200)}}
        assert grammars.json_schema(schema).allowed().any()


def test_equal_schemas_share_a_rule_and_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out at each mention, this schema would be a gigabyte of text."""
    schema: dict[str, Any] = {"type": "string", "description": "x" * 200_000}
    for _ in range(10):
        schema = {"type": ["array", "null"] * 200, "items": schema}
    written = []
    monkeypatch.setattr(json, "dumps", lambda value, dumps=json.dumps: (written.append(dumps(value)), written[-1])[1])
    grammar = call_grammar([{"name": "f", "parameters": schema}], lambda _: 7, several=False)
    assert len(grammar.splitlines()) < 50
    assert sum(map(len, written)) < 1_000_000


def test_several_threads(grammars: Grammars) -> None:
    results: list[object] = []

    def use(seed: int) -> None:
        dice = random.Random(seed)
        own = Grammars(TOKENIZER, 4096, [1, 5])
        for _ in range(20):
            number = dice.randrange(1000)
            for one in (own, grammars):
                tokens = np.flatnonzero(one.regex(f"{number}").allowed()).tolist()
                results.append(all(str(number).startswith(TEXTS[token]) for token in tokens) and bool(tokens))

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 320


def test_a_panic_ends_the_text_wherever_it_happens(grammars: Grammars) -> None:
    class Panic(BaseException):
        pass

    class Panicking:
        """A matcher that panics in one method."""

        def __init__(self, matcher: Any, name: str) -> None:
            self._matcher, self._name = matcher, name

        def __getattr__(self, name: str) -> Any:
            return self._panic if name == self._name else getattr(self._matcher, name)

        def _panic(self, *_: object) -> None:
            raise Panic

    for name in ("compute_bitmask", "consume_token", "compute_ff_tokens"):
        matcher = grammars.regex("[a-z]{3}")
        matcher._matcher = Panicking(matcher._matcher, name)
        for _ in range(2):
            matcher.forced()
            token = int(matcher.allowed().argmax())
            matcher.advance(token)
        assert matcher.failed
        assert matcher.forced() == ()
        assert np.flatnonzero(matcher.allowed()).tolist() == sorted(matcher._stop_ids)
