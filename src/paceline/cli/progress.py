"""A progress bar on stderr for commands that take minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextmanager
def progress_bar(unit: str, console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A bar if stderr is a terminal. What it gives is called with what is done, how much of it, and of how much.

    It is refreshed by those calls alone: a thread would disturb timings.

    Args:
        unit: what is counted.
        console: of stderr, if something is printed above the bar meanwhile.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    shown = console or Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=shown, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, visible=True, refresh=True)

        yield show
