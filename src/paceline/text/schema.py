"""How large a JSON schema may be: grammars are compiled recursively, and a stack is finite."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paceline.errors import SettingsError

MOST_NODES, MOST_PROPERTIES, MOST_REFERENCES, MOST_DEPTH = 5_000, 512, 256, 64


def check_schema(schema: Any) -> None:
    """Refuse a schema whose grammar would be chained too deeply for the compiler's stack.

    Raises:
        SettingsError: too large, too deep, or an object of too many properties.
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
        broad = isinstance(value, Mapping | list) and len(value) > MOST_PROPERTIES
        if broad or nodes > MOST_NODES or references > MOST_REFERENCES or depth > MOST_DEPTH:
            raise SettingsError(
                f"a JSON schema may have {MOST_NODES} values, {MOST_PROPERTIES} in one object or list, "
                f"{MOST_REFERENCES} references and {MOST_DEPTH} levels; make it smaller"
            )
