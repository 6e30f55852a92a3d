"""Decides which committed shards are still valid, and cuts all other files into shards.

The plan is made from the committed outcomes, so nothing else is stored. A committed shard is kept
if the features and its rows of the manifest have not changed. All other files, in the order of
their paths, are cut into shards, which get the lowest free numbers. The same files therefore always
give the same shards, so another machine can continue an interrupted run.

Here, a file means a row of the manifest, which may also be a segment of a file.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.corpus.manifest import MANIFEST_SCHEMA, ORDER, replace_column
from ser_ray.corpus.tables.clips import clip_keys
from ser_ray.errors import ConfigError, ShardsError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards import layout
from ser_ray.shards.digest import file_digest
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import filesystem_of, location_inside

MIN_SHARDS = 16
"""A small corpus is cut into at least this many shards, so that several cores have work."""
KEY, FEATURES = b"ser_ray.shard_key", b"ser_ray.features"
"""Names of metadata in a shard's outcomes. The key is empty if the shard must be written again."""


@dataclass(frozen=True)
class CommittedShard:
    """The outcomes and metadata of a committed shard."""

    files: pa.Table
    """The shard's rows of the manifest without status and reason, with the files' digests."""
    key: str
    """The `shard_key` when the shard was written; empty if it must be written again."""
    features: FeatureConfig
    """The settings of the shard's features."""


@dataclass(frozen=True)
class Plan:
    """The shards that a run keeps, and the shards that it writes."""

    kept: list[int]
    """Numbers of the committed shards that are still valid, ascending."""
    pending: dict[int, pa.Table]
    """{number: rows of the manifest} of each shard to write."""
    num_files: int
    """Number of listed files."""

    @property
    def shard_numbers(self) -> list[int]:
        """Numbers of all shards of the finished shard set, ascending."""
        return sorted([*self.kept, *self.pending])

    @property
    def num_pending(self) -> int:
        """Number of files in the shards to write."""
        return sum(len(rows) for rows in self.pending.values())


