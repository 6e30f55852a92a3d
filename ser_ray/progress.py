"""Shows the progress of a long job on standard error: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_SECONDS = 10.0
"""Shortest time between two lines in a log. The line for all work done comes at any time."""

Report = Callable[[str, float, float], None]
"""Called with a text to show, the amount of work that is done, and the total amount."""
EXPECTED = ("ok", "unsure", "no_audio", "duplicate", "excluded")
"""Outcomes that are normal. Progress counts files with any other outcome as errors."""


@cache
def stderr_console() -> "Console":
    """Return the console on standard error.

    All modules share one console, so that lines that are printed while a bar is shown appear above
    the bar.
    """
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)


def clock(seconds: float) -> str:
    """Return seconds as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def show_progress(unit: str, given: Report | None = None) -> Iterator[Report]:
    """Yield a function that shows progress on standard error. Call it after each step.

    One second after its first call, the function begins to add two values to the text: the rate
    since the first call, and the estimated remaining time.

    Args:
        unit: what is counted, such as `files`.
        given: another function to yield instead; None for this one.
    """
    if given is not None:
        yield given
        return
    first: tuple[float, float] | None = None
    last = -LINE_SECONDS
    with ExitStack() as stack:
        bar = None
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = BarColumn(), TextColumn("{task.description}", markup=False)
            bar = stack.enter_context(Progress(*columns, console=stderr_console()))
            task = bar.add_task("starting", total=None)

        def report(text: str, done: float, total: float) -> None:
            nonlocal first, last
            now = time.monotonic()
            if first is None:
                first = now, done
            seconds, work = now - first[0], done - first[1]
            if seconds >= 1 and work > 0:  # a shorter time gives no reliable rate
                rate = work / seconds
                text += f", {rate:.1f} {unit}/s"
                if done < total:
                    text += f", {clock((total - done) / rate)} left"
            if bar is not None:
                bar.update(task, description=text, completed=done, total=total)
            elif now - last >= LINE_SECONDS or done == total:
                last = now
                stderr_console().print(text)  # a notebook shows it without the colour of errors

        yield report


@contextmanager
def count_files(
    total: int, before: int, given: Report | None
) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """Yield a function that takes the number of newly finished files with each outcome.

    The function shows how many files are done, and how many of them have errors.

    Args:
        total: number of listed files.
        before: number of files that earlier runs finished.
        given: shows the progress; if None, it is shown on standard error.
    """
    done, errors = before, 0
    with show_progress("files", given) as report:

        def add(counts: Mapping[str, int]) -> None:
            nonlocal done, errors
            done += sum(counts.values())
            errors += sum(count for outcome, count in counts.items() if outcome not in EXPECTED)
            report(f"{done} of {total} files, {errors} errors", done, total)

        yield add
