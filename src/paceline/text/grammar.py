"""Structured output: JSON schemas, regular expressions and grammars as masks over tokens.

The masks come from llguidance (https://github.com/guidance-ai/llguidance), which is an optional dependency.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.errors import SettingsError
from paceline.text.schema import check_schema
from paceline.types import Bool

if TYPE_CHECKING:
    import llguidance

WHITE_SPACE = r"[ \n\r\t]{1,40}"
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarMatcher:
    """The state of a text in a grammar; see `decode.sampling_params.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._stop_ids = matcher, vocab_size, stop_ids
        self.failed = False

    def allowed(self) -> Bool:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little").view(np.bool_)
        if self._matcher.is_error() or not mask.any():  # the matcher has hit a limit: allow only the end
            self.failed = True
            mask[:] = False
            mask[list(self._stop_ids)] = True
        return mask

    def advance(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def forced(self) -> tuple[int, ...]:
        return tuple(self._matcher.compute_ff_tokens())

    def copy(self) -> GrammarMatcher:
        """An independent copy."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._stop_ids)


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: the content of a tokenizer.json.
        vocab_size: of the model; may be larger than the tokenizer's.
        stop_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: str, vocab_size: int, stop_ids: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise SettingsError("structured output needs llguidance; pip install 'paceline[server]'") from error
        self._matcher, self._vocab_size, self._stop_ids = llguidance.LLMatcher, vocab_size, frozenset(stop_ids)
        self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(self._stop_ids))

    def json_schema(self, schema: dict[str, Any]) -> GrammarMatcher:
        """One JSON value that matches the schema.

        Raises:
            SettingsError: not a valid schema, or not supported.
        """
        return self._compile(f"start: {json_rule(schema)}", "the JSON schema")

    def regex(self, pattern: str) -> GrammarMatcher:
        """Text that fully matches a regular expression.

        Raises:
            SettingsError: not a valid one.
        """
        return self._compile(self._matcher.grammar_from_regex(pattern), "the regular expression")

    def lark(self, grammar: str) -> GrammarMatcher:
        """Text of a grammar in llguidance's dialect of Lark.

        Raises:
            SettingsError: not a valid one.
        """
        return self._compile(grammar, "the grammar")

    def _compile(self, grammar: str, what: str) -> GrammarMatcher:
        matcher = self._matcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise SettingsError(f"{what} cannot be used: {_reason(matcher.get_error())}")
        compiled = GrammarMatcher(matcher, self._vocab_size, self._stop_ids)
        compiled.allowed()
        if matcher.is_error():
            raise SettingsError(f"{what} cannot be used: {_reason(matcher.get_error())}")
        return compiled


def json_rule(schema: dict[str, Any]) -> str:
    """A JSON schema as part of a grammar. White space is bounded, since small models may not leave it.

    Raises:
        SettingsError: it is too large.
    """
    check_schema(schema)
    return f"%json {json.dumps({'x-guidance': {'whitespace_pattern': WHITE_SPACE}} | schema)}"


def regex_rule(pattern: str) -> str:
    """A regular expression as part of a grammar."""
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return "/" + escaped.replace("\n", "\\n") + "/"


def _reason(message: str) -> str:
    """One line of a compiler message: the first marked as an error, else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it is not valid"]
    marked = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(marked, lines[0])[:300]
