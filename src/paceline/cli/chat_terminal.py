"""The terminal interface of `paceline chat`: a prompt with history, and answers as markdown."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING

from paceline.cli.conversation import Turn, progress, summary
from paceline.files import cache_folder

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import History
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.segment import Segments


class Terminal:
    """A prompt with history; answers are rendered as markdown: complete blocks are final, the last one is redrawn."""

    def __init__(self, title: str) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False)
        self._title = title

    def lines(self) -> Iterator[str]:
        self.say(self._title)
        session = _session()
        while True:
            try:
                line = session.prompt([("bold", "> ")])
            except EOFError:
                return
            yield line.encode("utf-8", "replace").decode()

    def say(self, text: str) -> None:
        self._console.print(text, style="dim", markup=False)

    def error(self, text: str) -> None:
        self._console.print(text, style="red", markup=False)

    def show(self, turn: Turn) -> None:
        stopped = False

        def stop(_signal: int, _frame: FrameType | None) -> None:
            nonlocal stopped
            if stopped or turn.stream.sequence.in_prefill:  # prefill: the next event may take long
                raise KeyboardInterrupt
            stopped = True

        page = Page(self._console)
        with suppress(KeyboardInterrupt), _keyboard(stop), turn, page:
            page.update("", "prefill; Ctrl-C stops")
            for event in turn:
                page.update(event.text, f"{progress(turn.stream.statistics)}; Ctrl-C stops")
                if stopped:
                    break
        if not turn.text and not turn.finish:
            self.say("stopped before the first token; the message was removed")
            return
        ending = {"length": ", cut off", None: ", stopped"}.get(turn.finish, "")
        self.say(summary(turn.stream.statistics) + ending)


class Page:
    """An answer on the console. A context manager: at its end, the live part is printed."""

    def __init__(self, console: Console) -> None:
        from rich.live import Live

        self._console = console
        self._text = self._status = ""  # of the live part
        self._printed = False
        self._due = 0.0
        self._live = Live(self, console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Page:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        self._print(self._text)

    def update(self, text: str, status: str) -> None:
        """Add text; redraws at most ten times per second, and for at most 5 % of the time."""
        self._text += "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
        self._status = status
        started = perf_counter()
        if started < self._due:
            return
        end = complete_blocks(self._text)
        self._print(self._text[:end])
        self._text = self._text[end:]
        self._live.refresh()
        now = perf_counter()
        self._due = now + max(0.1, 20 * (now - started))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        if self._printed:
            yield ""
        yield self._rows(self._text, last=max(1, console.height - 4))
        yield Text(self._status, style="dim", no_wrap=True, overflow="ellipsis")

    def _print(self, text: str) -> None:
        if text.strip():
            if self._printed:
                self._console.print()
            self._console.print(self._rows(text), end="")
            self._printed = True

    def _rows(self, text: str, last: int = 0) -> Segments:
        """Rendered markdown without surrounding blank rows; at most `last` rows, to fit the screen."""
        from rich.markdown import Markdown
        from rich.segment import Segment, Segments

        # uses the terminal's own colours, which suit dark and light backgrounds
        rows = self._console.render_lines(Markdown(text, code_theme="ansi_dark"), pad=False)
        full = [number for number, row in enumerate(rows) if any(part.text.strip() for part in row)]
        rows = rows[full[0] : full[-1] + 1] if full else []
        return Segments([part for row in rows[-last:] for part in [*row, Segment.line()]])


def complete_blocks(text: str) -> int:
    """Length of the leading markdown blocks that more text cannot change."""
    end = place = 0
    fence, blank = "", False
    for line in text.split("\n"):
        words = line.strip()
        if blank and not fence and words and not line[0].isspace():
            end = place
        ticks = words[: len(words) - len(words.lstrip("`~"))]
        if fence and words == ticks and ticks.startswith(fence):
            fence = ""
        elif not fence and len(ticks) >= 3:
            fence = ticks
        blank = not words
        place += len(line) + 1
    return end


def _session() -> PromptSession[str]:
    """The prompt: Enter sends the message, pasted lines stay together, Ctrl-C clears it."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        elif sum(line.startswith("```") for line in buffer.text.split("\n")) % 2:
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c")
    @keys.add("<sigint>")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    return PromptSession(history=_history(), multiline=True, key_bindings=keys, prompt_continuation="  ")


def _history() -> History:
    """Input history, in a file that only its owner can read; in memory if it cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class BestEffortHistory(FileHistory):
        def store_string(self, string: str) -> None:
            with suppress(OSError):  # a full disk must not end the chat
                super().store_string(string)

    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return BestEffortHistory(path)


@contextmanager
def _keyboard(stop: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `stop` on Ctrl-C, and switch off echo, which would garble the live part."""
    import termios

    terminal, before = termios.tcgetattr(sys.stdin), signal.signal(signal.SIGINT, stop)
    quiet = [*terminal]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, terminal)
        signal.signal(signal.SIGINT, before)
