"""Stop strings: they end a generation, and are not part of its text."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.errors import SettingsError
from paceline.text.detokenizer import Detokenizer


def check_stops(stops: str | Sequence[str]) -> tuple[str, ...]:
    """Return one or several stop strings as a tuple.

    Raises:
        SettingsError: one is empty.
    """
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if "" in stops:
        raise SettingsError("a stop string is empty; give the text to stop at, or none")
    return stops


class StopStringFilter:
    """Detokenizes a stream up to the first stop string.

    Text that may be a prefix of a stop string is held back until more text decides.

    Args:
        decoder: turns tokens into text.
        stops: the stop strings.
    """

    def __init__(self, decoder: Detokenizer, stops: tuple[str, ...]) -> None:
        self._decoder, self._stops = decoder, stops
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns the text that can no longer change, and nothing after a stop string."""
        return self._filter(self._decoder.push(token), last=False)

    def finish(self) -> str:
        """Return the text that was held back; no token may follow."""
        return self._filter(self._decoder.finish(), last=True)

    def _filter(self, text: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [at for at in map(text.find, self._stops) if at >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(text) if last else len(text) - self._partial_match(text)
        self._held = "" if found else text[end:]
        return text[:end]

    def _partial_match(self, text: str) -> int:
        """Length of the longest suffix that is a prefix of a stop string."""
        longest = max(map(len, self._stops)) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
