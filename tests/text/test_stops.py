"""Stop strings, however their characters are spread over tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import SettingsError
from paceline.text.stops import StopStringFilter, check_stops


class Deltas:
    """A decoder whose tokens are indices into a list of texts; the last is held back until the end."""

    def __init__(self, deltas: list[str], rest: str = "") -> None:
        self.deltas, self.rest = deltas, rest

    def push(self, token: int) -> str:
        return self.deltas[token]

    def finish(self) -> str:
        return self.rest


def read(deltas: list[str], stops: tuple[str, ...], rest: str = "") -> tuple[list[str], bool]:
    text = StopStringFilter(Deltas(deltas, rest), stops)
    seen = []
    for token in range(len(deltas)):
        seen.append(text.push(token))
        if text.stopped:
            return seen, True
    return [*seen, text.finish()], text.stopped


texts = st.text("ab\n", max_size=6)


@given(
    deltas=st.lists(texts, max_size=8), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), rest=texts
)
def test_the_text_ends_before_the_first_stop_string(deltas: list[str], stops: list[str], rest: str) -> None:
    seen, stopped = read(deltas, tuple(stops), rest)
    whole = "".join(deltas) + rest
    found = [whole.find(stop) for stop in stops if stop in whole]
    assert stopped == bool(found)
    text = "".join(seen)
    assert whole.startswith(text)
    assert not any(stop in text for stop in stops)
    assert stopped or text == whole
    if stopped:
        assert any(whole.startswith(stop, len(text)) for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert read(["a#", "#b", "#", "##c"], ("###",)) == (["a", "##b", "", ""], True)
    assert read(["a#", "#"], ("###",)) == (["a", "", "##"], False)
    assert read(["ab"], ()) == (["ab", ""], False)


def test_a_stop_string_in_held_back_text() -> None:
    assert read(["a"], ("bc",), rest="xbcd") == (["a", "x"], True)


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(SettingsError, match="a stop string is empty"):
        check_stops(["a", ""])
