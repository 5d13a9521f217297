"""A made-up vocabulary of Gemma 4's size and kind: what loading and memory depend on, without its words.

BPE with byte fallback: special tokens with Gemma 4's texts at its ids, bytes, characters, and longer tokens that are
merged from shorter ones in about two ways each, as in the real list.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TOKENS, MERGES = 262_144, 514_906  # Gemma 4's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# Texts and ids of those that matter. llama.cpp types some as text, so that it prints them.
CONTROLS = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<mask>": 4, "<|tool>": 46, "<tool|>": 47, "<|think>": 98}
CONTROLS |= {"<|turn>": 105, "<turn|>": 106}
PRINTED = {"<|tool_call>": 48, "<tool_call|>": 49, "<|tool_response>": 50, "<tool_response|>": 51, '<|"|>': 52}
PRINTED |= {"<|channel>": 100, "<channel|>": 101}
FIRST_BYTE = 238  # 256 tokens from here
LETTERS = "\N{LOWER ONE EIGHTH BLOCK}abcdefghijklmnopqrstuvwxyz"  # what longer tokens are made of; the first is a space
CHARACTER_BLOCKS = ((0x20, 0x7F), (0xA1, 0x250), (0x391, 0x530), (0x3041, 0x3100), (0x4E00, 0x6200))
LONGEST = 13  # letters of a token


class RandomVocabulary(NamedTuple):
    """Tokens by id, their types as in GGUF files, and pairs "left right" by rank."""

    tokens: list[str]
    types: list[int]
    merges: list[str]


def random_vocabulary(size: int = TOKENS, seed: int = 0) -> RandomVocabulary:
    """A vocabulary of `size` tokens, at least 8,000; the same one for each seed."""
    named = {number: token for token, number in (CONTROLS | PRINTED | {"<unk>": 3}).items()}
    tokens = [named.get(number, f"<unused{number}>") for number in range(FIRST_BYTE)]
    types = [_special_type(token) for token in tokens]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [BYTE] * 256
    characters = [LETTERS[0], "\n", *(chr(n) for first, end in CHARACTER_BLOCKS for n in range(first, end))]
    tokens += [
        character for character in characters if (character != " " and character.isprintable()) or character == "\n"
    ]
    known = dict.fromkeys(tokens)
    longer = _longer_tokens(seed)
    while len(known) < size:
        known.setdefault(next(longer))
    tokens = list(known)
    types += [NORMAL] * (size - len(types))
    return RandomVocabulary(tokens, types, _merges(tokens, known, MERGES * size // TOKENS))


def _special_type(token: str) -> int:
    if token == "<unk>":
        return UNKNOWN
    return USER_DEFINED if token in PRINTED else UNUSED if token.startswith("<unused") else CONTROL


def _longer_tokens(seed: int) -> Iterator[str]:
    """Each is two earlier ones, and comes with those of its beginnings that are longer than the first of them."""
    made = [left + right for left in LETTERS for right in LETTERS]
    yield from made
    generator = np.random.default_rng(seed)
    while True:
        choices = generator.random((1 << 14, 2))
        for first, second in choices.tolist():
            start, end = made[int(first * len(made))], made[int(second * len(made))]
            if len(start) + len(end) <= LONGEST:
                yield from (start + end[:length] for length in range(1, len(end) + 1))
                made.append(start + end)


def _merges(tokens: list[str], known: dict[str, None], most: int) -> list[str]:
    """One way to make each token of several letters, and more ways of the first of them until there are enough."""
    ways = [
        [
            f"{token[:cut]} {token[cut:]}"
            for cut in range(len(token) - 1, 0, -1)
            if token[:cut] in known and token[cut:] in known
        ]
        for token in tokens
        if len(token) > 1 and token[0] in LETTERS
    ]
    spare = most - len(ways)
    merges = []
    for first, *others in ways:
        merges += [first, *others[:spare]]
        spare -= min(spare, len(others))
    return merges
