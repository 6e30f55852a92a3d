"""Reads recordings that are stored in rows of Parquet files, as in Hugging Face datasets.

The location of such a recording is `PARQUET_FILE#audio=ROW`, with rows counted from 0.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.errors import first_line
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import filesystem_of

ROW = "#audio="
"""Separates the Parquet file from the row in a location."""


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return the metadata that Hugging Face's library stored for each column: {column: entry}.

    Entries that are not mappings are left out. Those of list columns may be lists.

    Raises:
        ValueError: the metadata is damaged.
    """
    text = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = read_object(text).get("info", {}).get("features", {})
        return {name: entry for name, entry in features.items() if isinstance(entry, dict)}
    except AttributeError as error:
        raise ValueError("the metadata of Hugging Face is damaged") from error


def audio_column(schema: pa.Schema) -> str | None:
    """Return the name of the column with recordings, or None if there is none.

    Its values are structs with the `bytes` of a file. If there are several such columns, `audio` is
    preferred.
    """
    features = features_of(schema)
    for name in sorted(schema.names, key=lambda name: name != "audio"):
        kind = schema.field(name).type
        feature = features.get(name, {}).get("_type", "Audio")
        if pa.types.is_struct(kind) and feature == "Audio" and kind.get_field_index("bytes") >= 0:
            return str(name)
    return None


def packed_location(parquet: str, row: int) -> str:
    """Return the location of a row's recording. Leading zeros make locations sort by row."""
    return f"{parquet}{ROW}{row:09d}"


def read_packed(location: str) -> bytes:
    """Return the bytes of a recording.

    Raises:
        OSError: the Parquet file cannot be read, or has no such row, or the row has no recording.
        ConfigError: as `filesystem_of`.
    """
    parquet, _, number = location.rpartition(ROW)
    try:
        filesystem, path = filesystem_of(parquet)
        info = filesystem.get_file_info(path)
        # The version is part of the cache keys, so a replaced file is read again.
        version = (info.size, info.mtime_ns)
        _, firsts = _read_footer(parquet, version)
        if not 0 <= (row := int(number)) < firsts[-1]:
            raise OSError(f"{location}: the file has rows 0 to {firsts[-1] - 1}")
        group = bisect_right(firsts, row) - 1
        recording = _read_group(parquet, version, group)[row - firsts[group]].as_py()
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise OSError(f"{location}: {first_line(error)}") from error
    if recording is None:
        raise OSError(f"{location}: the row has no recording")
    return bytes(recording)


@lru_cache(maxsize=16)
def _read_footer(parquet: str, version: tuple[int, int]) -> tuple[pq.FileMetaData, list[int]]:
    """Return a Parquet file's footer, and the number of the first row of each row group.

    The last item of the list is the number of rows in the file.
    """
    filesystem, path = filesystem_of(parquet)
    footer = pq.read_metadata(path, filesystem=filesystem)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return footer, [0, *accumulate(counts)]


@lru_cache(maxsize=1)
def _read_group(parquet: str, version: tuple[int, int], group: int) -> pa.ChunkedArray:
    """Read all recordings of a row group. The cache holds them until another group is read."""
    filesystem, path = filesystem_of(parquet)
    footer, _ = _read_footer(parquet, version)
    with pq.ParquetFile(path, metadata=footer, filesystem=filesystem) as file:
        audio = audio_column(file.schema_arrow)
        if audio is None:
            raise ValueError("the file has no column of recordings")
        # One row at a time: an array of bytes has at most 2 GiB, and a row group may have more.
        batches = file.iter_batches(1, row_groups=[group], columns=[f"{audio}.bytes"])
        return pa.chunked_array([batch[audio].field("bytes") for batch in batches], pa.binary())
