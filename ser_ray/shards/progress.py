"""Progress of jobs over many files, and groups of items that fit into memory."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ser_ray.progress import clock, show_progress

Item = TypeVar("Item")
EXPECTED = ("ok", "no_audio", "duplicate", "excluded")
"""Outcomes that are normal. All other outcomes count as errors."""


@dataclass(frozen=True)
class Progress:
    """The progress of a job."""

    done: int
    """Files with an outcome, including those that earlier runs committed."""
    total: int
    """Listed files."""
    errors: int
    """Files of this run whose outcome is not in `EXPECTED`."""
    rate: float
    """Files per second since the first result of this run; 0 before the second result."""

    @property
    def seconds_left(self) -> float | None:
        """Time until all files are done at this rate; None while the rate is unknown."""
        return (self.total - self.done) / self.rate if self.rate else None

    def __str__(self) -> str:
        text = f"{self.done} of {self.total} files, {self.errors} errors"
        if self.seconds_left is None:
            return text
        return f"{text}, {self.rate:.0f} files/s, {clock(self.seconds_left)} left"


class ProgressCounter:
    """Adds up the outcomes of parts as they arrive."""

    def __init__(self, total: int, committed: int) -> None:
        self._total = total
        self._done = committed
        self._errors = 0
        self._first: tuple[float, int] | None = None  # time of the first result, files done by then

    def add(self, counts: Mapping[str, int]) -> Progress:
        """Add a part's number of files by status, and return the progress of the job."""
        now = time.monotonic()
        self._done += sum(counts.values())
        self._errors += sum(count for status, count in counts.items() if status not in EXPECTED)
        since, before = self._first = self._first or (now, self._done)
        rate = (self._done - before) / max(now - since, 1e-9)
        return Progress(self._done, self._total, self._errors, rate)


@contextmanager
def show(progress: Callable[[Progress], None] | None) -> Iterator[Callable[[Progress], None]]:
    """Yield `progress`, or else a function that shows each `Progress` as a bar or log lines."""
    if progress is not None:
        yield progress
        return
    with show_progress() as report:
        yield lambda now: report(str(now), now.done, now.total)


def set_up_ray_data() -> None:
    """Silence Ray Data, and let tasks use all CPUs from the start."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # By default a second task starts only when the first has ended, and the size of its result is
    # known. That takes seconds, because each worker process first imports Ray Data.
    context.op_resource_reservation_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # not Ray Data's log files
            handler.setLevel(logging.ERROR)


def in_groups(
    items: Iterable[Item], size_of: Callable[[Item], int], size: int
) -> Iterator[list[Item]]:
    """Yield the items in groups. A group ends when the sum of its sizes reaches `size`."""
    group: list[Item] = []
    total = 0
    for item in items:
        group.append(item)
        total += size_of(item)
        if total >= size:
            yield group
            group, total = [], 0
    if group:
        yield group
