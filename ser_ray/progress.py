"""Shows the progress of a long job on standard error: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0
"""Shortest time between two lines in a log, except before the last line."""

Report = Callable[[str, int, int], None]
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


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yield a function that shows progress on standard error; call it after each step."""
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(BarColumn(), TextColumn("{task.description}"), console=stderr_console()) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text, done, total: bar.update(
            task, description=text, completed=done, total=total
        )


def _log_lines() -> Report:
    last = -LINE_SECONDS

    def report(text: str, done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= LINE_SECONDS or done == total:
            last = now
            print(text, file=sys.stderr, flush=True)

    return report
