"""The user's own corpus: a table that names the file, label and speaker of every clip.

Tables come from spreadsheets and from other systems, so everything that has one meaning is read:
any separator, UTF-8 with a byte order mark, UTF-16, Windows-1252, blanks and capitals in the names
of the columns, backslashes in paths, `~`. Whatever has two meanings is refused with its row.
"""

import codecs
import csv
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import ConfigError, CorpusError
from ser_ray.storage.listing import NO_FILE, find_local, stat_file
from ser_ray.storage.paths import folder_of, location_inside, refuse_password

TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
NO_FOLDER = "its folder does not exist"
OTHER_DRIVE = "a path of Windows, which does not exist here"
MISSING_FILES = (NO_FILE, NO_FOLDER, OTHER_DRIVE)
"""The reasons of rows whose file does not exist."""

_NEEDED = ("path", "label", "speaker")
_COLUMNS = (*_NEEDED, "take")
_SEPARATORS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before that of UTF-16, which is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEGMENT = re.compile(
    r"(start|begin|onset|end|stop|offset)([ _]?(time|s|sec|seconds|ms|samples?))?"
)
_SHOWN_ROWS = 5


def read_table(
    source: str, filesystem: fs.FileSystem, path: str, missing: Iterable[str]
) -> tuple[pa.Table, tuple[str, ...]]:
    """Read the string columns `path,label,speaker` and perhaps `take`.

    Args:
        source: the table, as the user wrote it.
        filesystem: where the table is.
        path: path of the table on it.
        missing: words that mean that a value is missing, in any case.

    Returns:
        The columns without blanks around the values, and lines to tell the user.

    Raises:
        CorpusError: the table cannot be read, lacks a column, or a row lacks a value.
    """
    notes: tuple[str, ...] = ()
    try:
        with filesystem.open_input_file(path) as file:
            if path.lower().endswith(TEXT_SUFFIXES):
                text, notes = _decode(source, file.read())
                table = _parse(source, text)
            else:
                parquet = pq.ParquetFile(file)
                found = _find_columns(source, parquet.schema_arrow.names)
                table = parquet.read(columns=list(found.values())).select(list(found.values()))
                table = table.rename_columns(list(found))
        columns = {
            name: pc.utf8_trim_whitespace(_without_nan(table[name]).cast("string"))
            for name in table.column_names
        }
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        is_ragged = "columns, got" in reason
        advice = "every row needs as many values as the first, the names of the columns"
        raise CorpusError(
            f"{source}: the table cannot be read ({reason}); "
            f"{advice if is_ragged else 'save it again with one header row'}"
        ) from error
    if len(table) == 0:
        raise CorpusError(f"{source}: the table has no rows")
    _refuse_missing(source, columns, {word.strip().lower() for word in missing})
    return pa.table(columns), notes


