"""Demanded calls: whatever a grammar of calls lets through is a call that fits its schema."""

from __future__ import annotations

import json
import random

import jsonschema_rs
import numpy as np
import pytest

from paceline.checkpoint.location import ASSETS
from paceline.errors import SettingsError
from paceline.text import Tokenizer
from paceline.text.grammar import Grammars
from paceline.text.output_parser import OutputParser, marks_of
from paceline.text.tool_grammar import call_grammar

FOLDER = ASSETS / "tiny-python"
PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["c", "f", 1, None]},
        "more": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": ["number", "boolean"]}}]},
        "tree": {"$ref": "#/$defs/tree"},
    },
    "required": ["days", "tree"],
    "additionalProperties": False,
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            "additionalProperties": False,
        }
    },
}
TOOLS = [{"name": "place", "parameters": PLACE}, {"name": "now"}, {"name": "any", "parameters": {"type": "object"}}]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.open(FOLDER / "tokenizer.json", {})


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars((FOLDER / "tokenizer.json").read_text(), 4096, [1, 5])


def written(grammar: str, grammars: Grammars, tokenizer: Tokenizer, seed: int) -> str:
    """A text of random allowed tokens, those that end something preferred, so that it ends."""
    dice, constraint = random.Random(seed), grammars.lark(grammar)
    decoder, text = tokenizer.detokenizer(marks=marks_of(tokenizer.token_id)), ""
    endings = {'<|"|>', "<tool_call|>", "}", "]", ",", ":", "<eos>"}
    for _ in range(2000):
        allowed = np.flatnonzero(constraint.allowed()).tolist()
        ending = [token for token in allowed if tokenizer.token_text(token) in endings]
        token = dice.choice(ending if ending and dice.random() < 0.7 else allowed)
        if token in (1, 5):
            return text
        constraint.advance(token)
        text += decoder.push(token)
    raise AssertionError("no end")


@pytest.mark.parametrize("seed", range(40))
def test_every_demanded_call_fits_its_schema(seed: int, grammars: Grammars, tokenizer: Tokenizer) -> None:
    text = written(call_grammar(TOOLS, tokenizer.token_id, several=True), grammars, tokenizer, seed)
    reader = OutputParser()
    parts = reader.push(text) + reader.finish()
    names = [part.text for part in parts if part.kind == "call"]
    arguments = [part.text for part in parts if part.kind == "arguments"]
    assert {part.kind for part in parts} == {"call", "arguments"}
    assert len(names) == len(arguments) >= 1
    for name, value in zip(names, arguments, strict=True):
        schema = next(tool for tool in TOOLS if tool["name"] == name).get("parameters", {"type": "object"})
        jsonschema_rs.validate(schema, json.loads(value))


def test_one_call_if_no_more_are_wanted(grammars: Grammars, tokenizer: Tokenizer) -> None:
    grammar = call_grammar([{"name": "now"}], tokenizer.token_id, several=False)
    constraint = grammars.lark(grammar)
    for token in tokenizer.encode("<|tool_call>call:now{}<tool_call|>"):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert set(np.flatnonzero(constraint.allowed()).tolist()) == {1, 5}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"type": "thing"}, "has type 'thing'"),
        ({"type": "object", "properties": {"a": 3}}, "holds 3"),
        ({"$ref": "#/$defs/none"}, "points to #/\\$defs/none"),
    ],
)
def test_schemas_that_cannot_be_followed(parameters: dict, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(SettingsError, match=message):
        call_grammar([{"name": "f", "parameters": parameters}], tokenizer.token_id, several=False)


def test_a_model_without_calls() -> None:
    with pytest.raises(SettingsError, match="does not support tool calls"):
        call_grammar([{"name": "f"}], lambda _: None, several=False)


def test_white_space_of_json_is_bounded(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.json_schema({"type": "object"})
    [space] = tokenizer.encode(" ")
    constraint.advance(*tokenizer.encode("{"))
    for _ in range(40):
        assert constraint.allowed()[space]
        constraint.advance(space)
    assert not constraint.allowed()[space]
