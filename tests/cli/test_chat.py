"""The chat: its commands without a terminal, the pipe, and a session under a pseudo-terminal."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from paceline.cli.chat import converse
from paceline.cli.chat_terminal import Page, complete_blocks
from paceline.cli.conversation import COMMANDS, Conversation, Reply, Turn
from paceline.cli.main import run
from paceline.errors import PacelineError
from paceline.types import SamplingParams
from tests.engine.test_engine import engine
from tests.fixtures.scripted_backend import ScriptedBackend


@pytest.fixture
def conversation() -> Conversation:
    scripted = engine(backend=ScriptedBackend(slots=1, context=400))
    return Conversation(scripted, SamplingParams(temperature=1.0), max_tokens=5)


def ask(conversation: Conversation, line: str) -> str:
    """The answer to a line, or what a command says."""
    reply = conversation.handle(line)
    if reply.turn is None:
        return reply.text
    with reply.turn as turn:
        list(turn)
    return turn.text


def leave(conversation: Conversation, error: BaseException) -> None:
    """Begin an answer that an error ends."""
    turn = conversation.handle("more").turn
    assert turn is not None
    with turn:
        next(iter(turn))
        raise error


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


# -- the conversation, without a terminal ------------------------------------------------------------------------------


def test_turns_are_kept(conversation: Conversation) -> None:
    answers = [ask(conversation, line) for line in ("hello", "  indented\n")]
    assert roles(conversation) == ["user", "assistant"] * 2
    assert [message["content"] for message in conversation.turns[::2]] == ["hello", "  indented"]
    assert [message["content"] for message in conversation.turns[1::2]] == answers
    assert conversation.handle(" \n") == Reply()


def test_help_names_every_command(conversation: Conversation) -> None:
    for name in COMMANDS:
        assert f"/{name}" in ask(conversation, "/help")


def test_quit(conversation: Conversation) -> None:
    assert conversation.handle("/quit").end


@pytest.mark.parametrize("line", ["/nope", "/", "/Help"])
def test_unknown_commands_name_help(conversation: Conversation, line: str) -> None:
    with pytest.raises(PacelineError, match="/help"):
        conversation.handle(line)


def test_two_slashes_send_one(conversation: Conversation) -> None:
    ask(conversation, "//etc/hosts")
    assert conversation.turns[0]["content"] == "/etc/hosts"


def test_the_system_prompt(conversation: Conversation) -> None:
    assert ask(conversation, "/system") == "no system prompt"
    ask(conversation, "/system be\nbrief")
    assert conversation.messages == [{"role": "system", "content": "be\nbrief"}]
    assert ask(conversation, "/system") == "be\nbrief"
    ask(conversation, "hello")
    ask(conversation, "/clear")
    assert roles(conversation) == ["system"]
    ask(conversation, "/system none")
    assert conversation.messages == []


def test_undo(conversation: Conversation) -> None:
    ask(conversation, "one")
    ask(conversation, "two")
    assert ask(conversation, "/undo") == "removed: two"
    assert [message["content"] for message in conversation.turns][::2] == ["one"]
    ask(conversation, "/undo")
    for command in ("/undo", "/retry"):
        with pytest.raises(PacelineError, match="no message yet"):
            conversation.handle(command)


def test_retry_takes_a_new_seed(conversation: Conversation) -> None:
    ask(conversation, "/set seed 1")
    first = ask(conversation, "hello")
    ask(conversation, "/undo")
    assert ask(conversation, "hello") == first
    assert ask(conversation, "/retry") != first
    assert roles(conversation) == ["user", "assistant"]
    assert conversation.sampling.seed == 1


def test_retry_without_sampling_says_so(conversation: Conversation) -> None:
    ask(conversation, "/set temperature 0")
    ask(conversation, "hello")
    assert "temperature is 0" in conversation.handle("/retry").text


def test_settings(conversation: Conversation) -> None:
    for line in ("temperature 0.5", "top_k 3", "top-p 0.9", "min_p 0.1", "seed 7", "max_tokens 2", "draft_tokens 1"):
        ask(conversation, f"/set {line}")
    assert conversation.sampling == SamplingParams(0.5, 3, 0.9, 0.1, seed=7)
    assert (conversation.max_tokens, conversation.draft_tokens) == (2, 1)
    assert ask(conversation, "/set").split()[:2] == ["temperature", "0.5"]
    ask(conversation, "hello")
    assert conversation.statistics[-1].tokens == 2
    ask(conversation, "/set seed auto")
    ask(conversation, "/set draft_tokens auto")
    assert (conversation.sampling.seed, conversation.draft_tokens) == (None, "auto")


@pytest.mark.parametrize(
    "setting",
    [
        "temperature",
        "temperature hot",
        "temperature -1",
        "temperature nan",
        "top_k 1.5",
        "top_k 9999999999999999999",
        "top_p 2",
        "seed -1",
        "max_tokens 0",
        "max_tokens auto",
        "draft_tokens 16",
        "colour red",
    ],
)
def test_bad_settings_change_nothing(conversation: Conversation, setting: str) -> None:
    before = ask(conversation, "/set")
    with pytest.raises(PacelineError) as caught:
        conversation.handle(f"/set {setting}")
    assert len(str(caught.value).splitlines()) == 1
    assert ask(conversation, "/set") == before


def test_save_and_load(conversation: Conversation, tmp_path: Path) -> None:
    file = tmp_path / "a talk.json"
    file.write_text("old")
    ask(conversation, "/system brief")
    ask(conversation, "héllo")
    ask(conversation, f"/save {file}")
    kept = conversation.messages
    assert json.loads(file.read_text()) == kept
    assert os.listdir(tmp_path) == [file.name]
    other = Conversation(conversation.engine, SamplingParams())
    ask(other, f"/load {file}")
    assert other.messages == kept
    assert other.system == "brief"


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"{",
        b"\xff",
        b"3",
        b"[3]",
        b'[{"role": "user"}]',
        b'[{"role": "user", "content": 3}]',
        b'[{"role": "pirate", "content": "x"}]',
        b'[{"role": ["user"], "content": "x"}]',
        b'[{"role": "user", "content": "x"}, {"role": "system", "content": "x"}]',
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_changes_nothing(conversation: Conversation, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "talk.json"
    if content is not None:
        file.write_bytes(content)
    ask(conversation, "hello")
    before = conversation.messages
    with pytest.raises(PacelineError, match=re.escape(str(file))):
        conversation.handle(f"/load {file}")
    assert conversation.messages == before


def test_places_that_cannot_be_written(conversation: Conversation, tmp_path: Path) -> None:
    for command in (
        "/save",
        "/load",
        f"/save {tmp_path}",
        f"/load {tmp_path}",
        f"/save {tmp_path}/no/file",
        "/save \0",
    ):
        with pytest.raises(PacelineError):
            conversation.handle(command)
    assert os.listdir(tmp_path) == []


def test_a_failed_turn_changes_nothing(conversation: Conversation) -> None:
    ask(conversation, "hello")
    before = conversation.messages
    with pytest.raises(PacelineError, match="context holds 400"):
        conversation.handle("x" * 500)
    with pytest.raises(PacelineError, match="broken"):
        leave(conversation, PacelineError("broken"))
    assert conversation.messages == before
    ask(conversation, "still here")
    assert len(conversation.turns) == 4


def test_a_stopped_turn_keeps_what_was_written(conversation: Conversation) -> None:
    with pytest.raises(KeyboardInterrupt):
        leave(conversation, KeyboardInterrupt())
    assert roles(conversation) == ["user", "assistant"]
    assert conversation.turns[-1]["content"]
    turn = conversation.handle("more").turn
    assert turn is not None
    with turn:
        pass  # before the first word
    assert len(conversation.turns) == 2


def test_stats(conversation: Conversation) -> None:
    assert ask(conversation, "/stats").startswith("0 answers, 0 tokens")
    ask(conversation, "/set max_tokens 60")
    ask(conversation, "hello")
    first, *depths = ask(conversation, "/stats").splitlines()
    assert first.startswith("1 answers, 60 tokens")
    assert len(depths) == 4
    assert "█" in depths[0]


class Script:
    """A screen that keeps what it is told."""

    def __init__(self, *lines: str) -> None:
        self._lines = lines
        self.said: list[str] = []
        self.complaints: list[str] = []

    def lines(self) -> Iterator[str]:
        yield from self._lines

    def say(self, text: str) -> None:
        self.said.append(text)

    error = say

    def show(self, turn: Turn) -> None:
        with turn:
            self.said += ["".join(event.text for event in turn)]


def test_errors_do_not_end_the_chat(conversation: Conversation) -> None:
    script = Script("/nope", "x" * 500, "hello", "/quit", "never read")
    converse(conversation, script)  # type: ignore[arg-type]
    assert len(script.said) == 3
    assert len(conversation.turns) == 2


# -- markdown that grows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\n\ntwo", "one\n\n"),
        ("one\n\n", ""),
        ("- a\n\n  more", ""),
        ("```\na\n\nb\n", ""),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"),
        ("````\n```\n\nx\n````\n\ny", "````\n```\n\nx\n````\n\n"),
        ("a\n\nb\n\nc", "a\n\nb\n\n"),
    ],
)
def test_finished_blocks(text: str, done: str) -> None:
    assert text[: complete_blocks(text)] == done


def test_a_long_answer_is_on_the_screen_once() -> None:
    file = io.StringIO()
    console = Console(file=file, width=60, height=10, force_terminal=False)
    answer = "".join(f"- point {number}\n" for number in range(40)) + "\n\x1b[31mlast *words*"
    with Page(console) as page:
        for letter in answer:
            page.update(letter, "status")
    shown = file.getvalue()
    assert re.findall(r"point (\d+)", shown) == [str(number) for number in range(40)]
    assert "[31mlast words" in shown
    assert "\x1b" not in shown


# -- the pipe ----------------------------------------------------------------------------------------------------------

OPTIONS = ("--quant", "q8", "--max-tokens", "24", "--seed", "3")


def piped(*lines: str | bytes, options: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """stdout and the lines of stderr; the exit code says whether a line failed."""
    sent = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
    command = [sys.executable, "-m", "paceline", "chat", *OPTIONS, *options]
    done = subprocess.run(command, input=sent, capture_output=True, timeout=120)
    assert done.returncode == (b"paceline: error:" in done.stderr), done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    return done.stdout.decode(), [line for line in done.stderr.decode().splitlines() if "weights:" not in line]


def test_a_pipe_of_everything(tmp_path: Path) -> None:
    out, err = piped(
        "import socket, a first message of some length",
        "and a second message",
        "",
        "/nope",
        "/set temperature hot",
        f"/save {tmp_path}/talk.json",
        "/clear",
        f"/load {tmp_path}/talk.json",
        f"/load {tmp_path}/absent.json",
        b"caf\xe9",
        "a third message\r",
    )
    figures = [line for line in err if "tokens/s" in line]
    cached = [int(re.search(r"prompt (\d+) of", line)[1]) for line in figures]
    assert len(figures) == 3
    assert cached[0] == 0 < cached[1] < cached[2]
    assert [line.split(";")[0] for line in err if "error" in line] == [
        "paceline: error: unknown command /nope",
        "paceline: error: temperature cannot be 'hot'",
        f"paceline: error: {tmp_path}/absent.json: cannot be read (No such file or directory)",
        "paceline: error: stdin: this line is not UTF-8 text",
    ]
    messages = json.loads((tmp_path / "talk.json").read_text())
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(answers) == 2
    assert out.startswith("".join(answer if answer.endswith("\n") else answer + "\n" for answer in answers))


def test_the_cache_does_not_change_the_text() -> None:
    first, *_ = piped("a message of enough tokens", "and another", options=("--draft-tokens", "0"))
    assert first == piped("a message of enough tokens", "and another")[0]


def test_nothing_to_say() -> None:
    assert piped() == ("\n" * 0, [])


@pytest.mark.parametrize(
    "options",
    [("--temperature", "-1"), ("--stop", ""), ("--draft-tokens", "x"), ("--top-k", "99999999999"), ("--context", "1")],
)
def test_wrong_options(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--quant", "q8", *options]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_small_context_costs_a_turn(tmp_path: Path) -> None:
    out, err = piped("x " * 200, "/stats", options=("--context", "64"))
    assert "the context holds 64" in err[0]
    assert err[1].startswith("0 answers")
    assert out == ""


def test_ctrl_c_in_a_pipe_ends() -> None:
    command = [sys.executable, "-m", "paceline", "chat", *OPTIONS]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdin is not None
    assert running.stdout is not None
    running.stdin.write(b"hello\n")
    running.stdin.flush()
    running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"Traceback" not in err


# -- a terminal --------------------------------------------------------------------------------------------------------


PROMPT = "\n>"


class Tty:
    """A chat under a pseudo-terminal."""

    def __init__(self, *options: str) -> None:
        self._seen = ""
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = os.environ | {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = [sys.executable, "-m", "paceline", "chat", *OPTIONS, *options]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
        )
        os.close(theirs)

    def send(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def until(self, text: str) -> str:
        """What the screen is sent up to that text, without the escape sequences."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            before, found, rest = re.sub(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])", "", self._seen).partition(text)
            if found:
                self._seen = rest
                return before + found
            if select.select([self._ours], [], [], 0.1)[0]:
                try:
                    self._seen += os.read(self._ours, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    break
        raise AssertionError(f"{text!r} did not come: {self._seen!r}")

    def close(self) -> int:
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        finally:
            os.close(self._ours)


def test_a_session_in_a_terminal() -> None:
    tty = Tty()
    try:
        assert "tiny-python with its drafter" in tty.until(PROMPT)
        tty.send("import os\r")
        assert "24 tokens, " in tty.until("cached, cut")
        tty.until(PROMPT)
        tty.send("half a line\x03")  # Ctrl-C clears it
        tty.send("/stats\r")
        assert "1 answers, 24 tokens" in tty.until("rounds")
        tty.send("one\x1b\rtwo\x03/nope\r")
        tty.until("unknown command /nope")
        tty.until(PROMPT)
        tty.send("\x04")
    finally:
        code = tty.close()
    assert code == 0


def test_ctrl_c_stops_an_answer_in_a_terminal(tmp_path: Path) -> None:
    saved = tmp_path / "talk.json"
    tty = Tty("--max-tokens", "30000", "--stop", "never written", "--logit-bias", "1=-1000", "--logit-bias", "5=-1000")
    try:
        tty.until(PROMPT)
        tty.send("\x1b[200~import os\nimport sys\x1b[201~\r")  # pasted
        tty.until("Ctrl-C stops")
        time.sleep(0.5)
        tty.process.send_signal(signal.SIGINT)
        tty.until("stopped")
        tty.send(f"/save {saved}\r")
        tty.until("2 messages")
        tty.send("/quit\r")
    finally:
        code = tty.close()
    assert code == 0
    question, answer = json.loads(saved.read_text())
    assert question == {"role": "user", "content": "import os\nimport sys"}
    assert answer["content"]
    assert oct(Path(os.environ["PACELINE_CACHE"], "chat-history").stat().st_mode)[-3:] == "600"
