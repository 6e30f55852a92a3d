"""The files of a shard set: their names, and how they are read, written and deleted.

    SHARDS/card.json                           describes the set; missing until the set is complete
    SHARDS/clips/shard-00012.parquet           the decoded clips of shard 12 with their features
    SHARDS/outcomes/shard-00012.parquet        one row for every listed file or segment of shard 12
    SHARDS/encoders/NAME/shard-00012.parquet   an encoder's features of these clips
    SHARDS/encoders/NAME/encoder.safetensors   the weights and card of the encoder
    SHARDS/missing.csv                         the files that a table names but that do not exist;
                                               written by `prepare`, absent if there are none

A feature is stored as the bytes of a float16 array `[bins, frames]`. All arrays of a shard set have
the same number of frames, so shorter clips are padded with zeros on the right. For an encoder, the
array is `[layers, dim]`. The type of the column is Arrow's fixed-size binary. Arrow's fixed-shape
tensors take 5 times as long to write and 7 times as long to read (for 128 clips), because Parquet
stores them as nested lists with a definition level for every number.
"""

import contextlib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import ShardsError, first_line
from ser_ray.features.config import KINDS
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.paths import filesystem_of, is_storage_failure, location_inside

CARD_NAME = "card.json"
CLIPS, OUTCOMES, ENCODERS = "clips", "outcomes", "encoders"
OK = "ok"
"""The status of a listed file whose clip is in the shards."""
DIGEST = "digest"
"""The column of the outcomes that has the digest of each file's bytes."""
REQUESTS_AT_ONCE = 16
"""Number of small files that are read in parallel. A bucket answers this many requests in about the
time of one."""
COMPRESSION = "lz4"
"""Files are read twice as fast with lz4 as with zstd. They are slightly larger, because lz4 saves
nine tenths of the bytes that zstd saves."""
_CLIPS_FILE = re.compile(rf"{CLIPS}/shard-\d+\.parquet(\.[0-9a-f]{{8}}\.tmp)?")
"""Paths of files with clips, and of temporary files that `write_table` renames to such paths."""


def feature_column(values: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Turn features [num_rows, ...] float16 into a column with the bytes of each row's array."""
    width = math.prod(values.shape[1:]) * values.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), buffers)


def clips_name(number: int) -> str:
    """Return the path of a shard's clips inside the shard set."""
    return f"{CLIPS}/shard-{number:05d}.parquet"


def feature_name(kind: str, number: int) -> str:
    """Return the path, inside the shard set, of the file with one kind of feature of a shard."""
    return clips_name(number) if kind in KINDS else f"{ENCODERS}/{kind}/shard-{number:05d}.parquet"


def weights_name(kind: str) -> str:
    """Return the path of an encoder's weights inside the shard set."""
    return f"{ENCODERS}/{kind}/encoder.safetensors"


def outcomes_name(number: int) -> str:
    """Return the path of a shard's outcomes inside the shard set. This file commits the shard."""
    return f"{OUTCOMES}/shard-{number:05d}.parquet"


class DamagedFileError(OSError):
    """Raised if a file of a shard set is damaged. The message names the file."""


def read_table(shards: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read columns of a Parquet file of the shard set; `name` is its path inside the set.

    Raises:
        DamagedFileError: the file is damaged.
        OSError: the file does not exist, or the storage failed.
    """
    return _read(partial(pq.read_table, columns=columns), shards, name)


def read_schema(shards: str, name: str) -> pa.Schema:
    """Read the schema of a Parquet file of the shard set. Arguments and errors as `read_table`."""
    return _read(pq.read_schema, shards, name)


def _read(read: Callable[..., Any], shards: str, name: str) -> Any:
    """Call a function of pyarrow, and convert its errors for a damaged file to DamagedFileError."""
    filesystem, path = filesystem_of(location_inside(shards, name))
    try:
        return read(path, filesystem=filesystem)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and is_storage_failure(error, shards):
            raise
        raise DamagedFileError(f"{name} is damaged ({first_line(error)}), so delete it") from error


def write_table(shards: str, name: str, table: pa.Table) -> None:
    """Write a Parquet file atomically, without statistics, and without dictionaries for features.

    `name` is the path of the file inside the shard set.
    """
    words = [item.name for item in table.schema if not pa.types.is_fixed_size_binary(item.type)]
    with atomic_write(*filesystem_of(location_inside(shards, name))) as stream:
        pq.write_table(
            table,
            stream,
            compression=COMPRESSION,
            use_dictionary=words,
            write_statistics=False,
        )


def names_in(shards: str, folder: str) -> list[str] | None:
    """Return the paths of the files in a folder of the shard set; None if there is no folder."""
    filesystem, path = filesystem_of(location_inside(shards, folder))
    if filesystem.get_file_info(path).type == fs.FileType.NotFound:
        return None
    entries = filesystem.get_file_info(fs.FileSelector(path))
    return sorted(f"{folder}/{entry.base_name}" for entry in entries if entry.is_file)


def delete(shards: str, name: str) -> None:
    """Delete a file of the shard set, if it exists."""
    filesystem, path = filesystem_of(location_inside(shards, name))
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(path)


def require_no_other_files(shards: str) -> None:
    """Check that the folder `clips` has only files of a shard set.

    Raises:
        ShardsError: the folder has another file, or has files although there are no outcomes.
    """
    has_outcomes = names_in(shards, OUTCOMES) is not None
    for name in names_in(shards, CLIPS) or ():
        if not (has_outcomes and _CLIPS_FILE.fullmatch(name)):
            raise ShardsError(
                f"{shards} holds {name}, which is not part of a shard set; choose another folder"
            )


def keep_only(shards: str, numbers: list[int]) -> None:
    """Delete the card, and the outcomes and clips of all shards except those with these numbers.

    Outcomes are deleted before clips, so an interruption never leaves a shard that looks complete.
    """
    kept = {name(number) for number in numbers for name in (outcomes_name, clips_name)}
    found = [name for folder in (OUTCOMES, CLIPS) for name in names_in(shards, folder) or ()]
    for name in (CARD_NAME, *(name for name in found if name not in kept)):
        delete(shards, name)
