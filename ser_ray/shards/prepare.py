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
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ser_ray.cluster import cluster, one_of_each_folder, require_shared
from ser_ray.corpus.manifest import exclude, list_corpus
from ser_ray.errors import CorpusError, ShardsError
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.card import ShardCard, make_card, read_card, write_card
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.layout import (
    CARD_NAME,
    PLAN_NAME,
    REQUESTS_AT_ONCE,
    mark_name,
    outcomes_name,
    part_name,
    read_key,
)
from ser_ray.shards.part import PartResult, rows_from_bytes, rows_to_bytes, write_part
from ser_ray.shards.plan import (
    Plan,
    describe_changes,
    make_plan,
    read_plan,
    require_same_corpus,
    write_plan,
)
from ser_ray.shards.progress import Progress, Watch, show
from ser_ray.shards.read import ShardSet
from ser_ray.storage.lock import Lock
from ser_ray.storage.paths import absolute, filesystem_of

AGAIN = "; what is committed stays, so when that is mended give the same command again"
IN_USE = "is writing these shards; wait for it to end, or give another folder"
ELSEWHERE = "with several machines, shards belong in a bucket or on a disk that all of them mount"
_PART = r"part-\d+(\.outcomes)?\.parquet"
_LEFT_BEHIND = re.compile(
    rf"{_PART}|part-\d+\.trying|({_PART}|{CARD_NAME}|{PLAN_NAME})\.[0-9a-f]{{8}}\.tmp"
)


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
        return (
            f"{self.card.num_files} files: {counts}\n"
            f"{self.files_done} of them done now, in {self.seconds:.1f} s"
        )


def prepare(
    config: PrepareConfig,
    *,
    address: str = "",
    progress: Callable[[Progress], None] | None = None,
) -> PrepareSummary:
    """Write the shards of a corpus, or what is missing of them.

    Args:
        config: which clips, where to, which features.
        address: cluster to join, as `ser_ray.cluster.cluster` takes it; nothing is joined or
            started where nothing is missing.
        progress: called after every part; by default a bar or log lines on standard error, after
            what was found of an earlier run.

    Raises:
        CorpusError: no corpus is found, or none of its files becomes a clip.
        ShardsError: another run writes there, another corpus is there, or a part could not be
            written.
        ResourcesError: no cluster answers, or a node of it does not see the corpus or the shards.
    """
    started = time.monotonic()
    corpus = list_corpus(config.corpus)
    manifest = exclude(corpus.manifest, config.include)
    filesystem, folder = filesystem_of(config.shards)
    try:
        with Lock(config.shards, ShardsError, IN_USE) as lock:
            before = read_plan(filesystem, folder)
            if before is None:
                _require_no_parts(filesystem, folder, config.shards)
            plan = make_plan(manifest, config.features, config.rows_per_part, before)
            if before is not None:
                require_same_corpus(before, plan, config.shards)
            waiting = _uncommitted(filesystem, folder, plan)
            notes = () if before is None else _notes(before, plan, waiting)
            if progress is None:
                print(*notes, sep="\n", end="\n" if notes else "", file=sys.stderr, flush=True)
            card = read_card(filesystem, folder)
            if waiting or card is None or before is None or not plan.files.equals(before.files):
                with cluster(address) if waiting else contextlib.nullcontext():
                    if waiting:
                        clips = one_of_each_folder(_clips_of(plan, waiting))
                        require_shared(config.corpus, config.shards, *clips)
                    _clear(filesystem, folder, plan, waiting)
                    write_plan(filesystem, folder, plan)
                    _watch(_write_parts(config, plan, waiting), plan, waiting, lock, progress)
                card = make_card(filesystem, folder, corpus, plan)
                write_card(filesystem, folder, card)
    except OSError as error:
        where = error.filename or config.shards
        raise ShardsError(f"{where}: {error.strerror or error}{AGAIN}") from error
    if card.num_clips == 0:
        raise _nothing_usable(ShardSet(config.shards, card).outcomes(), config)
    return PrepareSummary(card, notes, plan.num_files(waiting), time.monotonic() - started)


def _require_no_parts(filesystem: fs.FileSystem, folder: str, shards: str) -> None:
    """Refuse a folder of files that are named like parts but were made by something else."""
    entries = filesystem.get_file_info(fs.FileSelector(folder))
    names = [entry.base_name for entry in entries if entry.is_file]
    foreign = sorted(name for name in names if re.fullmatch(_PART, name))
    if foreign:
        raise ShardsError(
            f"{shards}: holds {foreign[0]}, but no plan that says what it is; shards would take "
            "its place, so give another folder"
        )


