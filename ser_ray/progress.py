"""Shows the progress of a long job on standard error: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LINE_SECONDS = 10.0
"""Shortest time between two lines in a log, except before the last line."""

Report = Callable[[str, float, float], None]
"""Called with a text to show, the amount of work that is done, and the total amount."""


@cache
def stderr_console() -> "Console":
    """Return the process's console on standard error.

    There is only one, so that lines that are printed while a bar is shown appear above the bar.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def clock(seconds: float) -> str:
    """Write seconds as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def bar_below(console: "Console") -> "Progress":
    """Make a bar with a text that stays below the lines of a terminal; a log does not get it."""
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        console=console,
        speed_estimate_period=3600,  # seconds
        disable=not console.is_terminal,
        transient=True,
    )


@contextmanager
def show_progress(given: Report | None = None) -> Iterator[Report]:
    """Yield a function that shows progress on standard error; call it after each step.

    It adds the rate and the time left, both since its first call, to the text. If a function is
    given, that one is yielded instead.
    """
    if given is not None:
        yield given
        return
    first: tuple[float, float] | None = None
    last = -LINE_SECONDS
    with bar_below(stderr_console()) as bar:
        task = bar.add_task("starting", total=None)

        def report(text: str, done: float, total: float) -> None:
            nonlocal first, last
            now = time.monotonic()
            since, before = first = first or (now, done)
            if now > since and done > before:
                rate = (done - before) / (now - since)
                text += f", {rate:.1f}/s, {clock((total - done) / rate)} left"
            bar.update(task, description=text, completed=done, total=total)
            if bar.disable and (now - last >= LINE_SECONDS or done == total):
                last = now
                print(text, file=sys.stderr, flush=True)

        yield report
