"""Settings of sampling: what they do to logits before a token is drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import numpy as np

from paceline.sampling_params import check_sampling_params as check_sampling_params
from paceline.types import Bool, Logprobs, Row, SamplingParams

MOST_LOGPROBS = 100


class Grammar(Protocol):
    """Which tokens may follow, by what has been committed."""

    def allowed(self) -> Bool:
        """The tokens [vocabulary] that may come next; at least one."""

    def advance(self, token: int) -> None:
        """Commit an allowed token."""

    def forced(self) -> tuple[int, ...]:
        """Tokens that are likely to come next because no other text may, in the usual spelling; often none."""

    @property
    def failed(self) -> bool:
        """Whether the text had to end before it was what it must be."""


class History:
    """What was committed, as far as the next token depends on it.

    Penalties look at the tokens of the prompt, and at how often each stands in the text so far; a grammar follows the
    text. Verification adds the tokens of a line one by one, so that each row meets the mask of its own place.
    """

    def __init__(self, prompt: Iterable[int] = (), grammar: Grammar | None = None) -> None:
        self.prompt = frozenset(prompt)
        self.text: Counter[int] = Counter()
        self.grammar = grammar

    def add(self, token: int) -> None:
        self.text[token] += 1
        if self.grammar:
            self.grammar.advance(token)


def adjusted(logits: Row, sampling: SamplingParams, history: History) -> Row:
    """Logits [vocabulary] after penalties, bias, suppressed tokens and grammar; the same array if there are none."""
    s = sampling
    penalised = s.repetition_penalty != 1 or s.presence_penalty != 0 or s.frequency_penalty != 0
    if not (penalised or s.bias or s.suppressed or history.grammar):
        return logits
    changed = logits.copy()
    if s.repetition_penalty != 1:
        seen = np.array(sorted(history.prompt | history.text.keys()), np.int64)
        values, penalty = changed[seen], np.float32(s.repetition_penalty)
        changed[seen] = np.where(values > 0, values / penalty, values * penalty)
    if history.text and (s.presence_penalty != 0 or s.frequency_penalty != 0):
        tokens = np.array(list(history.text), np.int64)
        counts = np.array(list(history.text.values()), np.float32)
        changed[tokens] -= np.float32(s.presence_penalty) + np.float32(s.frequency_penalty) * counts
    for token, value in s.bias:
        changed[token] += np.float32(value)
    if s.suppressed:
        changed[list(s.suppressed)] = -np.inf
    if history.grammar:
        allowed = history.grammar.allowed()
        if s.suppressed and np.isneginf(changed[allowed]).all():  # what the grammar needs is suppressed: it wins
            changed[allowed] = 0
        changed = np.where(allowed, changed, np.float32(-np.inf))
    return changed


def logprobs_of(logits: Row, token: int, count: int, temperature: float) -> Logprobs:
    """Logarithms of the probabilities of a token and of the `count` most likely ones.

    Args:
        logits: [vocabulary], as the target gave them.
        token: the token that was drawn.
        count: how many alternatives to name.
        temperature: of the sampling; probabilities of greedy decoding are those at 1.
    """
    scaled = np.asarray(logits, np.float64) / (temperature or 1.0)
    scaled -= scaled.max()
    scaled -= math.log(np.exp(scaled).sum())
    if not count:
        return Logprobs(float(scaled[token]), ())
    count = min(count, len(scaled))
    least = np.partition(scaled, len(scaled) - count)[len(scaled) - count]
    best = np.flatnonzero(scaled >= least)
    best = best[np.lexsort((best, -scaled[best]))][:count]
    return Logprobs(float(scaled[token]), tuple((int(i), float(scaled[i])) for i in best))
