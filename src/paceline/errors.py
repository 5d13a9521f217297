"""The exception tree.

Every error a user can cause is a `PacelineError` whose message is one line: what is wrong, where, and the cure. The
command line prints that line and exits with code 2; the library raises it. Any other exception is a defect.
"""


class PacelineError(Exception):
    """Base of all errors that a user can cause; `str(error)` is one line with the cause and the cure."""


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
