"""Recordings that are packed into the rows of Parquet files, as Hugging Face data sets have them.

The location of such a recording is the Parquet file's with `#audio=` and the number of the row.
"""

from functools import lru_cache

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.storage.paths import filesystem_of

ROW = "#audio="
"""Stands between the location of the Parquet file and the number of a row, counted from 0."""
COLUMN = "audio"


def packed_location(parquet: str, row: int) -> str:
    """Return the location of a row's recording; locations sort as the rows do."""
    return f"{parquet}{ROW}{row:09d}"


def read_packed(location: str) -> bytes:
    """Return the bytes of a recording.

    Raises:
        OSError: the Parquet file cannot be read, or has no such row.
    """
    parquet, _, number = location.rpartition(ROW)
    try:
        with _open(parquet) as file:
            row, group = int(number), 0
            while row >= (num_rows := file.metadata.row_group(group).num_rows):
                row, group = row - num_rows, group + 1
        found = _read_group(parquet, group)[row].as_py()
    except (pa.ArrowInvalid, pa.ArrowKeyError, IndexError, ValueError) as error:
        raise OSError(f"{location}: {str(error).partition(chr(10))[0]}") from error
    if found is None:
        raise OSError(f"{location}: the row has no recording")
    return bytes(found)


def _open(parquet: str) -> pq.ParquetFile:
    filesystem, path = filesystem_of(parquet)
    return pq.ParquetFile(path, filesystem=filesystem)


@lru_cache(maxsize=1)
def _read_group(parquet: str, group: int) -> pa.ChunkedArray:
    """Read the recordings of a row group once for all of its rows, which are decoded in turn."""
    with _open(parquet) as file:
        table = file.read_row_group(group, columns=[f"{COLUMN}.bytes"])
    return table[COLUMN].combine_chunks().field("bytes")
