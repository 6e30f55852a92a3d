"""Watching a long job: files done, rate, errors so far and time left.

A bar where standard error is a terminal; plain lines, at most one in `LINE_SECONDS`, where it is a
job's log.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

LINE_SECONDS = 10.0
EXPECTED = ("ok", "no_audio", "duplicate", "excluded")
"""Outcomes that are the nature of a file or of the command; all others are errors of a clip."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    """Files answered, those that earlier runs committed included."""
    total: int
    """Files listed."""
    errors: int
    """Files of this run that should have become features and did not."""
    rate: float
    """Files a second since the first ones of this run were done; 0 until there are more."""

    @property
    def seconds_left(self) -> float | None:
        """Time until all are done at the present rate; None while that is not known."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        text = f"{self.done} of {self.total} files, {self.errors} errors"
        if self.seconds_left is None:
            return text
        minutes, seconds = divmod(round(self.seconds_left), 60)
        return f"{text}, {self.rate:.0f} files/s, {minutes}:{seconds:02d} left"


class Watch:
    """Adds up the outcomes of parts as they come back."""

    def __init__(self, total: int, committed: int) -> None:
        self._total = total
        self._done = committed
        self._errors = 0
        self._first: tuple[float, int] | None = None  # when, and how many were done by then

    def add(self, counts: Mapping[str, int]) -> Progress:
        """Count the outcomes of a part and return how far the job is."""
        now = time.monotonic()
        self._done += sum(counts.values())
        self._errors += sum(count for status, count in counts.items() if status not in EXPECTED)
        since, before = self._first = self._first or (now, self._done)
        rate = (self._done - before) / max(now - since, 1e-9)
        return Progress(self._done, self._total, self._errors, rate)


@contextlib.contextmanager
def show(progress: Callable[[Progress], None] | None) -> Iterator[Callable[[Progress], None]]:
    """Yield what to call with each `Progress`: the given function, else a bar or a log."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bar() as report:
            yield report
    else:
        yield _Lines().report


class _Lines:
    """Plain lines on standard error, now and then and at the end."""

    def __init__(self) -> None:
        self._last = -LINE_SECONDS

    def report(self, progress: Progress) -> None:
        is_last = progress.done == progress.total
        if (now := time.monotonic()) - self._last >= LINE_SECONDS or is_last:
            self._last = now
            print(progress, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting")

        def report(progress: Progress) -> None:
            bar.update(
                task, total=progress.total, completed=progress.done, description=str(progress)
            )

        yield report
