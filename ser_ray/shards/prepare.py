"""From a corpus to its shards: a Ray Data job over the parts of a plan.

One row of the dataset is one part, and the job's tasks write the parts themselves: they come out
the same bytes in whatever order, on whatever worker and after whatever interruption. What flows
back to the driver is a count of outcomes. A run that is given again does only the parts whose key
is not committed; the card is written when all are.
"""

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from ser_ray.corpus.manifest import exclude, list_corpus
from ser_ray.errors import ShardsError
from ser_ray.features.extract import Extractor
from ser_ray.shards.card import CARD_NAME, ShardCard, make_card, read_card, write_card
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.lock import Lock
from ser_ray.shards.part import (
    PartResult,
    outcomes_name,
    part_name,
    read_key,
    rows_from_bytes,
    rows_to_bytes,
    write_part,
)
from ser_ray.shards.plan import Plan, describe_changes, make_plan, read_plan, write_plan
from ser_ray.shards.progress import Progress, Watch, show
from ser_ray.storage import filesystem_of

_LEFT_BEHIND = re.compile(r"part-\d+(\.outcomes)?\.parquet|.*\.tmp")


@dataclass(frozen=True)
class PrepareSummary:
    """What a run did and what the shard set now holds."""

    card: ShardCard
    """The shard set."""
    notes: tuple[str, ...]
    """What was found of an earlier run, a line each."""
    files_done: int
    """Files that this run answered, the others being committed already."""
    seconds: float
    """Wall time of this run."""

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.card.counts.items())
        return "\n".join(
            [
                *self.notes,
                f"{self.card.num_files} files: {counts}",
                f"{self.files_done} of them done now, in {self.seconds:.1f} s",
            ]
        )


def prepare(
    config: PrepareConfig, *, progress: Callable[[Progress], None] | None = None
) -> PrepareSummary:
    """Write the shards of a corpus, or what is missing of them.

    Args:
        config: which clips, where to, which features.
        progress: called after every part; by default a bar or log lines on standard error.

    Raises:
        CorpusError: no corpus is found.
        ShardsError: another run writes there, or a part could not be written.
    """
    started = time.monotonic()
    corpus = list_corpus(config.corpus)
    manifest = exclude(corpus.manifest, config.include)
    filesystem, folder = filesystem_of(config.shards)
    filesystem.create_dir(folder, recursive=True)
    with Lock(filesystem, folder) as lock:
        before = read_plan(filesystem, folder)
        plan = make_plan(manifest, config.features, config.rows_per_part, before)
        waiting = [
            part for part in plan.parts if read_key(filesystem, folder, part) != plan.key(part)
        ]
        files_done = sum(len(plan.rows(part)) for part in waiting)
        notes = () if before is None else _notes(before, plan, waiting)
        card = read_card(filesystem, folder)
        if waiting or card is None or before is None or not plan.files.equals(before.files):
            _uncommit(filesystem, folder, plan, waiting)
            write_plan(filesystem, folder, plan)
            watch = Watch(len(plan.files), len(plan.files) - files_done)
            with show(progress) as report:
                for result in _write_parts(config, plan, waiting) if waiting else ():
                    lock.check()
                    report(watch.add(result.counts))
            card = make_card(filesystem, folder, corpus, plan)
            write_card(filesystem, folder, card)
    return PrepareSummary(card, notes, files_done, time.monotonic() - started)


def _notes(before: Plan, plan: Plan, waiting: list[int]) -> tuple[str, ...]:
    """Say what an earlier run left and what will be done about it."""
    again = f"{len(plan.parts) - len(waiting)} of {len(plan.parts)} parts are committed already"
    return (*describe_changes(before, plan), again)


def _uncommit(filesystem: fs.FileSystem, folder: str, plan: Plan, waiting: list[int]) -> None:
    """Delete the card, the parts that will be done again and what nobody listed any more needs."""
    kept = set(plan.parts) - set(waiting)
    names = {name(part) for part in kept for name in (part_name, outcomes_name)}
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{folder}/{CARD_NAME}")
    for entry in filesystem.get_file_info(fs.FileSelector(folder)):
        if entry.base_name not in names and _LEFT_BEHIND.fullmatch(entry.base_name):
            filesystem.delete_file(entry.path)


def _write_parts(config: PrepareConfig, plan: Plan, waiting: list[int]) -> Iterator[PartResult]:
    """Run the job and yield each part as it is committed."""
    import ray
    import ray.data

    again = "; what is committed stays: when that is mended, give the same command again"
    _quieten_ray_data()
    parts = ray.data.from_items(
        [{"part": part, "rows": rows_to_bytes(plan.rows(part))} for part in waiting],
        override_num_blocks=len(waiting),
    )
    writer = _PartWriter(config.shards, Extractor(config.features))
    try:
        for row in parts.map(writer.write).iter_rows():
            if row["failure"]:
                raise ShardsError(
                    f"{config.shards}/{part_name(row['part'])}: {row['failure']}{again}"
                )
            yield PartResult(row["part"], json.loads(row["counts"]))
    except ray.exceptions.RayError as error:
        raise ShardsError(f"{config.shards}: the job broke off ({error}){again}") from error


def _quieten_ray_data() -> None:
    """Leave the console to our own progress; Ray Data's messages stay in its log files."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)


@dataclass(frozen=True)
class _PartWriter:
    """What every worker needs beyond its part."""

    shards: str
    extractor: Extractor

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the part that is one row of the dataset."""
        filesystem, folder = filesystem_of(self.shards)
        try:
            rows = rows_from_bytes(row["rows"])
            result = write_part(filesystem, folder, row["part"], rows, self.extractor)
        except OSError as error:
            return {"part": row["part"], "counts": "{}", "failure": error.strerror or str(error)}
        return {"part": row["part"], "counts": json.dumps(result.counts), "failure": ""}
