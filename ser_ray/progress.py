"""Showing how far a long job is: a bar on a terminal, lines of text in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LINE_SECONDS = 10.0
"""A log gets at most one line in this time, and one more at the end."""

Report = Callable[[str, int, int], None]
"""Called with a text that says how far the job is, the amount that is done, and the total."""


@contextmanager
def show_progress() -> Iterator[Report]:
    """Yield a function to call after each step, which shows the step on standard error."""
    if not sys.stderr.isatty():
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(
        BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)
    ) as bar:
        task = bar.add_task("starting")
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
