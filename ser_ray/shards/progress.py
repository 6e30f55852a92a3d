"""Progress of jobs over many files, and groups of items that fit into memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from ser_ray.progress import Report, show_progress

Item = TypeVar("Item")
EXPECTED = ("ok", "no_audio", "duplicate", "excluded")
"""Outcomes that are normal. All other outcomes count as errors."""


@contextmanager
def count_files(
    total: int, before: int, report: Report | None
) -> Iterator[Callable[[Mapping[str, int]], None]]:
    """Yield a function that adds a shard's number of files by status, and reports the sums.

    Args:
        total: number of listed files.
        before: number of files that earlier runs finished.
        report: called with the sums; by default a bar or log lines are shown.
    """
    done, errors = before, 0
    with show_progress("files", report) as show:

        def add(counts: Mapping[str, int]) -> None:
            nonlocal done, errors
            done += sum(counts.values())
            errors += sum(count for status, count in counts.items() if status not in EXPECTED)
            show(f"{done} of {total} files, {errors} errors", done, total)

        yield add


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
