"""Constraints on the next token: penalties, bias, suppressed tokens, a grammar; applied to logits before sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from paceline.types import Bool, Float32, SamplingParams


class Grammar(Protocol):
    """Which tokens may follow, given those committed so far."""

    def allowed(self) -> Bool:
        """The tokens [vocabulary] that may come next; at least one."""

    def advance(self, token: int) -> None:
        """Commit an allowed token."""

    def forced(self) -> tuple[int, ...]:
        """Tokens that probably come next because no other text may, in the usual tokenization; often none."""

    @property
    def failed(self) -> bool:
        """Whether the text had to end before it was complete."""


class LogitsConstraint:
    """Penalties, bias, suppressed tokens and a grammar; see `types.Constraint`.

    Penalties look at the tokens of the prompt, and at how often each occurs in the generated text.
    """

    def __init__(self, params: SamplingParams, prompt: Iterable[int], grammar: Grammar | None) -> None:
        self._params, self._prompt, self._grammar = params, frozenset(prompt), grammar
        self._generated: Counter[int] = Counter()

    def apply(self, logits: Float32) -> None:
        p = self._params
        if p.repetition_penalty != 1:
            seen = np.array(sorted(self._prompt | self._generated.keys()), np.int64)
            values, penalty = logits[seen], np.float32(p.repetition_penalty)
            logits[seen] = np.where(values > 0, values / penalty, values * penalty)
        if self._generated and (p.presence_penalty != 0 or p.frequency_penalty != 0):
            tokens = np.array(list(self._generated), np.int64)
            counts = np.array(list(self._generated.values()), np.float32)
            logits[tokens] -= np.float32(p.presence_penalty) + np.float32(p.frequency_penalty) * counts
        for token, value in p.bias:
            logits[token] += np.float32(value)
        if p.suppressed:
            logits[list(p.suppressed)] = -np.inf
        if self._grammar:
            allowed = self._grammar.allowed()
            if (
                p.suppressed and np.isneginf(logits[allowed]).all()
            ):  # all that the grammar allows is suppressed: it wins
                logits[allowed] = 0
            logits[~allowed] = -np.inf

    def commit(self, token: int) -> None:
        self._generated[token] += 1
        if self._grammar:
            self._grammar.advance(token)


def constraint_of(params: SamplingParams, prompt: Iterable[int], grammar: Grammar | None) -> LogitsConstraint | None:
    """The constraint on a text, or None if its logits stay as they are."""
    penalised = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
    if penalised or params.bias or params.suppressed or grammar:
        return LogitsConstraint(params, prompt, grammar)
    return None
