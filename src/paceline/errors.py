"""The exception tree.

Every error a user can cause is a `PacelineError` whose message is one line: what is wrong, where, and the cure. The
command line prints that line and exits with code 2; the library raises it. Any other exception is a defect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

MAX_MESSAGE = 500  # characters
MAX_REASON = 200


class PacelineError(Exception):
    """Base of all errors that a user can cause; `str(error)` is one line with the cause and the cure.

    Messages may quote values of any size: a long one keeps its beginning, which says where, and its end, the cure.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shorten(message, MAX_MESSAGE))


class CheckpointError(PacelineError):
    """A model folder is missing, is not a Gemma 4 checkpoint, or one of its files is damaged or incomplete."""


class PairError(PacelineError):
    """A drafter does not belong to its target; the message names the two numbers that disagree."""


class SettingsError(PacelineError):
    """A setting is out of range or unknown."""


class PromptError(PacelineError):
    """A prompt cannot be used: too long for the context, empty, or not valid text."""


class ContextError(PromptError):
    """A prompt is too long for the context."""


class BusyError(PacelineError):
    """The queue is full; trying again later helps."""


class StoppingError(BusyError):
    """The server is stopping and accepts no new requests."""


class BackendError(PacelineError):
    """A backend cannot do what was asked: not compiled, no such processor feature, a rollback it cannot undo."""


def shorten(text: str, most: int) -> str:
    """One line of at most `most` characters; what is cut from the middle is marked."""
    head = most * 2 // 3
    tail = most - head - len(" ... ")
    line = " ".join(text[: 8 * most].split())
    if len(text) <= 8 * most and len(line) <= most:
        return line
    return f"{line[:head]} ... {' '.join(text[-8 * most :].split())[-tail:]}"


@contextlib.contextmanager
def translated(kind: type[PacelineError], message: str) -> Iterator[None]:
    """Turn whatever a library raises into one error of ours. Panics of Rust libraries are no `Exception`.

    Args:
        kind: the error to raise.
        message: its text; `{reason}` stands for what the library said.
    """
    try:
        yield
    except (PacelineError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = shorten(str(error) or type(error).__name__, MAX_REASON)
        raise kind(message.replace("{reason}", reason)) from error
