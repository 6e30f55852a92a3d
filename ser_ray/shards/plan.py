"""Decides which committed shards are still valid, and divides all other files into new shards.

The plan depends on the manifest, the settings and the outcomes of the committed shards. A committed
shard is kept if the feature settings and its rows of the manifest have not changed, and none of its
files has to be tried again. All other files are sorted by path and divided into shards, which get
the lowest free numbers. A run that continues an interrupted run, also on another machine, therefore
writes the shards that were missing.

Segments of files are rows of the manifest too, and count as files in numbers of files.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.manifest import MANIFEST_SCHEMA, ORDER, replace_column
from ser_ray.corpus.tables.clips import clip_keys
from ser_ray.errors import ConfigError, ShardsError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards import layout
from ser_ray.shards.digest import file_digest
from ser_ray.storage.json_text import read_object

SHARDS_OF_SMALL_CORPUS = 16
"""A corpus that would fit into fewer shards is divided into about this many, so that several cores
have work."""
KEY, FEATURES = b"ser_ray.shard_key", b"ser_ray.features"
"""Keys of the metadata in a shard's outcomes: its `shard_key` and its feature settings."""


@dataclass(frozen=True)
class CommittedShard:
    """The files, key and feature settings that are stored in a committed shard's outcomes."""

    files: pa.Table
    """The shard's rows of the manifest without status and reason, but with each file's digest."""
    key: str
    """The stored `shard_key` of the rows; empty if the shard must be written again."""
    features: FeatureConfig