def shard_key(rows: pa.Table, features: FeatureConfig) -> str:
    """Return 16 hex digits for a shard's rows of the manifest and the settings of the features."""
    text = json.dumps([features.fingerprint, rows.to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_metadata(key: str, features: FeatureConfig) -> dict[bytes, bytes]:
    """Return the metadata for a shard's outcomes."""
    return {KEY: key.encode(), FEATURES: json.dumps(asdict(features)).encode()}


def restore_times(manifest: pa.Table, committed: Mapping[int, CommittedShard]) -> pa.Table:
    """Ignore new modification times of files whose bytes are unchanged, so they stay committed.

    The returned manifest has the time of the earlier run for these files. Comparing the bytes of a
    file is faster than decoding it.
    """
    if not committed:
        return manifest
    before = pa.concat_tables(shard.files for shard in committed.values())
    before = before.take(pc.index_in(clip_keys(manifest), value_set=clip_keys(before)))
    touched = pc.and_(
        pc.equal(before["size"], manifest["size"]),
        pc.not_equal(before["modified"], manifest["modified"]),
    )
    rows = np.flatnonzero(pc.fill_null(touched, False).to_numpy())
    paths = manifest["path"].take(rows).to_pylist()
    with ThreadPoolExecutor(layout.REQUESTS_AT_ONCE) as pool:
        files = list(dict.fromkeys(paths))
        digests = dict(zip(files, pool.map(file_digest, files), strict=True))
    times = manifest["modified"].to_pylist()
    for row, path in zip(rows.tolist(), paths, strict=True):
        if digests[path] is not None and digests[path] == before[layout.DIGEST][row].as_py():
            times[row] = before["modified"][row].as_py()
    return replace_column(manifest, "modified", pa.array(times, pa.int64()))


def read_committed(shards: str) -> dict[int, CommittedShard]:
    """Read the committed shards of a shard set: {number: shard}."""

    def read_shard(number: int) -> CommittedShard | None:
        filesystem, path = filesystem_of(location_inside(shards, layout.clips_name(number)))
        try:
            files = layout.read_table(shards, layout.outcomes_name(number))
            pq.read_schema(path, filesystem=filesystem)
            metadata = files.schema.metadata or {}
            features = FeatureConfig(**read_object(metadata[FEATURES]))
            files = files.replace_schema_metadata(None)
            if set(files.schema) != {*MANIFEST_SCHEMA, pa.field(layout.DIGEST, pa.string())}:
                return None
            files = files.drop_columns(["status", "reason"])
            return CommittedShard(files, metadata[KEY].decode(), features)
        except (FileNotFoundError, pa.ArrowException, ValueError, KeyError, TypeError, ConfigError):
            return None  # incomplete, damaged or of another version
        except OSError:
            if not isinstance(filesystem, fs.LocalFileSystem):
                raise  # the error may be temporary
            return None  # not a Parquet file

    names = "\n".join(layout.names_in(shards, layout.OUTCOMES) or ())
    numbers = sorted(map(int, re.findall(r"/shard-(\d+)\.parquet$", names, re.MULTILINE)))
    with ThreadPoolExecutor(layout.REQUESTS_AT_ONCE) as pool:
        found = zip(numbers, pool.map(read_shard, numbers), strict=True)
        return {number: committed for number, committed in found if committed is not None}


def make_plan(
    manifest: pa.Table,
    features: FeatureConfig,
    max_rows: int,
    committed: Mapping[int, CommittedShard],
) -> Plan:
    """Decide which committed shards are kept, and cut all other files into shards.

    All segments of a file are in one shard, unless there are too many, so the file is decoded once.

    Args:
        manifest: one row per listed file.
        features: the settings of the features.
        max_rows: largest number of files in a shard.
        committed: the result of `read_committed`.
    """
    manifest = manifest.sort_by(ORDER)
    numbers = np.full(len(manifest), -1)
    if committed:
        keys = pa.chunked_array([clip_keys(p.files).combine_chunks() for p in committed.values()])
        numbers = np.repeat(list(committed), [len(shard.files) for shard in committed.values()])
        index = pc.index_in(clip_keys(manifest), value_set=keys)
        numbers = pc.fill_null(pa.array(numbers).take(index), -1).to_numpy().copy()
    order = np.argsort(numbers, kind="stable")
    found, firsts, counts = np.unique(numbers[order], return_index=True, return_counts=True)
    kept = []
    for number, first, count in zip(found.tolist(), firsts, counts, strict=True):
        if number < 0 or count != len(committed[number].files):
            continue
        rows = manifest.take(order[first : first + count])
        if shard_key(rows, features) == committed[number].key:
            kept.append(number)
    is_kept = np.isin(numbers, kept)
    begins_shard = np.zeros(len(manifest), bool)
    begins_shard[order[firsts[np.isin(found, kept)]]] = True
    rest = manifest.filter(pa.array(~is_kept))
    size = max(1, min(max_rows, -(-len(manifest) // MIN_SHARDS)))
    free = itertools.filterfalse(set(kept).__contains__, itertools.count())
    pending = {
        next(free): rest.slice(first, stop - first)
        for first, stop in _cut(_rows_needed(manifest, is_kept, begins_shard), size, max_rows)
    }
    return Plan(kept, pending, len(manifest))


def _rows_needed(manifest: pa.Table, is_kept: np.ndarray, begins_shard: np.ndarray) -> np.ndarray:
    """Return how many rows of a shard each pending row needs, [num_pending].

    The first segment of a file needs a row for each segment of the file, and the other segments
    need none. A complete file needs one row. The first file of a kept shard counts with the next
    pending row, so that an interrupted run cuts shards at the same rows as an uninterrupted run.
    """
    paths = manifest["path"].combine_chunks()
    begins_file = np.ones(len(paths), bool)
    begins_file[1:] = pc.not_equal(paths[1:], paths[:-1]).to_numpy(zero_copy_only=False)
    firsts = np.flatnonzero(begins_file)
    needed = np.zeros(len(paths), np.int64)
    needed[firsts] = np.diff(firsts, append=len(paths))
    is_pending = ~is_kept
    place = np.cumsum(is_pending) - is_pending  # index of the row or of the next pending row
    counted = (is_pending | begins_shard) & (place < is_pending.sum())
    result = np.zeros(is_pending.sum(), np.int64)
    np.maximum.at(result, place[counted], needed[counted])
    return result


def _cut(needed: np.ndarray, size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end row of each shard.

    A shard has at most `size` rows, or up to `limit` rows if all of them are segments of one file.
    """
    first = 0
    for row, num_rows in enumerate(needed.tolist()):
        filled = row - first
        if filled and (filled + num_rows > size if num_rows else filled >= limit):
            yield first, row
            first = row
    if len(needed):
        yield first, len(needed)


def update_times(
    shards: str,
    listed: pa.Table,
    restored: pa.Table,
    features: FeatureConfig,
    kept: Mapping[int, CommittedShard],
) -> None:
    """Write the new times of unchanged files into the outcomes of the kept shards.

    The next run then does not compare their bytes again.

    Args:
        shards: folder or URI of the shard set.
        listed: the manifest with the new times.
        restored: the result of `restore_times`.
        features: the settings of the features.
        kept: {number: shard} of the shards that are still valid.
    """
    touched = pc.fill_null(pc.not_equal(listed["modified"], restored["modified"]), False)
    paths, all_keys = listed["path"].filter(touched), clip_keys(listed)
    for number, committed in kept.items():
        if not pc.any(pc.is_in(committed.files["path"], value_set=paths)).as_py():
            continue
        rows = listed.take(pc.index_in(clip_keys(committed.files), value_set=all_keys))
        outcomes = layout.read_table(shards, layout.outcomes_name(number))
        outcomes = replace_column(outcomes, "modified", rows["modified"])
        metadata = shard_metadata(shard_key(rows, features), features)
        layout.write_table(
            shards, layout.outcomes_name(number), outcomes.replace_schema_metadata(metadata)
        )


def require_same_corpus(
    committed: Mapping[int, CommittedShard], manifest: pa.Table, shards: str
) -> None:
    """Refuse to replace the shards of another corpus.

    Raises:
        ShardsError: no file of the committed shards is listed.
    """
    if not committed:
        return
    paths = pa.concat_tables(shard.files.select(["path"]) for shard in committed.values())["path"]
    if not pc.any(pc.is_in(paths, value_set=manifest["path"])).as_py():
        raise ShardsError(
            f"{shards}: holds the shards of another corpus, {len(paths)} files like {paths[0]}, "
            "and none of them is in this corpus: choose another folder with --shards, or delete "
            "this folder"
        )


def describe_changes(
    committed: Mapping[int, CommittedShard], features: FeatureConfig, plan: Plan
) -> tuple[str, ...]:
    """Return lines about the files that an earlier run prepared, and about changes since then."""
    if not committed:
        return ()
    first = next(iter(committed.values()))
    old, new = asdict(first.features), asdict(features)
    lines = [
        f"{name} was {old[name]} and is {new[name]}: all features are computed again"
        for name in new
        if old[name] != new[name]
    ]
    kept = set(plan.kept)
    before = _by_key(shard.files for number, shard in committed.items() if number not in kept)
    after = _by_key(plan.pending.values())
    changed = [key for key in before.keys() & after.keys() if before[key] != after[key]]
    added, gone = after.keys() - before.keys(), before.keys() - after.keys()
    for count, one, several in (
        (len(added), "file has no outcome yet", "files have no outcome yet"),
        (len(gone), "file is no longer listed", "files are no longer listed"),
        (len(changed), "file has changed", "files have changed"),
    ):
        if count:
            lines.append(f"{count} {one if count == 1 else several}")
    num_kept = plan.num_files - plan.num_pending
    return (*lines, f"{num_kept} of {plan.num_files} files are prepared already")


def _by_key(tables: Iterable[pa.Table]) -> dict[str, tuple[Any, ...]]:
    """Return the rows of tables by their `clip_keys`, without digests and outcomes."""
    names = [name for name in MANIFEST_SCHEMA.names if name not in ("status", "reason")]
    rows: dict[str, tuple[Any, ...]] = {}
    for table in tables:
        columns = (table[name].to_pylist() for name in names)
        rows |= zip(clip_keys(table).to_pylist(), zip(*columns, strict=True), strict=True)
    return rows
