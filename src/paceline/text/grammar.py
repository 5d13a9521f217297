"""Structured output: JSON schemas, regular expressions and grammars as masks over tokens.

The masks come from llguidance (https://github.com/guidance-ai/llguidance), which is an optional dependency.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from paceline.background import Background
from paceline.errors import SettingsError, translated
from paceline.text.schema import check_expression, check_grammar, check_schema
from paceline.types import Bool

if TYPE_CHECKING:
    import llguidance

WHITE_SPACE = r"[ \n\r\t]{1,40}"
MAX_COMPOSED = 1 << 20  # characters of a grammar, those made of schemas of the largest size included
LEXER_FUEL = 100_000  # llguidance's own limit of a million lets a grammar compile for 45 s
STACK = 256 << 20  # bytes where grammars are compiled: llguidance follows rules by recursion, 4 KB each
T = TypeVar("T")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarMatcher:
    """The state of a text in a grammar; see `decode.sampling_params.Grammar`."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, stop_ids: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._stop_ids = matcher, vocab_size, stop_ids
        self.failed = False

    def allowed(self) -> Bool:
        bits = self._ask(self._matcher.compute_bitmask)
        if bits is not None and not self._matcher.is_error():
            packed = np.frombuffer(bits, np.uint8)
            mask = np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)
            if mask.any():
                return mask
        self.failed = True  # the matcher has hit a limit: allow only the end
        mask = np.zeros(self._vocab_size, np.bool_)
        mask[list(self._stop_ids)] = True
        return mask

    def advance(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._ask(lambda: self._matcher.consume_token(token))

    def forced(self) -> tuple[int, ...]:
        return tuple(self._ask(self._matcher.compute_ff_tokens) or ())

    def _ask(self, call: Callable[[], T]) -> T | None:
        """What the matcher answers; None once it has failed: a panic ends this text, and no other."""
        try:
            return None if self.failed else call()
        except BaseException:  # panics are no `Exception`; no interrupt, for this runs on threads that none reaches
            self.failed = True
            return None

    def copy(self) -> GrammarMatcher:
        """An independent copy."""
        return GrammarMatcher(self._matcher.deep_copy(), self._vocab_size, self._stop_ids)


class Grammars:
    """Compiles grammars for one tokenizer. Several threads may use it.

    Args:
        tokenizer: the content of a tokenizer.json.
        vocab_size: of the model; may be larger than the tokenizer's.
        stop_ids: tokens that end a text; those beyond the vocabulary are never generated.

    Raises:
        SettingsError: llguidance is not installed or cannot use the tokenizer, or no token ends a text.
    """

    def __init__(self, tokenizer: str, vocab_size: int, stop_ids: Iterable[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise SettingsError("structured output needs llguidance; pip install 'paceline[server]'") from error
        self._matcher, self._vocab_size = llguidance.LLMatcher, vocab_size
        self._stop_ids = frozenset(token for token in stop_ids if 0 <= token < vocab_size)
        if not self._stop_ids:
            raise SettingsError(
                "structured output needs a token that ends the text, and the model's settings name none "
                "(eos_token_id in generation_config.json); leave the schema, expression or grammar out"
            )
        with translated(
            SettingsError,
            "structured output cannot be used with this model's tokenizer ({reason}); "
            "leave the schema, expression or grammar out",
        ):
            self._limits = llguidance.LLParserLimits(initial_lexer_fuel=LEXER_FUEL)
            self._tokenizer = llguidance.LLTokenizer(tokenizer, n_vocab=vocab_size, eos_token=sorted(self._stop_ids))
        self._background = Background("grammars", STACK)

    def json_schema(self, schema: dict[str, Any]) -> GrammarMatcher:
        """One JSON value that matches the schema.

        Raises:
            SettingsError: not a valid schema, too large, or not supported.
        """
        return self._compile(f"start: {json_rule(schema)}", "the JSON schema")

    def regex(self, pattern: str) -> GrammarMatcher:
        """Text that fully matches a regular expression.

        Raises:
            SettingsError: not a valid one, or too large.
        """
        check_expression(pattern)
        with translated(SettingsError, "the regular expression cannot be used: {reason}"):
            grammar = self._matcher.grammar_from_regex(pattern)
        return self._compile(grammar, "the regular expression")

    def lark(self, grammar: str, *, composed: bool = False) -> GrammarMatcher:
        """Text of a grammar in llguidance's dialect of Lark.

        Args:
            grammar: the grammar.
            composed: it was made of parts that were checked, and may be larger than one that somebody wrote.

        Raises:
            SettingsError: not a valid one, or too large.
        """
        return self._compile(grammar if composed else check_grammar(grammar), "the grammar")

    def _compile(self, grammar: str, what: str) -> GrammarMatcher:
        if len(grammar) > MAX_COMPOSED:
            raise SettingsError(f"{what} is larger than {MAX_COMPOSED} characters; make it smaller")
        with translated(SettingsError, f"{what} cannot be used: {{reason}}"):
            return self._background.call(lambda: self._compiled(grammar))

    def _compiled(self, grammar: str) -> GrammarMatcher:
        matcher = self._matcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            compiled = GrammarMatcher(matcher, self._vocab_size, self._stop_ids)
            compiled.allowed()
            if not compiled.failed:
                return compiled
        raise ValueError(_reason(matcher.get_error() or "it allows no text"))


def json_rule(schema: dict[str, Any]) -> str:
    """A JSON schema as part of a grammar. White space is bounded, since small models may not leave it.

    Raises:
        SettingsError: it is too large, or not JSON.
    """
    check_schema(schema)
    with translated(SettingsError, "the JSON schema cannot be used: {reason}"):
        return f"%json {json.dumps({'x-guidance': {'whitespace_pattern': WHITE_SPACE}} | schema)}"


def regex_rule(pattern: str) -> str:
    """A regular expression as part of a grammar.

    Raises:
        SettingsError: it is too large.
    """
    check_expression(pattern)
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return "/" + escaped.replace("\n", "\\n") + "/"


def _reason(message: str) -> str:
    """One line of a compiler message: the first marked as an error, else the first."""
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["it is not valid"]
    marked = (line.removeprefix("error: ") for line in lines if line.startswith("error: "))
    return next(marked, lines[0])[:300]
