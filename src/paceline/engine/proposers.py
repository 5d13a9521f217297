"""Proposers: where drafts come from. None of them can change the text, only how fast it comes.

A draft is accepted as far as it equals what the target samples, so a proposer may guess in any way. For each round the
proposers of an engine are asked in order; the first that answers has the round.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from paceline.engine.sequence import Sequence
from paceline.types import Draft, Result

Rounds = Items[tuple[Sequence, Result]]
LEAST_MATCH = 3  # tokens
MATCH_CLASSES = 5  # of 3, of 4 to 7, 8 to 15, 16 to 31, and more tokens
GUESSED = (0.4, 0.6, 0.8, 0.9, 0.95)  # chance of the next token after such a match, before anything was observed
GUESSES = 4.0  # weight of that
NOTHING_TRIED = ((0.0, 0.0),) * MATCH_CLASSES
FADE = 1 - 1 / 64  # of observations, for each new one of its class


class Proposer:
    """Proposes drafts. Only `propose` is needed; the other methods are told what happens."""

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        """The draft of a sequence's next round, at most `most` tokens; None leaves the round to the next proposer."""
        raise NotImplementedError

    def begin(self, sequence: Sequence) -> None:
        """A sequence is about to get a slot."""

    def prepare(self, sequences: Items[Sequence]) -> None:
        """These sequences decode in the next step."""

    def observe(self, rounds: Rounds, seconds: float | None) -> None:
        """What became of the rounds that this proposer had in a step.

        Args:
            rounds: sequences and their results.
            seconds: that the step took, proposals not counted; None if it held prefill or another proposer's rounds.
        """

    def finish(self, sequence: Sequence) -> None:
        """A sequence has ended."""


class GrammarProposer(Proposer):
    """Proposes what a sequence's grammar leaves no choice about."""

    def propose(self, sequence: Sequence, most: int) -> Draft | None:
        tokens = sequence.grammar.forced()[:most] if sequence.grammar else ()
        return Draft(tokens) if tokens else None


class PromptLookup:
    """Finds what followed the newest tokens earlier in the same text (prompt lookup, n-grams).

    It follows one earlier place for as long as the text repeats it. How often that is right is observed with each
    token, drafted or not, so finding out costs nothing.

    Args:
        rates: of each class of matches, how often they were tried and right, as far as that still counts.
    """

    def __init__(self, rates: Items[tuple[float, float]] = NOTHING_TRIED) -> None:
        self.rates = [*rates]
        self._places: dict[tuple[int, ...], int] = {}  # where the text went on after so many tokens, most recently
        self._read = 0  # tokens
        self._at = 0  # place that is followed; 0: none
        self._length = 0  # tokens that were equal before it

    def read(self, tokens: list[int], prompt_length: int) -> None:
        """Go on to the end of a text whose first tokens were read before."""
        for end in range(self._read + 1, len(tokens) + 1):
            token, key = tokens[end - 1], tuple(tokens[end - LEAST_MATCH : end])
            if self._at:
                right = tokens[self._at] == token
                if end > prompt_length:
                    i = match_class(self._length)
                    tried, kept = self.rates[i]
                    self.rates[i] = FADE * tried + 1, FADE * kept + right
                self._at, self._length = (self._at + 1, self._length + 1) if right else (0, 0)
            if end < LEAST_MATCH:
                continue
            if not self._at and (place := self._places.get(key)):
                self._at, self._length = place, LEAST_MATCH
            self._places[key] = end
        self._read = len(tokens)

    def guess(self, tokens: list[int], most: int) -> tuple[list[int], list[float]]:
        """At most so many tokens that may follow, and the chance of each given those before it."""
        if not self._at:
            return [], []
        guess = tokens[self._at : self._at + most]
        while len(guess) < most:  # a text that repeats its own end
            guess.append(guess[len(guess) - (len(tokens) - self._at)])
        chances: list[float] = []
        while len(chances) < most:
            i = match_class(self._length + len(chances))
            left = most - len(chances)
            more = left if i == MATCH_CLASSES - 1 else min(left, (4 << i) - self._length - len(chances))
            chances += [self._chance(i)] * more
        return guess, chances

    def _chance(self, i: int) -> float:
        tried, kept = self.rates[i]
        return (kept + GUESSES * GUESSED[i]) / (tried + GUESSES)


def match_class(length: int) -> int:
    """Which of MATCH_CLASSES a match of so many tokens belongs to."""
    return min(max(length.bit_length() - 2, 0), MATCH_CLASSES - 1)
