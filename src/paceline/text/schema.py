"""Size limits of JSON schemas, regular expressions and grammars, which clients send, and which take time to compile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.errors import SettingsError

MAX_NODES, MAX_PROPERTIES, MAX_REFERENCES, MAX_DEPTH = 5_000, 512, 256, 64
MAX_CHARACTERS = 256 * 1024  # strings and keys together
MAX_EXPRESSION = 32 * 1024  # characters of regular expressions: compiling them can take time by their square
MAX_GRAMMAR = 64 * 1024  # characters of a grammar; more takes seconds to compile
EXPRESSION_KEYS = ("pattern", "patternProperties")


def check_schema(schema: Any) -> None:
    """Reject a schema that would take the grammar compiler too long, or overflow its stack.

    Raises:
        SettingsError: too large or too deep, an object with too many properties, or not JSON.
    """
    nodes = references = characters = expressions = 0
    left = [(schema, 0)]
    while left:
        value, depth = left.pop()
        nodes += 1
        if isinstance(value, Mapping):
            _check_keys(value)
            references += "$ref" in value
            characters += sum(map(len, value))
            expressions += sum(_expression_size(value.get(key)) for key in EXPRESSION_KEYS)
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list | tuple):
            left += [(inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            characters += len(value)
        elif not isinstance(value, int | float | None):
            raise SettingsError(f"a JSON schema holds a {type(value).__name__}, which JSON does not have; change it")
        broad = isinstance(value, Mapping | list | tuple) and len(value) > MAX_PROPERTIES
        if broad or nodes > MAX_NODES or references > MAX_REFERENCES or depth > MAX_DEPTH:
            raise SettingsError(
                f"a JSON schema may have {MAX_NODES} values, {MAX_PROPERTIES} in one object or list, "
                f"{MAX_REFERENCES} references and {MAX_DEPTH} levels; make it smaller"
            )
        if characters > MAX_CHARACTERS or expressions > MAX_EXPRESSION:
            raise SettingsError(
                f"a JSON schema may have {MAX_CHARACTERS} characters, and {MAX_EXPRESSION} in regular expressions; "
                "make it smaller"
            )


def check_expression(pattern: str) -> str:
    """Return a regular expression that is not too large to compile, else raise `SettingsError`."""
    if len(pattern) > MAX_EXPRESSION:
        raise SettingsError(f"a regular expression may have {MAX_EXPRESSION} characters; make it shorter")
    return pattern


def check_grammar(grammar: str) -> str:
    """Return a grammar that is not too large to compile, else raise `SettingsError`."""
    if len(grammar) > MAX_GRAMMAR:
        raise SettingsError(f"a grammar may have {MAX_GRAMMAR} characters; make it shorter")
    return grammar


def _check_keys(value: Mapping[Any, Any]) -> None:
    if odd := next((key for key in value if not isinstance(key, str)), None):
        raise SettingsError(f"a JSON schema has the key {odd!r}, which is no string; change it")


def _expression_size(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    return sum(map(len, value)) if isinstance(value, Mapping) else 0
