"""A tokenizer as GGUF files hold it: `checkpoint` reads it, and `text` makes a tokenizer of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paceline.errors import CheckpointError, translated

MAX_LOOKS = 1000  # at places where a string may be, and other strings hold its bytes
CURE = "take another file of this model"


class Strings(Sequence[str]):
    """Many strings as they lie in a file, a length of 8 bytes before each. Only those asked for become objects.

    Args:
        data: the bytes.
        places: [strings + 1] where each begins with its length, and where the last ends.
    """

    def __init__(self, data: bytes, places: NDArray[np.int64]) -> None:
        self._data, self._places = data, places

    def __len__(self) -> int:
        return len(self._places) - 1

    def __getitem__(self, index: Any) -> Any:
        """One string, or a list of those of a slice.

        Raises:
            UnicodeDecodeError: a string is not UTF-8.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        at = index % len(self)
        return str(self._data[int(self._places[at]) + 8 : int(self._places[at + 1])], "utf-8")

    def find(self, text: str) -> int | None:
        """Index of a string; None if it is not there."""
        wanted = text.encode()
        wanted = len(wanted).to_bytes(8, "little") + wanted
        at = -1
        for _ in range(MAX_LOOKS):
            at = self._data.find(wanted, at + 1)
            if at < 0:
                break
            index = int(np.searchsorted(self._places, at))
            if index < len(self) and self._places[index] == at:
                return index
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self.joined("\0").split("\0")) if len(self) else iter(())

    def joined(self, separator: str) -> str:
        """All strings in one, which takes a fraction of the time that one after the other would.

        Args:
            separator: one ASCII character.

        Raises:
            ValueError: a string holds it, or is not UTF-8.
        """
        data, starts = np.frombuffer(self._data, np.uint8).copy(), self._places[:-1]
        kept = np.ones(len(data), bool)
        for byte in range(8):  # of a string's length; one gives way to the separator
            kept[starts + byte] = byte == 0
        data[starts] = ord(separator)
        text = str(data[kept].tobytes()[1:], "utf-8")
        if text.count(separator) != len(self) - 1:
            raise ValueError(f"a string holds {separator!r}")
        return text


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how texts are split into them.

    Attributes:
        path: of the file, for messages.
        model: the kind of tokenizer, as the file calls it.
        pre: how texts are split before all else, as the file calls it.
        tokens: strings of the tokens.
        types: of the tokens: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
        scores: of the tokens; without `merges`, tokens of higher scores are made first.
        merges: pairs "left right" in the order in which they are made; None if there are none.
    """

    path: Path
    model: str
    pre: str
    tokens: Strings
    types: NDArray[np.int64] | None
    scores: NDArray[np.float64] | None
    merges: Strings | None

    def text(self, token: int) -> str:
        """The string of a token.

        Raises:
            CheckpointError: it is not UTF-8.
        """
        with translated(CheckpointError, f"{self.path}: the token {token} is not text ({{reason}}); {CURE}"):
            return str(self.tokens[token])
