"""Prompt lookup: what followed the newest tokens before, and how often that is right."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.engine.proposers import (
    FADE,
    GUESSED,
    GUESSES,
    LEAST_MATCH,
    MATCH_CLASSES,
    NOTHING_TRIED,
    PromptLookup,
    match_class,
)

texts = st.lists(st.integers(0, 3), max_size=80)


def place_followed(tokens: list[int]) -> int | None:
    """What a lookup follows at the end of a text, found by comparing everything with everything."""
    place = None
    for end in range(1, len(tokens) + 1):
        if place is not None:
            place = place + 1 if tokens[place] == tokens[end - 1] else None
        if place is None and end > LEAST_MATCH:
            newest = tokens[end - LEAST_MATCH : end]
            earlier = [i for i in range(LEAST_MATCH, end) if tokens[i - LEAST_MATCH : i] == newest]
            place = earlier[-1] if earlier else None
    return place


@given(texts, st.integers(1, 15), st.lists(st.integers(1, 9)))
def test_a_guess_is_what_followed_before(tokens: list[int], most: int, parts: list[int]) -> None:
    lookup, read = PromptLookup(), 0
    for part in parts:  # however a text comes
        read = min(read + part, len(tokens))
        lookup.read(tokens[:read], 0)
    lookup.read(tokens, 0)
    guess, chances = lookup.guess(tokens, most)
    place = place_followed(tokens)
    assert len(guess) == len(chances) == (0 if place is None else most)
    if place is not None:
        together = [*tokens, *guess]
        assert guess == together[place : place + most]
    assert all(0 < p < 1 for p in chances)


def test_a_copy_is_followed_through_places_that_look_alike() -> None:
    """Three tokens that occur in several places do not lead away from the one that has been right."""
    original = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 7, 7, 7]
    text = [*original, 8, 8, 4, 5, 6, 9, 1, 2, 3]
    lookup = PromptLookup()
    lookup.read(text, 0)
    assert lookup.guess(text, 3)[0] == [7, 7, 7]
    lookup = PromptLookup()
    text = [*original, 0, 1, 2, 3]
    lookup.read(text, 0)
    assert lookup.guess(text, 2)[0] == [7, 7]  # the latest one


def test_chances_are_learned_from_all_tokens_after_the_prompt() -> None:
    prompt = [1, 2, 3, 4] * 5
    lookup = PromptLookup()
    lookup.read(prompt, len(prompt))
    assert tuple(lookup.rates) == NOTHING_TRIED
    first = lookup.guess(prompt, 1)[1][0]
    assert first == pytest.approx(GUESSED[match_class(16)])
    right = [*prompt, 1, 2]
    lookup.read(right, len(prompt))
    assert lookup.guess(right, 1)[1][0] > first
    lookup.read([*right, 0], len(prompt))
    tried, kept = lookup.rates[match_class(18)]
    assert tried == pytest.approx(1 + FADE + FADE**2)
    assert kept == pytest.approx(FADE + FADE**2)
    assert PromptLookup(lookup.rates).rates == lookup.rates


def test_classes_of_matches() -> None:
    assert [match_class(n) for n in (3, 4, 7, 8, 15, 16, 31, 32, 1000)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert tuple(sorted(GUESSED)) == GUESSED
    assert len(GUESSED) == MATCH_CLASSES


@given(st.integers(3, 70), st.integers(1, 15))
def test_chances_are_those_of_the_match_as_it_grows(length: int, most: int) -> None:
    tokens = [*range(length + 20), -1, *range(length)]
    lookup = PromptLookup()
    lookup.read(tokens, 0)
    guess, chances = lookup.guess(tokens, most)
    assert guess == [length + i for i in range(most)]
    for i, chance in enumerate(chances, start=length):
        tried, right = lookup.rates[match_class(i)]
        assert chance == pytest.approx((right + GUESSES * GUESSED[match_class(i)]) / (tried + GUESSES))
