"""The output parser: content, reasoning and calls, however the text is split."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.text.output_parser import (
    CALL,
    MARKS,
    OutputDelta,
    OutputParser,
    ends_in_reasoning,
    marks_of,
)


def marked(text: str) -> str:
    for name, mark in MARKS.items():
        text = text.replace(name, mark)
    return text


def read(text: str, cuts: list[int] | None = None, in_reasoning: bool = False) -> list[OutputDelta]:
    """The parts of an answer, deltas of a kind joined."""
    reader = OutputParser(in_reasoning)
    text = marked(text)
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts or ()), len(text)]
    joined: list[OutputDelta] = []
    for part in [
        *(p for a, b in pairwise(edges) for p in reader.push(text[a:b])),
        *reader.finish(),
    ]:
        if joined and joined[-1].kind == part.kind != "call":
            part = replace(part, text=joined.pop().text + part.text)
        joined.append(part)
    return joined


def test_thought_then_content() -> None:
    assert read("<|channel>thought\nHm.\n\nYes.\n<channel|>Hello") == [
        OutputDelta("reasoning", "Hm.\n\nYes."),
        OutputDelta("content", "Hello"),
    ]


def test_an_empty_thought_is_nothing() -> None:
    assert read("<|channel>thought\n<channel|>Hi") == [OutputDelta("content", "Hi")]


def test_a_thought_that_the_prompt_opened() -> None:
    prompt = "<bos><|turn>model\n<|channel>thought\n"
    assert ends_in_reasoning(prompt)
    assert not ends_in_reasoning(prompt + "x<channel|>")
    assert read("so\n<channel|>Hi", in_reasoning=True) == [OutputDelta("reasoning", "so"), OutputDelta("content", "Hi")]


def test_calls_among_content() -> None:
    text = 'See. <|tool_call>call:get_weather{city:<|"|>Sankt "Pölten"\n<|"|>,days:3,dry:true}<tool_call|>'
    parts = read(text + "<|tool_call>call:now{}<tool_call|>")
    assert [part.kind for part in parts] == ["content", "call", "arguments", "call", "arguments"]
    assert (parts[1].text, parts[3].text) == ("get_weather", "now")
    assert json.loads(parts[2].text) == {"city": 'Sankt "Pölten"\n', "days": 3, "dry": True}
    assert json.loads(parts[4].text) == {}


@pytest.mark.parametrize(
    ("notation", "value"),
    [
        ("a:1", {"a": 1}),
        (" a : -2.5e3 , b : null", {"a": -2500.0, "b": None}),
        ("a:{b:[1,2,{c:<q>x<q>}]},d:[]", {"a": {"b": [1, 2, {"c": "x"}]}, "d": []}),
        ('a:"plain, quotes: {}",b:1', {"a": "plain, quotes: {}", "b": 1}),
        ('"a":"b"', {"a": "b"}),
        ("<q>a<q>:<q><q>", {"a": ""}),
        ("url:http://example.org/a:b,c:1", {"url": "http://example.org/a:b", "c": 1}),
        ("city:Paris", {"city": "Paris"}),
        ("a:NaN", {"a": "NaN"}),
        ("a:<q>left open", {"a": "left open"}),
        ("a:{b:1", {"a": {"b": 1}}),
        ("a", {"a": None}),
        ("a:1,", {"a": 1}),
        ("a:[1,2,],b:[,3]", {"a": [1, 2], "b": [3]}),
        ("a:<q>x<q> y,b:", {"a": "x", "b": None}),
        ("a:'x' y", {"a": "'x' y"}),
    ],
)
def test_arguments(notation: str, value: object) -> None:
    closing = "" if value in ({"a": "left open"}, {"a": {"b": 1}}, {"a": None}) else "}"
    text = "<|tool_call>call:f{" + notation.replace("<q>", '<|"|>') + closing
    for end in ("<tool_call|>", "}\n<tool_call|>tail" if closing else ""):
        parts = read(text + end)
        assert parts[0] == OutputDelta("call", "f", 0)
        assert json.loads(parts[1].text) == value


def test_what_is_no_call_is_content() -> None:
    assert read("<|tool_call>nothing<tool_call|>x") == [OutputDelta("content", "nothingx")]
    assert read("<|tool_call>nothing") == []  # cut in a name: neither a call nor anything to read


letters = st.characters(exclude_categories=["Cs"], exclude_characters="".join(MARKS.values()))
texts = st.text(letters, max_size=12).filter(lambda text: not any(name in text for name in MARKS))
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(
    thought=texts,
    content=texts,
    arguments=st.dictionaries(keys, values, max_size=4),
    cuts=st.lists(st.integers(0, 999)),
)
def test_every_answer_is_read_alike_in_any_pieces(thought: str, content: str, arguments: dict, cuts: list[int]) -> None:
    call = f"<|tool_call>call:f{gemma_notation(arguments)}<tool_call|>"
    parts = {part.kind: part.text for part in read(f"<|channel>thought\n{thought}\n<channel|>{content}{call}", cuts)}
    assert parts.get("reasoning", "") == thought.rstrip("\n")
    assert parts.get("content", "") == content
    assert parts["call"] == "f"
    assert json.loads(parts["arguments"]) == arguments


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(st.sampled_from([*MARKS.values(), *'call:f{}[],"\\a1 \n']), max_size=30),
    cuts=st.lists(st.integers(0, 99)),
)
def test_no_answer_breaks_it(text: str, cuts: list[int]) -> None:
    parts = read(text, cuts)
    assert parts == read(text)
    assert not any(mark in part.text for part in parts for mark in MARKS.values())
    for part in parts:
        assert part.kind != "arguments" or isinstance(json.loads(part.text), dict)


def test_marks_are_those_the_vocabulary_has() -> None:
    assert marks_of({"<|tool_call>": 48}.get) == {48: CALL}


def gemma_notation(value: object) -> str:
    """A JSON value in Gemma's notation, special tokens written out; the inverse of `ArgumentConverter`."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{gemma_notation(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(gemma_notation, value)) + "]"
    return json.dumps(value)