@dataclass(frozen=True)
class Plan:
    """The shards that a run of `prepare` keeps, and those that it writes."""

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
    """Hash a shard's rows of the manifest and the feature settings to 16 hex digits."""
    text = json.dumps([features.fingerprint, rows.to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shard_metadata(key: str, features: FeatureConfig) -> dict[bytes, bytes]:
    """Return the metadata to store with a shard's outcomes."""
    return {KEY: key.encode(), FEATURES: json.dumps(asdict(features)).encode()}


def restore_times(manifest: pa.Table, committed: Mapping[int, CommittedShard]) -> pa.Table:
    """Return the manifest with the old modification times of local files with the same bytes.

    A local file with a new time but the same size is hashed and compared with the digest of the
    earlier run, which is faster than decoding it again. With the old time, the file stays in its
    committed shard.
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
    """Read the committed shards of a shard set: {number: shard}.

    Shards that are incomplete or of another version are left out, and so are damaged shards. Of the
    clips, only the schema is read, so damage to their data is not noticed here.
    """

    def read_shard(number: int) -> CommittedShard | None:
        try:
            files = layout.read_table(shards, layout.outcomes_name(number))
            layout.read_schema(shards, layout.clips_name(number))
            metadata = files.schema.metadata or {}
            features = FeatureConfig(**read_object(metadata[FEATURES]))
            files = files.replace_schema_metadata(None)
            if set(files.schema) != {*MANIFEST_SCHEMA, pa.field(layout.DIGEST, pa.string())}:
                return None
            files = files.drop_columns(["status", "reason"])
            return CommittedShard(files, metadata[KEY].decode(), features)
        except (ValueError, KeyError, TypeError, ConfigError):  # other columns or metadata
            return None
        except OSError as error:
            is_permanent = isinstance(error, FileNotFoundError | layout.DamagedFileError)
            if "://" in shards and not is_permanent:
                raise
            return None

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
    """Decide which committed shards are kept, and divide all other files into shards.

    All segments of a file are in one shard, so that the file is decoded once. Only a file with more
    than `max_rows` segments is in several shards.

    Args:
        manifest: one row per listed file.
        features: the feature settings.
        max_rows: largest number of rows in a shard.
        committed: the result of `read_committed`.
    """
    manifest = manifest.sort_by(ORDER)
    owners = _committed_numbers(manifest, committed)
    order = np.argsort(owners, kind="stable")
    found, firsts, counts = np.unique(owners[order], return_index=True, return_counts=True)
    kept, begins_shard = [], np.zeros(len(manifest), bool)
    for number, first, count in zip(found.tolist(), firsts, counts, strict=True):
        if number < 0 or count != len(committed[number].files):
            continue
        rows = order[first : first + count]
        if shard_key(manifest.take(rows), features) == committed[number].key:
            kept.append(number)
            begins_shard[rows[0]] = True
    is_kept = np.isin(owners, kept)
    needed = _rows_needed(manifest, is_kept, begins_shard)
    size = min(max_rows, math.ceil(len(manifest) / SHARDS_OF_SMALL_CORPUS))
    rest = manifest.filter(pa.array(~is_kept))
    used = set(kept)
    free = (number for number in itertools.count() if number not in used)
    pending = {
        next(free): rest.slice(first, end - first) for first, end in _divide(needed, size, max_rows)
    }
    return Plan(kept, pending, len(manifest))


def _committed_numbers(manifest: pa.Table, committed: Mapping[int, CommittedShard]) -> np.ndarray:
    """Return the number of the committed shard that has each row, or -1 [num_rows]."""
    if not committed:
        return np.full(len(manifest), -1)
    shards = committed.values()
    keys = pa.chunked_array([clip_keys(shard.files).combine_chunks() for shard in shards])
    numbers = pa.array(np.repeat(list(committed), [len(shard.files) for shard in shards]))
    index = pc.index_in(clip_keys(manifest), value_set=keys)
    return pc.fill_null(numbers.take(index), -1).to_numpy()


def _rows_needed(manifest: pa.Table, is_kept: np.ndarray, begins_shard: np.ndarray) -> np.ndarray:
    """Return the number of free rows that a shard needs for each pending row [num_pending].

    The first segment of a file needs as many rows as the file has segments, so that they stay
    together; the other segments need none. A complete file needs one row. If a kept shard begins
    with a file, the next pending row needs at least as many rows as that file. The run after
    an interruption therefore divides the files at the same rows as an uninterrupted run.
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


def _divide(needed: np.ndarray, size: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield the first row of each shard, and the row after its last one.

    A shard has at most `size` rows, or up to `limit` rows if all of them are segments of one file.

    Args:
        needed: the result of `_rows_needed` [num_pending].
        size: largest number of rows in a shard with several files.
        limit: largest number of rows in a shard with one file.
    """
    first = 0
    for row, num_rows in enumerate(needed.tolist()):
        filled = row - first
        is_full = filled + num_rows > size if num_rows else filled >= limit
        if filled and is_full:
            yield first, row
            first = row
    if len(needed):
        yield first, len(needed)


def update_times(
    shards: str, listed: pa.Table, restored: pa.Table, kept: Mapping[int, CommittedShard]
) -> None:
    """Write the new modification times of unchanged files into the outcomes of the kept shards.

    The next run then does not hash these files again.

    Args:
        shards: folder or URI of the shard set.
        listed: the manifest with the new times.
        restored: the result of `restore_times`.
        kept: the committed shards that are still valid: {number: shard}.
    """
    touched = pc.fill_null(pc.not_equal(listed["modified"], restored["modified"]), False)
    paths, all_keys = listed["path"].filter(touched), clip_keys(listed)
    for number, committed in kept.items():
        if not pc.any(pc.is_in(committed.files["path"], value_set=paths)).as_py():
            continue
        rows = listed.take(pc.index_in(clip_keys(committed.files), value_set=all_keys))
        name = layout.outcomes_name(number)
        outcomes = replace_column(layout.read_table(shards, name), "modified", rows["modified"])
        features = committed.features
        metadata = shard_metadata(shard_key(rows, features), features)
        layout.write_table(shards, name, outcomes.replace_schema_metadata(metadata))


def require_same_corpus(
    committed: Mapping[int, CommittedShard], manifest: pa.Table, shards: str
) -> None:
    """Refuse to replace the shards of another corpus, or of a corpus that was moved.

    Raises:
        ShardsError: no file of the committed shards is listed.
    """
    if not committed:
        return
    paths = pa.concat_tables(shard.files.select(["path"]) for shard in committed.values())["path"]
    if not pc.any(pc.is_in(paths, value_set=manifest["path"])).as_py():
        raise ShardsError(
            f"{shards}: holds the shards of {len(paths)} files such as {paths[0]}, and none of "
            "them is in this corpus: they are of another corpus, or this one was moved. Choose "
            "another folder with --shards, or delete this folder"
        )


def describe_changes(
    committed: Mapping[int, CommittedShard], features: FeatureConfig, plan: Plan
) -> tuple[str, ...]:
    """Return lines that say what has changed since an earlier run, and what is prepared already."""
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
    """Return {clip key: values} of all rows, without digests and outcomes."""
    names = [name for name in MANIFEST_SCHEMA.names if name not in ("status", "reason")]
    rows: dict[str, tuple[Any, ...]] = {}
    for table in tables:
        columns = (table[name].to_pylist() for name in names)
        rows |= zip(clip_keys(table).to_pylist(), zip(*columns, strict=True), strict=True)
    return rows
