"""The process that renders a chat template; see `template_worker` for what runs in it and for the protocol."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.errors import CheckpointError, PromptError

SECONDS = 3  # for one request
MEMORY = 1 << 30  # bytes, beyond what the process takes when it starts
TEXT = 1 << 23  # characters of a prompt; contexts of 256k tokens hold a fraction of it
ANSWER = 8 * TEXT  # bytes of a prompt as JSON in UTF-8, escapes included
PIECE = 1 << 16  # bytes

WORKER = Path(__file__).with_name("template_worker.py")


class TemplateProcess:
    """Starts the process when it is needed, and anew after it was ended for reaching a limit.

    All methods but `close` are called on one thread.

    Args:
        source: the Jinja template.
        name: of the template, for messages.
    """

    def __init__(self, source: str, name: str) -> None:
        self._source, self._name = source, name
        self._process: subprocess.Popen[bytes] | None = None
        self._variables: frozenset[str] | None = None  # None until the process has compiled the template
        self._closed = False

    def start(self) -> None:
        """Start the process, without waiting for it, if there is none.

        Raises:
            PromptError: Python cannot be started.
        """
        if self._process and self._process.poll() is None:
            return
        self.end()
        if self._closed:
            raise PromptError("the chat template is closed; the interpreter is exiting")
        limits = [str(limit) for limit in (MEMORY, TEXT, SECONDS)]
        try:
            # In a session of its own: an interrupt from the terminal is for the caller.
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(WORKER), *limits, *_jinja_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise _not_started(str(error)) from error
        assert self._process.stdin
        os.set_blocking(self._process.stdin.fileno(), False)
        self._variables = None

    def variables(self) -> frozenset[str]:
        """The names that the template uses.

        Raises:
            CheckpointError: the template is not valid.
            PromptError: Python cannot be started.
        """
        self.start()
        if self._variables is None:
            answer = self._ask(_encoded({"source": self._source}))
            if "variables" not in answer:
                self.end()
                reason = answer.get("error") or answer["limit"]
                kind = "is not valid Jinja" if "error" in answer else "cannot be used"
                raise CheckpointError(f"{self._name} {kind} ({reason}); download it again")
            self._variables = frozenset(answer["variables"])
        return self._variables

    def render(self, variables: bytes) -> str:
        """The text for variables, encoded by `encoded_variables`.

        Raises:
            PromptError: the template rejects the variables, fails, or reaches a limit.
            CheckpointError: the template is not valid.
        """
        self.variables()
        answer = self._ask(variables)
        if "error" in answer:
            raise PromptError(
                f"the model's chat template rejects the messages: {answer['error']}; change them or use --raw"
            )
        if "limit" in answer:
            self.end()
            raise PromptError(f"the model's chat template fails: {answer['limit']}; shorten the messages or use --raw")
        return str(answer["text"])

    def end(self) -> None:
        """End the process if there is one, and wait for its end."""
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not written is lost
                    pipe.close()  # type: ignore[union-attr]

    def close(self) -> None:
        """End what runs now and allow no further start; `end` must follow on the thread. From any thread."""
        self._closed = True
        if process := self._process:
            process.kill()

    def _ask(self, line: bytes) -> dict[str, Any]:
        """Send a line and return the answer, within the limits."""
        try:
            answer: dict[str, Any] = json.loads(self._exchange(line).decode("utf-8", "surrogatepass"))
            return answer
        except TimeoutError:
            self.end()
            return {"limit": f"it takes more than {SECONDS} seconds"}
        except (OSError, ValueError) as error:  # the pipe is closed; half an answer
            process = self._process
            assert process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            self.end()
            if self._variables is None and process.returncode > 0 and not self._closed:
                raise _not_started(f"exit code {process.returncode}") from error
            return {"limit": f"its process has ended with code {process.returncode} ({error})"}

    def _exchange(self, line: bytes) -> bytes:
        assert self._process
        assert self._process.stdin
        assert self._process.stdout
        into, out = self._process.stdin.fileno(), self._process.stdout.fileno()
        until = time.monotonic() + SECONDS
        left = memoryview(line)
        while left:
            _wait(into, select.POLLOUT, until)
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(into, left[:PIECE]) :]
        answer = bytearray()
        while not answer.endswith(b"\n"):
            _wait(out, select.POLLIN, until)
            piece = os.read(out, PIECE)
            answer += piece
            if not piece or len(answer) > ANSWER:
                raise ValueError("no whole answer")
        return bytes(answer)


def _not_started(reason: str) -> PromptError:
    return PromptError(
        f"the chat template needs a Python process of its own, and {sys.executable or 'Python'!r} cannot be started "
        f"({reason}); use raw text (--raw)"
    )


def encoded_variables(variables: dict[str, Any]) -> bytes:
    """The variables of one rendering, as the process takes them.

    Raises:
        PromptError: they are not values of JSON.
    """
    try:
        encoded = _encoded(variables)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"the messages must be values of JSON: {error}; change them or use --raw") from error
    _check_keys(variables)
    return encoded


def _encoded(value: dict[str, Any]) -> bytes:
    # Half a surrogate pair stays what it is.
    return (json.dumps(value, ensure_ascii=False, default=_plain) + "\n").encode("utf-8", "surrogatepass")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return list(value)
    raise TypeError(f"{type(value).__name__} is none")


def _check_keys(value: object) -> None:
    """JSON would turn other keys into strings without a word. The value is a finite tree, for it was encoded."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if odd := next((key for key in value if not isinstance(key, str)), None):
                raise PromptError(f"the messages have the key {odd!r}, which is no string; change it")
            left += value.values()
        elif isinstance(value, list | tuple):
            left += value


def _jinja_folders() -> list[str]:
    """Where Jinja and what it needs are imported from: an isolated process does not see all folders of this one."""
    found = (importlib.util.find_spec(name) for name in ("jinja2", "markupsafe"))
    return sorted({str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin})


def _wait(pipe: int, event: int, until: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
        raise TimeoutError
