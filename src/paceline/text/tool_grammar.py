"""A grammar of Gemma 4's tool calls from function declarations, for requests that require a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from paceline.errors import SettingsError, translated
from paceline.text.schema import check_schema

TEXT = r"/(.|\n)*/"
NUMBER = r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,15})?([eE][+-]?[0-9]{1,2})?/"
INTEGER = r"/-?(0|[1-9][0-9]{0,18})/"
KEY = r"/[A-Za-z_][A-Za-z0-9_-]{0,63}/"


def call_grammar(tools: Sequence[Mapping[str, Any]], token_id: Callable[[str], int | None], *, several: bool) -> str:
    """A grammar, in llguidance's dialect of Lark, that allows only calls of these functions.

    Args:
        tools: declarations with `name` and, optionally, `parameters`, a JSON schema.
        token_id: of special tokens; see `Tokenizer.token_id`.
        several: whether more than one call may be made.

    Raises:
        SettingsError: the model has no tokens for calls, or a schema is not supported.
    """
    ids = [token_id(name) for name in ("<|tool_call>", "<tool_call|>", '<|"|>')]
    if None in ids:
        raise SettingsError("this model does not support tool calls; set tool_choice to auto or none")
    check_schema([tool.get("parameters") for tool in tools])
    begin, end, quote = (f"<[{token}]>" for token in ids)
    rules = _Rules(quote)
    calls = []
    with translated(SettingsError, "the tools cannot be used: {reason}"):
        for tool in tools:
            parameters = tool.get("parameters") or {"type": "object", "properties": {}}
            arguments = rules.value(parameters, parameters)
            calls.append(f"{begin} {_literal('call:' + tool['name'])} {arguments} {end}")
    start = " | ".join(calls)
    return "\n".join([f"start: ({start}){'+' if several else ''}", *rules.lines])


def _literal(text: str) -> str:
    return json.dumps(text)


class _Rules:
    """Grammar rules for values of JSON schemas in Gemma's notation."""

    def __init__(self, quote: str) -> None:
        self._quote = quote
        self._names: dict[tuple[int, int], str] = {}
        self._numbers: dict[Any, int] = {}
        self._known: dict[int, tuple[Any, int, bool]] = {}  # by identity; holds the value, so that this stays its own
        self.lines: list[str] = []

    def value(self, schema: Any, root: Mapping[str, Any]) -> str:
        """The name of the rule for a value; `root` is the schema that its references resolve in."""
        number, refers = self._number(schema)
        key = (number, id(root) if refers else 0)  # a reference depends on its root
        if key not in self._names:
            self._names[key] = name = f"v{len(self._names)}"
            body = self._body(schema, root)  # may refer to this name: schemas can be recursive
            self.lines.append(f"{name}: {body}")
        return self._names[key]

    def _number(self, value: Any) -> tuple[int, bool]:
        """A number that equal values share, and whether the value holds a reference. Each part is looked at once."""
        if id(value) in self._known:
            return self._known[id(value)][1:]
        if isinstance(value, Mapping):
            inner = [self._number(item) for item in value.values()]
            shape: Any = ("object", *zip(value, (number for number, _ in inner), strict=True))
        elif isinstance(value, list | tuple):
            inner = [self._number(item) for item in value]
            shape = ("list", *(number for number, _ in inner))
        else:
            return self._numbers.setdefault((type(value), value), len(self._numbers)), False
        number = self._numbers.setdefault(shape, len(self._numbers))
        refers = (isinstance(value, Mapping) and "$ref" in value) or any(refers for _, refers in inner)
        self._known[id(value)] = (value, number, refers)
        return number, refers

    def _body(self, schema: Any, root: Mapping[str, Any]) -> str:
        if schema is True or schema == {}:
            return self._anything()
        if not isinstance(schema, Mapping):
            raise SettingsError(f"a schema of function parameters holds {schema!r}; give an object")
        if "$ref" in schema:
            return self.value(_resolve(schema["$ref"], root), root)
        if "const" in schema or "enum" in schema:
            constants = _some(schema, "enum") if "enum" in schema else [schema["const"]]
            return " | ".join(self._constant(item) for item in constants)
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return " | ".join(self.value(choice, root) for choice in _some(schema, word))
        kind = schema.get("type", "object" if "properties" in schema else None)
        if isinstance(kind, list):
            return " | ".join(self.value({**schema, "type": one}, root) for one in _some(schema, "type"))
        return self._typed(kind, schema, root)

    def _typed(self, kind: object, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        match kind:
            case "string":
                return f"{self._quote} {TEXT} {self._quote}"
            case "number":
                return NUMBER
            case "integer":
                return INTEGER
            case "boolean":
                return '"true" | "false"'
            case "null":
                return '"null"'
            case "array":
                item = self.value(schema.get("items", True), root)
                return f'"[" ({item} ("," {item})*)? "]"'
            case "object":
                return self._object(schema, root)
            case None:
                return self._anything()
        raise SettingsError(f"a schema of function parameters has type {kind!r}, which JSON schema does not know")

    def _object(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """An object with its properties in the order of the schema; those not required are optional."""
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or (not properties and "properties" not in schema):
            anything = self.value(True, root)
            return f'"{{" ({KEY} ":" {anything} ("," {KEY} ":" {anything})*)? "}}"'
        required = _some(schema, "required") if schema.get("required") else []
        number = len(self.lines)
        prefix = f"o{number}n{len(self._names)}"
        after = '"}"'
        first = '"}"'  # what may follow while the object is empty
        for i, (name, inner) in reversed(list(enumerate(properties.items()))):
            pair = f"{_literal(name + ':')} {self.value(inner, root)}"
            rest = f"{prefix}r{i}"
            begin = f"{prefix}f{i}"
            optional = name not in required
            self.lines.append(f'{rest}: "," {pair} {after}' + (f" | {after}" if optional else ""))
            self.lines.append(f"{begin}: {pair} {after}" + (f" | {first}" if optional else ""))
            after, first = rest, begin
        return f'"{{" {first}'

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self._quote} {_literal(value)} {self._quote}" if value else f"{self._quote} {self._quote}"
        return _literal(json.dumps(value))

    def _anything(self) -> str:
        kinds = ("string", "number", "boolean", "null", "array", "object")
        return " | ".join(self.value({"type": kind}, {}) for kind in kinds)


def _some(schema: Mapping[str, Any], word: str) -> list[Any]:
    """A list in a schema that must not be empty."""
    value = schema[word]
    if not isinstance(value, list) or not value:
        raise SettingsError(f"{word} of a schema of function parameters is {json.dumps(value)}; give a list")
    return value


def _resolve(reference: Any, root: Mapping[str, Any]) -> Any:
    """Resolve a JSON pointer within the schema, such as `#/$defs/place`."""
    found: Any = root
    if not isinstance(reference, str) or not reference.startswith("#"):
        raise SettingsError(f"a schema of function parameters points to {reference!r}; point into the schema itself")
    for step in reference.split("/")[1:]:
        if not isinstance(found, Mapping) or step not in found:
            raise SettingsError(f"a schema of function parameters points to {reference}, which is not there")
        found = found[step]
    return found
