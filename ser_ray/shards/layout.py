"""The files of a shard set: their names, how they are written, and how old files are deleted.

    SHARDS/card.json                       describes the set; missing until the set is complete
    SHARDS/clips/part-00012.parquet        the decoded clips of a part with their features
    SHARDS/outcomes/part-00012.parquet     one row for every listed file of the part
    SHARDS/encoders/NAME/part-00012.parquet    an encoder's column, one row for each row of clips
    SHARDS/encoders/NAME/encoder.safetensors   the weights and card of the encoder

Features are stored as fixed-size binary: the bytes of a float16 array `[bins, num_frames]`, padded
with zeros on the right. Arrow's fixed-shape tensors are slower, because Parquet stores them as
nested lists with a definition level for every number: on 128 clips, writing takes 5 times and
reading 7 times as long. An encoder's values are the bytes of a float16 array `[layers, dim]`.
"""

import contextlib
import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import ShardsError
from ser_ray.features.config import KINDS
from ser_ray.storage.atomic import atomic_write

CARD_NAME = "card.json"
CLIPS, OUTCOMES, ENCODERS = "clips", "outcomes", "encoders"
OK = "ok"
"""The status of a clip that has features."""
DIGEST = "digest"
"""The column of the outcomes with the digest of a file's bytes."""
REQUESTS_AT_ONCE = 16
"""Parts that are read in parallel: a bucket answers many small requests in the time of one."""
COMPRESSION = "lz4"
"""Saves nine tenths of the bytes that zstd saves, and can be read twice as fast."""
_OWN = re.compile(r"part-\d+\.parquet(\.[0-9a-f]{8}\.tmp)?")
"""Names of the files in the folders of clips and outcomes."""


def feature_column(values: np.ndarray) -> pa.FixedSizeBinaryArray:
    """Turn features [clips, ...] float16 into a column with the bytes of each clip's array."""
    width = math.prod(values.shape[1:]) * values.itemsize
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), buffers)


def part_name(part: int) -> str:
    """Return the path of a part's clips inside the shard set."""
    return f"{CLIPS}/part-{part:05d}.parquet"


def feature_name(kind: str, part: int) -> str:
    """Return the path of a part's file with this kind of feature."""
    return part_name(part) if kind in KINDS else f"{ENCODERS}/{kind}/part-{part:05d}.parquet"


def weights_name(kind: str) -> str:
    """Return the path of an encoder's weights inside the shard set."""
    return f"{ENCODERS}/{kind}/encoder.safetensors"


def outcomes_name(part: int) -> str:
    """Return the path of a part's outcomes inside the shard set. This file commits the part."""
    return f"{OUTCOMES}/part-{part:05d}.parquet"


def write_table(filesystem: fs.FileSystem, path: str, table: pa.Table) -> None:
    """Write a Parquet file atomically, without statistics and without dictionaries of features."""
    with atomic_write(filesystem, path) as target:
        pq.write_table(
            table,
            target,
            filesystem=filesystem,
            compression=COMPRESSION,
            use_dictionary=[
                item.name for item in table.schema if not pa.types.is_fixed_size_binary(item.type)
            ],
            write_statistics=False,
        )


def require_own(filesystem: fs.FileSystem, folder: str, shards: str) -> None:
    """Raise `ShardsError` if the folder of the clips has files that are not part of a shard set."""
    names = sorted(path.rpartition("/")[2] for path in _files(filesystem, f"{folder}/{CLIPS}"))
    has_outcomes = filesystem.get_file_info(f"{folder}/{OUTCOMES}").type != fs.FileType.NotFound
    foreign = [name for name in names if not (has_outcomes and _OWN.fullmatch(name))]
    if foreign:
        raise ShardsError(
            f"{shards}: holds {CLIPS}/{foreign[0]}, which is not part of a shard set; choose "
            "another folder"
        )


def _files(filesystem: fs.FileSystem, folder: str) -> list[str]:
    """Return the paths of the files in a folder, which may not exist."""
    entries = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
    return [entry.path for entry in entries if entry.is_file]


def keep_only(filesystem: fs.FileSystem, folder: str, parts: list[int]) -> None:
    """Delete the card, and the outcomes and clips of all parts that are not in `parts`.

    Outcomes are deleted before clips, so an interruption never leaves a part that looks complete.
    """
    with contextlib.suppress(FileNotFoundError):
        filesystem.delete_file(f"{folder}/{CARD_NAME}")
    kept = {f"{folder}/{name(part)}" for part in parts for name in (outcomes_name, part_name)}
    for name in (OUTCOMES, CLIPS):
        for path in _files(filesystem, f"{folder}/{name}"):
            if path not in kept:
                filesystem.delete_file(path)