def _without_nan(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace the numbers that pandas writes for missing values by null."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)


def _decode(source: str, data: bytes) -> tuple[str, tuple[str, ...]]:
    """Decode the bytes of a text table, and say if its encoding had to be guessed."""
    encodings = [encoding for mark, encoding in _MARKS if data.startswith(mark)][:1]
    if not encodings and b"\0" in data[:1000]:
        encodings = ["utf-16-be" if data[:1] == b"\0" else "utf-16-le"]
    for encoding in encodings or ["utf-8", "cp1252"]:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        notes = (f"{source}: is not UTF-8, and was read as Windows-1252",)
        return text, notes if encoding == "cp1252" else ()
    raise CorpusError(
        f"{source}: the table cannot be read, as it is not text in UTF-8, UTF-16 or Windows-1252; "
        "save it again as UTF-8"
    )


def _parse(source: str, text: str) -> pa.Table:
    """Parse separated values, whose separator is the one that yields the needed columns."""
    text = text.lstrip("\ufeff\r\n")
    if declared := re.match(r"sep=.\r?\n", text):  # Excel's own first line
        text = text[declared.end() :]
    if not text.strip():
        raise CorpusError(f"{source}: the table is empty")
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    rows = {separator: next(csv.reader([header], delimiter=separator)) for separator in _SEPARATORS}
    fitting = [mark for mark, names in rows.items() if set(_NEEDED) <= set(map(_fold, names))]
    separator = fitting[0] if fitting else max(rows, key=lambda mark: len(rows[mark]))
    names = rows[separator]
    found = _find_columns(source, names)
    numbered = [f"column {number}" for number in range(len(names))]
    table = pa.csv.read_csv(
        io.BytesIO(text.encode()),
        pa.csv.ReadOptions(column_names=numbered, skip_rows=1),
        pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        # As text, because speaker 01 would otherwise be read as the number 1.
        pa.csv.ConvertOptions(column_types=dict.fromkeys(numbered, pa.string())),
    )
    return pa.table({name: table[names.index(given)] for name, given in found.items()})


def _fold(name: str) -> str:
    return name.strip().lower()


def _find_columns(source: str, names: Sequence[str]) -> dict[str, str]:
    """Return the name in the table of each column that is read.

    Raises:
        CorpusError: a column is missing, is there twice, or says that rows are parts of files.
    """
    found: dict[str, str] = {}
    for name in names:
        if (column := _fold(name)) not in _COLUMNS:
            continue
        if column in found:
            raise CorpusError(
                f"{source}: has the column {column} twice, as {found[column]!r} and {name!r}; "
                "rename or remove one of them"
            )
        found[column] = name
    segments = [name for name in names if _SEGMENT.fullmatch(_fold(name))]
    if segments:
        raise CorpusError(
            f"{source}: has the column {segments[0]}, so its rows seem to be segments of files, "
            "which are not supported; cut every segment into a file of its own and remove the "
            "columns of times"
        )
    if lacking := sorted(set(_NEEDED) - set(found)):
        raise CorpusError(
            f"{source}: no column {', '.join(lacking)}; the table needs path,label,speaker in its "
            f"first row and may have take, but it has {','.join(names)}"
        )
    return found


def _refuse_missing(source: str, columns: dict[str, pa.ChunkedArray], words: set[str]) -> None:
    """Refuse empty values and those that mean that there is none, naming the first rows."""
    missing = pa.array(sorted({*words, ""}))
    faults: list[tuple[int, str, str]] = []
    for name, column in columns.items():
        lower = pc.utf8_lower(pc.fill_null(column, ""))
        for row in np.flatnonzero(pc.is_in(lower, value_set=missing).to_numpy()).tolist():
            faults.append((row + 1, name, column[row].as_py() or ""))
    if not faults:
        return
    faults.sort(key=lambda fault: fault[0])
    shown = [
        f"row {row}{' (after the header)' if place == 0 else ''} has no {name}"
        + (f" ({value!r})" if value else "")
        for place, (row, name, value) in enumerate(faults[:_SHOWN_ROWS])
    ]
    more = f" and {len(faults) - _SHOWN_ROWS} more" if len(faults) > _SHOWN_ROWS else ""
    hint = (
        ". If such a word is a value of yours, --missing lists the words that mean a missing value"
        " (--missing alone: none)"
    )
    raise CorpusError(
        f"{source}: {', '.join(shown)}{more}; fill them in, or delete these rows"
        + (hint if any(value for _, _, value in faults) else "")
    )


def list_table(source: str, rows: pa.Table) -> dict[str, object]:
    """Find the files of a table.

    Returns:
        The manifest's columns that a table has, one value for each row.

    Raises:
        CorpusError: rows contradict each other, or a path has a password in it.
    """
    folder = folder_of(source)
    located = [_locate(folder, path) for path in rows["path"].to_pylist()]
    paths = [path for path, _, _ in located]
    _refuse_passwords(source, paths)
    if "take" not in rows.column_names:
        takes = [os.path.splitext(given)[0] for _, given, _ in located]  # noqa: PTH122
        rows = rows.append_column("take", pa.array(takes))
    rows = rows.set_column(rows.column_names.index("path"), "path", pa.array(paths))
    for column in ("speaker", "label"):
        _require_one(source, rows, "take", column)
        _require_one(source, rows, "path", column)
    found = [(None, None) if "://" in path else stat_file(path) for path in paths]
    problems = [
        (missing if problem == NO_FILE and missing else problem)
        for (_, problem), (_, _, missing) in zip(found, located, strict=True)
    ]
    usable = [
        status if status is not None and problem is None else None
        for (status, _), problem in zip(found, problems, strict=True)
    ]
    return {
        "path": rows["path"],
        "size": [None if status is None else status.st_size for status in usable],
        "modified": [None if status is None else status.st_mtime_ns for status in usable],
        "modality": ["audio"] * len(rows),
        "emotion": rows["label"],
        "speaker": rows["speaker"],
        "take": rows["take"],
        "status": ["unreadable" if problem else None for problem in problems],
        "reason": problems,
    }


def _locate(folder: str, path: str) -> tuple[str, str, str | None]:
    """Find the file that a row names.

    Returns:
        Its location, its path in the normalised spelling of the table, and the reason if there is
        no such file.
    """
    if "://" in path:
        return path, path, None
    if re.match(r"[A-Za-z]:[\\/]|\\\\", path) and not _exists(folder, path):
        return path, path, OTHER_DRIVE
    if "\\" in path and not _exists(folder, path):  # written on Windows
        path = path.replace("\\", "/")
    given = os.path.normpath(path)
    location = os.path.expanduser(given)  # noqa: PTH111 - a million Path objects are slow
    if not os.path.isabs(location):  # noqa: PTH117
        location = location_inside(folder, location)
    if "://" in location or os.path.lexists(location):
        return location, given, None
    location = find_local(location)
    has_folder = os.path.isdir(os.path.dirname(location))  # noqa: PTH112, PTH120
    return location, given, NO_FILE if has_folder else NO_FOLDER


def _exists(folder: str, path: str) -> bool:
    return "://" not in folder and os.path.lexists(location_inside(folder, path))


def _refuse_passwords(source: str, paths: list[str]) -> None:
    """Refuse URIs with a password in them, which the shards would repeat."""
    for row, path in enumerate(paths, start=1):
        if "://" in path:
            try:
                refuse_password(path)
            except ConfigError as error:
                raise CorpusError(f"{source}: row {row} (after the header): {error}") from error


def _require_one(
    source: str, rows: pa.Table, key: Literal["take", "path"], column: Literal["speaker", "label"]
) -> None:
    """Refuse a take or file with two speakers or labels, which no split could keep on one side."""
    counts = rows.group_by(key, use_threads=False).aggregate([(column, "count_distinct")])
    mixed = counts.filter(pc.greater(counts[f"{column}_count_distinct"], 1))
    if len(mixed) == 0:
        return
    name = mixed[key][0].as_py()
    numbers = np.flatnonzero(pc.equal(rows[key], name).to_numpy())
    values = rows[column].take(numbers).to_pylist()
    other = next(i for i, value in enumerate(values) if value != values[0])
    hint = (
        "; a take is one performance, named by the column take, or else by the path without its "
        "extension"
    )
    raise CorpusError(
        f"{source}: rows {numbers[0] + 1} and {numbers[other] + 1} (after the header) are one "
        f"{'take' if key == 'take' else 'file'}, {name!r}, but their {column} is {values[0]!r} and "
        f"{values[other]!r}" + (hint if key == "take" else "")
    )
