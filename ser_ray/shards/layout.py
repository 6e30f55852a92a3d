"""What lies in a folder of shards: the names of its files, how they are written, their parts' keys.

Features are stored as fixed-size binary, the bytes of a float16 `[bins, num_frames]` array padded
with zeros on the right. Parquet would store Arrow's fixed-shape tensors as nested lists, with a
level for every number: measured on 128 clips, writing takes 5 times and reading 7 times as long.
"""

import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.storage.atomic import atomic_write

CARD_NAME, PLAN_NAME = "card.json", "plan.parquet"
OK = "ok"
"""The status of a clip whose features are written."""
KEY = b"ser_ray.part_key"
REQUESTS_AT_ONCE = 16
"""Parts asked for at once: a bucket answers many small requests in the time of one."""
COMPRESSION = "lz4"
"""Saves nine tenths of what zstd saves, and is read twice as fast."""


def part_name(part: int) -> str:
    """The file name of a part's clips."""
    return f"part-{part:05d}.parquet"


def outcomes_name(part: int) -> str:
    """The file name of a part's outcomes, whose presence commits the part."""
    return f"part-{part:05d}.outcomes.parquet"


def mark_name(part: int) -> str:
    """The file name of the mark that a part is being decoded."""
    return f"part-{part:05d}.trying"


def part_key(rows: pa.Table, features: FeatureConfig) -> str:
    """Sixteen hex digits that differ when the files listed in a part or the features do."""
    text = json.dumps([features.fingerprint, rows.to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_key(filesystem: fs.FileSystem, folder: str, part: int) -> str | None:
    """Return the key of a committed part, None if there is no such part or it is damaged.

    Nor is there one where a file could not be read: another try may add its clip.
    """
    try:
        schema = pq.read_schema(f"{folder}/{outcomes_name(part)}", filesystem=filesystem)
        pq.read_schema(f"{folder}/{part_name(part)}", filesystem=filesystem)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    except OSError:
        if isinstance(filesystem, fs.LocalFileSystem):
            return None  # a footer of other bytes; a bucket may just not answer
        raise
    return (schema.metadata or {}).get(KEY, b"").decode() or None


def write_table(filesystem: fs.FileSystem, path: str, table: pa.Table) -> None:
    """Write a Parquet file that is either there as a whole or not at all."""
    with atomic_write(filesystem, path) as target:
        pq.write_table(
            table,
            target,
            filesystem=filesystem,
            compression=COMPRESSION,
            use_dictionary=[n for n in table.column_names if n not in KINDS],
            write_statistics=False,
        )


def to_binary(features: np.ndarray) -> pa.Array:
    """Wrap `[clips, bins, frames]` as one fixed-size binary value a clip, without copying."""
    num_clips, bins, frames = features.shape
    width = bins * frames * features.itemsize
    buffers = [None, pa.py_buffer(features)]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), num_clips, buffers)


def to_array(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    """View fixed-size binary values as float16 arrays of one shape, `[len(column), *shape]`."""
    array = column.combine_chunks()
    numbers = np.frombuffer(array.buffers()[1], np.float16)
    return numbers.reshape(-1, *shape)[array.offset : array.offset + len(array)]
