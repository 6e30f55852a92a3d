"""Reads one file as a table: separated text, JSON lines or Parquet."""

import codecs
import contextlib
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ser_ray.corpus.words import COLUMNS
from ser_ray.errors import CorpusError
from ser_ray.storage.json_text import read_object
from ser_ray.storage.packed import audio_column, features_of, packed_location
from ser_ray.storage.paths import absolute, filesystem_of, read_file

TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *JSON_SUFFIXES)
FOLDER = "folder of the table/"
"""Name of the column with the folder of each row's table, relative to the folder of the corpus."""
FindColumns = Callable[[Sequence[str]], Mapping[str, str]]
"""A function that gets the names of a table's columns, and returns which of them to read:
{column in `COLUMNS`: name in the table}. It raises a CorpusError if the names do not fit."""
Row = Mapping[str, Any]
_SEPARATORS = (",", ";", "\t", "|")


class TableError(ValueError):
    """Raised if a table cannot be read. The message gives the reason, without the location."""


def read_text(location: str, find: FindColumns) -> tuple[pa.Table, tuple[str, ...]]:
    """Read a file of delimited text as columns of strings.

    Args:
        location: path or URI of the table.
        find: called only to find the separator, and to raise an error if no header fits.

    Returns:
        The table, and lines for the user.

    Raises:
        CorpusError: the text is empty or in an unknown encoding, or lacks a needed column.
        TableError: a row has more or fewer values than the header row, or a stray quotation mark
            joins rows.
    """
    text, notes = _decode(location, read_file(location))
    return _parse(location, text, find), notes


