"""Reads recordings that are stored in rows of Parquet files, as in Hugging Face data sets.

Their locations have the form `PARQUET_FILE#audio=ROW`, with rows counted from 0.
"""

from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.errors import first_line
from ser_ray.storage.paths import filesystem_of

ROW = "#audio="
COLUMN = "audio"


def packed_location(parquet: str, row: int) -> str:
    """Return the location of a row's recording; sorting the locations sorts the rows."""
    return f"{parquet}{ROW}{row:09d}"


def read_packed(location: str) -> bytes:
    """Return the bytes of a recording.

    Raises:
        OSError: the Parquet file cannot be read, or has no such row.
    """
    parquet, _, number = location.rpartition(ROW)
    try:
        filesystem, path = filesystem_of(parquet)
        info = filesystem.get_file_info(path)
        version = info.size, info.mtime_ns  # so that a replaced file is read again
        footer, firsts = _read_footer(parquet, version)
        if not 0 <= (row := int(number)) < footer.num_rows:
            raise OSError(f"{location}: the file has rows 0 to {footer.num_rows - 1}")
        group = bisect_right(firsts, row) - 1
        found = _read_group(parquet, version, group)[row - firsts[group]].as_py()
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise OSError(f"{location}: {first_line(error)}") from error
    if found is None:
        raise OSError(f"{location}: the row has no recording")
    return bytes(found)


@lru_cache(maxsize=16)
def _read_footer(parquet: str, _: tuple[int, int]) -> tuple[pq.FileMetaData, list[int]]:
    """Return a Parquet file's footer, and the first row of each row group, then the row count."""
    filesystem, path = filesystem_of(parquet)
    footer = pq.read_metadata(path, filesystem=filesystem)
    counts = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    return footer, [0, *accumulate(counts)]


@lru_cache(maxsize=1)
def _read_group(parquet: str, version: tuple[int, int], group: int) -> pa.Array:
    """Read all recordings of a row group; the cache keeps them while its rows are decoded."""
    filesystem, path = filesystem_of(parquet)
    footer, _ = _read_footer(parquet, version)
    with pq.ParquetFile(path, metadata=footer, filesystem=filesystem) as file:
        table = file.read_row_group(group, columns=[f"{COLUMN}.bytes"])
    return table[COLUMN].combine_chunks().field("bytes")
