"""Size limits of JSON schemas: grammars are compiled recursively, so large schemas overflow the stack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.errors import SettingsError

MAX_NODES, MAX_PROPERTIES, MAX_REFERENCES, MAX_DEPTH = 5_000, 512, 256, 64


def check_schema(schema: Any) -> None:
    """Reject a schema that would overflow the stack of the grammar compiler.

    Raises:
        SettingsError: too large or too deep, or an object with too many properties.
    """
    nodes = references = 0
    left = [(schema, 0)]
    while left:
        value, depth = left.pop()
        nodes += 1
        if isinstance(value, Mapping):
            references += "$ref" in value
            left += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, list):
            left += [(inner, depth + 1) for inner in value]
        broad = isinstance(value, Mapping | list) and len(value) > MAX_PROPERTIES
        if broad or nodes > MAX_NODES or references > MAX_REFERENCES or depth > MAX_DEPTH:
            raise SettingsError(
                f"a JSON schema may have {MAX_NODES} values, {MAX_PROPERTIES} in one object or list, "
                f"{MAX_REFERENCES} references and {MAX_DEPTH} levels; make it smaller"
            )