def _nothing_usable(outcomes: pa.Table, config: PrepareConfig) -> CorpusError:
    first = outcomes.slice(0, 1).to_pylist()[0]
    return CorpusError(
        f"{config.corpus}: none of its {len(outcomes)} files became a clip; {first['path']} is "
        f"{first['status']}: {first['reason']}"
    )


def _uncommitted(filesystem: fs.FileSystem, folder: str, plan: Plan) -> list[int]:
    """The parts of a plan that are not there, or hold other files or features."""
    names = {entry.base_name for entry in filesystem.get_file_info(fs.FileSelector(folder))}

    def is_committed(part: int) -> bool:
        is_there = {part_name(part), outcomes_name(part)} <= names
        return is_there and read_key(filesystem, folder, part) == plan.key(part)

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        committed = pool.map(is_committed, plan.parts)
        return [part for part, there in zip(plan.parts, committed, strict=True) if not there]


def _clips_of(plan: Plan, parts: list[int]) -> Iterator[str]:
    """Yield the paths that will be opened for some of the parts."""
    for part in parts:
        rows = plan.rows(part)
        yield from rows["path"].filter(pc.is_null(rows["status"])).to_pylist()


def _notes(before: Plan, plan: Plan, waiting: list[int]) -> tuple[str, ...]:
    """Say what an earlier run left and what will be done about it."""
    again = f"{len(plan.parts) - len(waiting)} of {len(plan.parts)} parts are committed already"
    return (*describe_changes(before, plan), again)


def _clear(filesystem: fs.FileSystem, folder: str, plan: Plan, waiting: list[int]) -> None:
    """Delete the card, the parts that will be done again and what nobody listed any more needs."""
    committed = set(plan.parts) - set(waiting)
    kept = {name(part) for part in committed for name in (part_name, outcomes_name)}
    kept |= {mark_name(part) for part in waiting}
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{folder}/{CARD_NAME}")
    for entry in filesystem.get_file_info(fs.FileSelector(folder)):
        if (
            entry.is_file
            and entry.base_name not in kept
            and _LEFT_BEHIND.fullmatch(entry.base_name)
        ):
            filesystem.delete_file(entry.path)


def _watch(
    results: Iterator[PartResult],
    plan: Plan,
    waiting: list[int],
    lock: Lock,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Follow the parts as they are committed, and stop if another run took over."""
    if not waiting:
        return
    watch = Watch(len(plan.files), len(plan.files) - plan.num_files(waiting))
    with show(progress) as report:
        for result in results:
            lock.check()
            report(watch.add(result.counts))


def _write_parts(config: PrepareConfig, plan: Plan, waiting: list[int]) -> Iterator[PartResult]:
    """Run the job and yield each part as it is committed."""
    import ray
    import ray.data

    _set_up_ray_data()
    parts = ray.data.from_items(
        [{"part": part, "rows": rows_to_bytes(plan.rows(part))} for part in waiting],
        override_num_blocks=len(waiting),
    )
    writer = _PartWriter(absolute(config.shards), FeatureExtractor(config.features))
    try:
        for row in parts.map(writer.write).iter_rows():
            if row["failure"]:
                raise ShardsError(
                    f"{config.shards}/{part_name(row['part'])}: {row['failure']}{AGAIN}"
                )
            yield PartResult(row["part"], json.loads(row["counts"]))
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise ShardsError(f"{config.shards}: the job broke off ({last_line}){AGAIN}") from error


def _set_up_ray_data() -> None:
    """Leave the console to our own progress, and all CPUs to the parts from the start."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Else a second part starts only when the first has come back and its size is known: that is
    # seconds, as each worker process first imports Ray Data. Ours are a line each.
    context.op_resource_reservation_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's own; its log files stay as they are
            handler.setLevel(logging.ERROR)


@dataclass(frozen=True)
class _PartWriter:
    """What every worker needs beyond its part."""

    shards: str
    extractor: FeatureExtractor

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the part that is one row of the dataset."""
        filesystem, folder = filesystem_of(self.shards)
        counts: dict[str, int] = {}
        failure = ""
        try:
            if not filesystem.get_file_info(f"{folder}/{PLAN_NAME}").is_file:
                raise OSError(f"not seen by {socket.gethostname()}: {ELSEWHERE}")
            rows = rows_from_bytes(row["rows"])
            counts = write_part(filesystem, folder, row["part"], rows, self.extractor).counts
        except OSError as error:
            failure = error.strerror or str(error)
        return {"part": row["part"], "counts": json.dumps(counts), "failure": failure}
