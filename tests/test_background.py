"""The thread for what must not be interrupted."""

from __future__ import annotations

import gc
import threading

import pytest

from paceline.background import Background
from paceline.errors import BackendError, CheckpointError, PacelineError, shorten, translated
from tests.fixtures.processes import assert_quiet, in_child


def test_calls_run_in_order_on_one_thread_that_is_not_the_callers():
    background = Background("test")
    seen = []
    for i in range(100):
        background.post(lambda i=i: seen.append((i, threading.get_ident())))
    ident = background.call(threading.get_ident)
    assert seen == [(i, ident) for i in range(100)]
    assert ident != threading.get_ident()


def test_a_call_raises_what_its_function_raises_and_the_thread_goes_on():
    background = Background("test")
    for error in (ValueError("no"), KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            background.call(lambda error=error: (_ for _ in ()).throw(error))
    assert background.call(lambda: 7) == 7


def test_the_thread_ends_with_the_object():
    background = Background("ends")
    thread = next(t for t in threading.enumerate() if t.name == "ends")
    background.call(lambda: 1)
    del background
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_forked_child_is_told():
    background = Background("test")

    def refused() -> None:
        with pytest.raises(BackendError, match="forked"):
            background.call(lambda: 1)

    in_child(refused)


def test_the_interpreter_exits_quietly_while_calls_are_running():
    program = (
        "import threading, time; from paceline.background import Background\n"
        "b = Background('busy')\n"
        "def ask():\n"
        "    while True: b.call(lambda: time.sleep(0.01))\n"
        "for _ in range(4): threading.Thread(target=ask, daemon=True).start()\n"
        "time.sleep(0.1)\n"
    )
    assert_quiet(program)


def test_messages_are_one_line_of_bounded_length():
    error = CheckpointError("folder/config.json: num_hidden_layers is\n" + repr("7" * 100_000) + "; give a number")
    assert str(error).startswith("folder/config.json: num_hidden_layers is '777")
    assert str(error).endswith("77'; give a number")
    assert len(str(error)) <= 500
    assert "\n" not in str(error)
    assert shorten("a  b\nc", 10) == "a b c"
    assert len(shorten(" " * 10_000 + "x" * 10_000, 100)) <= 100


def test_whatever_a_library_raises_becomes_one_error():
    class Panic(BaseException):
        pass

    for error in (Panic("at line 3"), ValueError(""), RecursionError("deep"), MemoryError()):
        with (
            pytest.raises(PacelineError, match=r"^tokenizer.json: cannot be used \("),
            translated(CheckpointError, "tokenizer.json: cannot be used ({reason})"),
        ):
            raise error
    for passed in (KeyboardInterrupt(), SystemExit(), BackendError("as it is")):
        with pytest.raises(type(passed)), translated(CheckpointError, "x"):
            raise passed
