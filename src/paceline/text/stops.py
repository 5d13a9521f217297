"""Stop strings: text that ends a generation and is not part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from paceline.errors import SettingsError


class TokenDecoder(Protocol):
    """What turns tokens into text as they come, such as `text.detokenizer.Detokenizer`."""

    def push(self, token: int) -> str:
        """The text that became certain with this token."""

    def finish(self) -> str:
        """What was held back."""


def check_stops(stops: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings as a tuple.

    Raises:
        SettingsError: one is empty.
    """
    if "" in stops:
        raise SettingsError("a stop string is empty; give the text to stop at, or none")
    return tuple(stops)


class StoppedText:
    """Text of a growing sequence of tokens, up to the first stop string.

    Text that may be the beginning of a stop string is held back until that is settled.

    Args:
        decoder: turns tokens into text.
        stops: the stop strings.
    """

    def __init__(self, decoder: TokenDecoder, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that became certain with this token; nothing once stopped."""
        return self._take(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """What was held back: no more will come."""
        return self._take(self._decoder.finish(), last=True)

    def _take(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) if last else len(text) - self._open(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def _open(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
