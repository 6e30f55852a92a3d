"""What jobs over many files share: their progress, and groups of items that fit into memory."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ser_ray.progress import clock, show_progress

Item = TypeVar("Item")
EXPECTED = ("ok", "no_audio", "duplicate", "excluded")
"""Outcomes that are expected of such files or such a command. All others count as errors."""


@dataclass(frozen=True)
class Progress:
    """How far a job is."""

    done: int
    """Files with an outcome, including those that earlier runs committed."""
    total: int
    """Files listed."""
    errors: int
    """Files of this run that should have become features and did not."""
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


class Watch:
    """Adds up the outcomes of parts as they arrive."""

    def __init__(self, total: int, committed: int) -> None:
        self._total = total
        self._done = committed
        self._errors = 0
        self._first: tuple[float, int] | None = None  # its time, and how many were done by then

    def add(self, counts: Mapping[str, int]) -> Progress:
        """Add a part's number of files by status and return how far the job is."""
        now = time.monotonic()
        self._done += sum(counts.values())
        self._errors += sum(count for status, count in counts.items() if status not in EXPECTED)
        since, before = self._first = self._first or (now, self._done)
        rate = (self._done - before) / max(now - since, 1e-9)
        return Progress(self._done, self._total, self._errors, rate)


@contextmanager
def show(progress: Callable[[Progress], None] | None) -> Iterator[Callable[[Progress], None]]:
    """Yield the function to call with each `Progress`: `progress`, or else a bar or log lines."""
    if progress is not None:
        yield progress
        return
    with show_progress() as report:
        yield lambda now: report(str(now), now.done, now.total)


def set_up_ray_data() -> None:
    """Silence Ray Data's output, and let parts use all CPUs from the start."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Otherwise a second part starts only when the first is done and the size of its result is
    # known. That takes seconds, as each worker process first imports Ray Data.
    context.op_resource_reservation_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; its log files stay as they are
            handler.setLevel(logging.ERROR)


def in_groups(
    items: Iterable[Item], size_of: Callable[[Item], int], size: int
) -> Iterator[list[Item]]:
    """Yield the items in groups; each ends with the item with which its size reaches `size`."""
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