def _decode(location: str, data: bytes) -> tuple[str, tuple[str, ...]]:
    """Decode the text; return it, and a line for the user if it was read as Windows-1252."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encodings = ["utf-32"]
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif data[:1000].count(0) > len(data[:1000]) / 4:
        encodings = ["utf-16-be" if data[:1] == b"\0" else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        notes = (f"{location}: is not UTF-8, and was read as Windows-1252",)
        return text, notes if encoding == "cp1252" else ()
    raise CorpusError(
        f"{location}: the table cannot be read, because it is not text in UTF-8, UTF-16, UTF-32 or "
        "Windows-1252; save it again as UTF-8"
    )


def _parse(location: str, text: str, find: FindColumns) -> pa.Table:
    """Parse delimited text.

    The separator is one with which the header has all needed columns. If there is no such separator
    or several, it is the one with the most known column names.
    """

    def rank(separator: str) -> tuple[bool, int, int]:
        names = headers[separator]
        is_complete = False
        with contextlib.suppress(CorpusError):
            is_complete = bool(find(names))
        return is_complete, len(known & set(map(column_key, names))), len(names)

    text = re.sub(r"\A(?:[ \t]*[\r\n])+", "", text)
    separators: tuple[str, ...] = _SEPARATORS
    # Excel's first line, such as `sep=;`, may end with more separators.
    if declared := re.match(r'"?sep=(.)"?[,;\t|]*[\r\n]+', text, re.IGNORECASE):
        text = text[declared.end() :]
        separators = tuple(dict.fromkeys((*separators, declared[1])))
    if not text.strip():
        raise CorpusError(f"{location}: the table is empty")
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    headers = {mark: next(csv.reader([header], delimiter=mark)) for mark in separators}
    known = {column_key(name) for names in COLUMNS.values() for name in names}
    separator = max(headers, key=rank)
    names = headers[separator]
    find(names)  # for a file that is not a table, this error is clearer than that of a row
    rows = _split_rows(text, separator)[1:]
    if uneven := next((row for row in rows if len(row) != len(names)), None):
        raise TableError(
            f"the header row has {len(names)} values, and a row has {len(uneven)}: "
            f"{separator.join(uneven)[:80]!r}"
        )
    columns = zip(*rows, strict=True) if rows else [()] * len(names)
    return pa.table([pa.array(column, pa.string()) for column in columns], names)


def _split_rows(text: str, separator: str) -> list[list[str]]:
    """Split text into rows of values. Rows without any value, as spreadsheets write, are left out.

    Raises:
        TableError: a stray quotation mark joins rows.
    """
    limit = csv.field_size_limit(len(text))
    first = 1  # the first line of the row that is being read
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        rows = [row for row in reader if any(map(str.strip, row))]
        if any("\n" in value or "\r" in value for row in rows for value in row):
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
            for _ in reader:
                first = reader.line_num + 1
    except csv.Error as error:
        raise TableError(
            f"the quotation mark that opens a value near line {first} is not closed at the end of "
            "the value, so rows would be lost; double the quotation marks inside values"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def column_key(name: str) -> str:
    """Return a column's name in lower case, with its words joined by underscores."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def read_json_lines(location: str) -> list[Row]:
    """Read a file with a JSON object in each line. If its name ends with .gz, decompress it."""
    data = read_file(location)
    try:
        is_zipped = filesystem_of(location)[1].endswith(".gz")
        text = (gzip.decompress(data) if is_zipped else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TableError("it is not text in UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise TableError("it is no complete gzip file") from error
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(read_object(line))
            except ValueError as error:
                raise TableError(f"line {number} is not a JSON object") from error
    return rows


def as_table(rows: Iterable[Row]) -> pa.Table:
    """Make a table of strings from rows.

    A column with a list or an object in it becomes a column of lists, which `as_texts` refuses.
    """
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        texts = [None if value is None else str(value) for value in values]
        if any(isinstance(value, dict | list) for value in values):
            columns[name] = pa.array([[text] for text in texts], pa.list_(pa.string()))
        else:
            columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def as_texts(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a column as texts without blanks around them.

    NaN becomes null, because pandas writes it for a missing value. Durations become seconds.
    """
    if pa.types.is_duration(column.type):
        column = pc.divide(column.cast(pa.duration("ns")).cast("int64").cast("float64"), 1e9)
    elif pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        return pc.utf8_trim_whitespace(column.cast("string"))
    except pa.ArrowException as error:
        raise TableError(f"the column {name} has values that are not texts or numbers") from error


def read_parquet(location: str, find: FindColumns) -> pa.Table:
    """Read the columns that `find` chooses from a Parquet file.

    If the file is a Hugging Face data set with recordings, the column `path` has their locations.
    The numbers of a ClassLabel become names.
    """
    filesystem, path = filesystem_of(location)
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        schema = file.schema_arrow
        audio, features = audio_column(schema), features_of(schema)
        names = list(schema.names)
        if audio:  # the file's own column `path` has the earlier locations of the recordings
            names = ["path", *(n for n in names if n != audio and column_key(n) != "path")]
        chosen = list(dict.fromkeys(find(names).values()))
        needs_path = audio is not None and "path" in chosen
        table = file.read([name for name in chosen if not (needs_path and name == "path")])
        if needs_path:
            table = table.append_column(
                "path", pa.array(_packed_paths(absolute(location), file, str(audio)))
            )
    for name in table.column_names:
        if classes := features.get(name, {}).get("names"):
            known, numbers = range(len(classes)), table[name].to_pylist()
            labels = [classes[number] if number in known else None for number in numbers]
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(labels, pa.string()))
    return table


def _packed_paths(location: str, file: pq.ParquetFile, audio: str) -> list[str | None]:
    """Return the locations of the recordings: rows of this file, or the separate files it names."""
    is_packed = any(
        batch[audio].field("bytes").null_count < len(batch)
        for batch in file.iter_batches(16, columns=[f"{audio}.bytes"])
    )
    if is_packed:
        return [packed_location(location, row) for row in range(file.metadata.num_rows)]
    column = file.read([f"{audio}.path"])[audio].combine_chunks()
    return list(column.field("path").to_pylist())
