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

    It is refreshed by those calls alone: a thread would disturb timings. What is done may say more after a comma; when
    something else is begun, so is the estimate of the time left.

    Args:
        unit: what is counted.
        console: of stderr, if something is printed above the bar meanwhile.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    shown = console or Console(stderr=True)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, *times, console=shown, auto_refresh=False, transient=True) as bar:
        task, begun = bar.add_task("", total=None, visible=False), ""

        def show(what: str, done: int, total: int) -> None:
            nonlocal begun
            if begun != (begun := what.partition(",")[0]):
                bar.reset(task, description=what, total=total)
            bar.update(task, description=what, completed=done, total=total, visible=True, refresh=True)

        yield show
