"""Streaming detokenizer.

A token's text can depend on later tokens: a character's bytes may be spread over several tokens, and a run of byte
tokens (`<0xE2>`) that is not valid UTF-8 becomes replacement characters as a whole. So text is held back exactly as
long as a later token could change it. All returned strings join to what decoding all tokens at once gives, and a token
costs O(1) amortised: nothing is decoded twice.

The stages follow the decoders of the tokenizers library (https://github.com/huggingface/tokenizers,
`tokenizers/src/decoders` and `pre_tokenizers/byte_level.rs`), which is the reference in the tests.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from paceline.errors import CheckpointError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def _byte_of_character() -> dict[str, int]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    others = (byte for byte in range(256) if chr(byte) not in table)
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def byte_level_bytes(text: str) -> bytes:
    """The bytes of a token's string; one with a character that stands for no byte, such as an added token, is text."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in text)
    except KeyError:
        return text.encode()


class Stage(Protocol):
    """One step of a decoder; holds back what later tokens could change."""

    def push(self, text: str) -> list[str]:
        """Add a string; returns those that can no longer change."""

    def finish(self) -> list[str]:
        """Return what was held back; nothing may follow."""


class Detokenizer:
    """Turns a stream of tokens into text.

    Args:
        decoder: the "decoder" object of a tokenizer.json; None: the strings are joined as they are.
        token_text: the string of a token id in the vocabulary, None for an unknown id.
        hidden: ids without text (special tokens).

    Raises:
        CheckpointError: this kind of decoder is not supported.
    """

    def __init__(
        self,
        decoder: Mapping[str, Any] | None,
        token_text: Callable[[int], str | None],
        hidden: frozenset[int] = frozenset(),
    ) -> None:
        self._stages = _stages(decoder)
        self._token_text = token_text
        self._hidden = hidden

    def push(self, token: int) -> str:
        """Add a token; returns the text that can no longer change, which may be empty."""
        text = None if token in self._hidden else self._token_text(token)
        if text is None:
            return ""
        strings = [text]
        for stage in self._stages:
            strings = [out for string in strings for out in stage.push(string)]
        return "".join(strings)

    def finish(self) -> str:
        """Return the text that was held back. No token may be pushed after this."""
        strings: list[str] = []
        for stage in self._stages:
            strings = [out for string in strings for out in stage.push(string)] + stage.finish()
        return "".join(strings)


class _Replace:
    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content = pattern, content

    def push(self, text: str) -> list[str]:
        return [text.replace(self._pattern, self._content)]

    def finish(self) -> list[str]:
        return []


class _ByteFallback:
    """A run of byte tokens is UTF-8 or, if that is invalid, one replacement character per byte."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, text: str) -> list[str]:
        if match := BYTE_TOKEN.fullmatch(text):
            self._run.append(int(match[1], 16))
            return []
        return [*self.finish(), text]

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode()] if run else []
        except UnicodeDecodeError:
            return [REPLACEMENT * len(run)]


class _ByteLevel:
    """Each character of a token encodes one byte (GPT-2's table); the bytes are UTF-8, possibly invalid."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, text: str) -> list[str]:
        return [self._decoder.decode(byte_level_bytes(text))]

    def finish(self) -> list[str]:
        return [self._decoder.decode(b"", final=True)]


def _stages(decoder: Mapping[str, Any] | None) -> list[Stage]:
    if decoder is None:
        return []
    stages: list[Stage] = []
    fused = False  # whether earlier steps joined all strings into one
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        if step["type"] != "Fuse":
            stages.append(_stage(step, fused))
        fused = fused or step["type"] in ("Fuse", "ByteLevel")
    return stages


def _stage(step: Mapping[str, Any], fused: bool) -> Stage:
    match step:
        case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if (
            len(pattern) == 1 or not fused
        ):
            return _Replace(pattern, content)
        case {"type": "ByteFallback"} if not fused:
            return _ByteFallback()
        case {"type": "ByteLevel"} if not fused:
            return _ByteLevel()
    raise CheckpointError(f"tokenizer.json: the decoder {dict(step)} is not supported; use the model's own tokenizer")
