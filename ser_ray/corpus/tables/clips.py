"""A custom corpus: a table with the file, label and speaker of every clip.

A clip is a file, or a segment of a file between the times `start` and `end`. `read_table` finds the
columns and checks the values, `formats` parses the file, and `list_table` finds the clips'
files.

Tables come from spreadsheets and other systems, so every unambiguous variant is accepted: blanks
and capitals in column names, backslashes in paths, and `~`. An ambiguous row or column is an error.
"""

import csv
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from ser_ray.corpus.tables.files import TableError, column_key
from ser_ray.corpus.tables.formats import read_any
from ser_ray.corpus.words import COLUMNS, MISSING_WORDS, PARTS, shorten
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.storage.listing import NO_FILE, ListedFile, find_local, stat_file
from ser_ray.storage.packed import ROW
from ser_ray.storage.paths import location_inside, printable, refuse_password

NO_FOLDER = "its folder does not exist"
OTHER_DRIVE = "a Windows path, which does not exist here"
MISSING_FILES = (NO_FILE, NO_FOLDER, OTHER_DRIVE)
"""The reasons that mean that a file does not exist."""

_NEEDED = ("path", "label", "speaker")
_UNIT = "(_?(time|s|sec|seconds|ms|samples?))?"
_TIMES = f"(start|begin|onset|end|stop|offset){_UNIT}"
_LENGTH = f"(dur|duration|length){_UNIT}"
"""Names of columns of times, as `column_key` returns them. A length is one beside a start."""
_NO_VALUE = {*MISSING_WORDS, ""}
_SHOWN_ROWS = 5
_SHOWN_LETTERS = 300
_FOLDERS_ABOVE = 5


def read_table(
    source: str,
    missing: Iterable[str] = MISSING_WORDS,
    columns: Mapping[str, str] | None = None,
) -> tuple[pa.Table, tuple[str, ...]] | None:
    """Read the clips of a table or a folder of tables; return None if the folder has no table.

    Args:
        source: the table or folder, as the user wrote it.
        missing: words that mean a missing value, in upper or lower case.
        columns: {column in `COLUMNS`: name in the table}.

    Returns:
        The clips, and lines for the user. The columns are `path`, `label`, `speaker`, `split` and
        perhaps `take`, without blanks around the values, and `start` and `end` in seconds, which
        are both null for a complete file.

    Raises:
        CorpusError: the table cannot be read, or lacks a column or a value.
    """
    names = columns or {}
    find = partial(_find_columns, source, names)
    try:
        table, notes = read_any(source, find)
        if table is None:
            return None
        found = find(table.column_names)
        notes += _ambiguous_columns(source, table.column_names, found, names)
        table.select(list(found.values())).validate(full=True)  # finds text that is not UTF-8
        values = {name: _texts(given, table[given]) for name, given in found.items()}
        for name in ("label", "speaker"):
            values[name] = _composed(values[name])
    except (pa.ArrowException, LookupError, ValueError, TypeError, OSError, csv.Error) as error:
        if isinstance(error, OSError) and (error.errno or "://" in source):
            raise  # pyarrow raises others for a damaged file
        reason = "its content is damaged"
        if isinstance(error, KeyError):
            reason = f"a row has no {error.args[0]}"
        elif isinstance(error, TableError):
            reason = str(error)
        raise CorpusError(
            f"{source}: the table cannot be read ({reason}); save it again with a header row and "
            "as many values in every row"
        ) from error
    if len(table) == 0:
        raise CorpusError(f"{source}: the table has no rows")
    nothing = pa.nulls(len(table), pa.string())
    times = [values.pop(name, nothing) for name in ("start", "end")]
    split = values.pop("split", nothing)
    _refuse_missing(source, values, {word.strip().lower() for word in missing})
    segments = _read_times(source, *(column.to_pylist() for column in times))
    for name, seconds in zip(("start", "end"), zip(*segments, strict=True), strict=True):
        values[name] = pa.array(seconds, pa.float64())
    return pa.table(values | {"split": _read_split(split)}), notes


def _read_split(column: pa.ChunkedArray) -> pa.Array:
    """Replace the values by parts (train, validation, test), unless some values name folds."""
    given = [None if (text or "").lower() in _NO_VALUE else text for text in column.to_pylist()]
    parts = [text and PARTS.get(text.lower()) for text in given]
    return pa.array(parts if parts.count(None) == given.count(None) else given, pa.string())


def clip_keys(rows: pa.Table) -> pa.ChunkedArray:
    """Return a key for each row: its path, start and end."""
    times = [pc.fill_null(rows[name].cast("string"), "") for name in ("start", "end")]
    return pc.binary_join_element_wise(rows["path"], *times, "\n")


def _read_times(
    source: str, starts: list[str | None], ends: list[str | None]
) -> list[tuple[float | None, float | None]]:
    """Return the start and end of every row in seconds; both are None for a complete file.

    Raises:
        CorpusError: the times of a row do not define a segment.
    """
    segments: list[tuple[float | None, float | None]] = []
    for row, texts in enumerate(zip(starts, ends, strict=True), start=1):
        start, end = map(_seconds, texts)
        start = start or 0.0
        if math.isnan(start) or (end is not None and not start < end):
            raise CorpusError(
                f"{source}: row {row} (after the header) has the start {texts[0] or 'of the file'} "
                f"and the end {texts[1] or 'of the file'}; a segment needs a start before "
                "its end, both in seconds or as in 0 days 00:00:01.5"
            )
        segments.append((None if start == 0 and end is None else start, end))
    return segments


def _seconds(text: str | None) -> float | None:
    """Parse seconds or a time of pandas; return None for no value, and NaN for any other text."""
    if text is None or text.lower() in _NO_VALUE:
        return None
    try:
        seconds = float(text)
    except ValueError:
        import pandas as pd

        try:
            seconds = pd.Timedelta(text).total_seconds()
        except ValueError:
            return math.nan
    return seconds if 0 <= seconds < math.inf else math.nan


def _texts(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a column as texts without blanks around them.

    NaN, which pandas writes for a missing value, becomes null, and durations become seconds.
    """
    if pa.types.is_duration(column.type):
        column = pc.divide(column.cast(pa.duration("ns")).cast("int64").cast("float64"), 1e9)
    elif pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    try:
        return pc.utf8_trim_whitespace(column.cast("string"))
    except pa.ArrowException as error:
        problem = f"the values in the column {name} are not texts or numbers"
        raise TableError(problem) from error


def _composed(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Give letters with accents one normal form, which pyarrow 25 does not do."""
    coded = texts.combine_chunks().dictionary_encode()
    forms = [unicodedata.normalize("NFC", text) for text in coded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(forms, pa.string()).take(coded.indices)])


def _find_columns(source: str, columns: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Choose the columns to read from the names in a table: {column in `COLUMNS`: name in table}.

    Raises:
        CorpusError: a column is missing or appears twice, or a column of times has an unknown name.
    """
    found: dict[str, str] = {}
    shown = printable(",".join(names))[:_SHOWN_LETTERS]  # it may be no table at all
    for column, known in COLUMNS.items():
        wanted = (columns[column],) if column in columns else known
        same = [[name for name in names if column_key(name) == column_key(want)] for want in wanted]
        given = next(filter(None, same), [])
        if len(given) > 1:
            raise CorpusError(
                f"{source}: has the column {column_key(given[0])} twice, as {given[0]!r} and "
                f"{given[1]!r}; rename or remove one of them"
            )
        if given:
            found[column] = given[0]
        elif column in columns:
            raise CorpusError(
                f"{source}: has no column {columns[column]}, which --columns names as {column}; it "
                f"has {shown}"
            )
    is_time = re.compile(f"{_TIMES}|{_LENGTH}" if "start" in found else _TIMES).fullmatch
    times = [name for name in names if is_time(column_key(name))]
    if (other := [name for name in times if name not in found.values()]) and len(
        {"start", "end"} & set(found)
    ) < 2:
        raise CorpusError(
            f"{source}: has the column {other[0]}, so its rows seem to be segments of files; say "
            "with --columns which columns are their start and end in seconds, or remove them"
        )
    if lacking := sorted(set(_NEEDED) - set(found)):
        hint = "use another column with --columns, as in --columns label=mood"
        if lacking == ["speaker"] and "split" in found:
            hint = (
                f"if no speaker is in two parts of the column {found['split']}, use these parts as "
                f"speakers with --columns speaker={found['split']}"
            )
        raise CorpusError(
            f"{source}: no column {', '.join(lacking)}; the table needs path,label,speaker and may "
            f"have take,start,end,split, but it has {shown}; {hint}"
        )
    return found


def _ambiguous_columns(
    source: str, names: Sequence[str], found: Mapping[str, str], columns: Mapping[str, str]
) -> tuple[str, ...]:
    """Return a line for each column that could have been read from another one of the table."""
    keys = {column_key(name): name for name in reversed(names)}
    lines = []
    for column, given in found.items():
        also = [keys[key] for key in COLUMNS[column] if keys.get(key, given) != given]
        if also and column not in columns:
            lines.append(
                f"{source}: the {column} is read from the column {given}, and not from {also[0]}; "
                f"--columns {column}={also[0]} reads the other one"
            )
    return tuple(lines)


def _refuse_missing(source: str, columns: dict[str, pa.ChunkedArray], words: set[str]) -> None:
    """Raise an error that names the first rows with a missing value, if there are any."""
    missing = pa.array(sorted({*words, ""}))
    faults: list[tuple[int, str, str]] = []
    for name, column in columns.items():
        lower = pc.utf8_lower(pc.fill_null(column, ""))
        for row in np.flatnonzero(pc.is_in(lower, value_set=missing).to_numpy()).tolist():
            faults.append((row + 1, name, column[row].as_py() or ""))
    if not faults:
        return
    shown = [
        f"row {row}{' (after the header)' if place == 0 else ''} has no {name}"
        + (f" ({value!r})" if value else "")
        for place, (row, name, value) in enumerate(sorted(faults, key=lambda fault: fault[0]))
    ]
    hint = (
        ". If such a word is a value in your table, list only the words that mean a missing value "
        "with --missing, or none of them with --missing alone"
    )
    raise CorpusError(
        f"{source}: {shorten(shown, _SHOWN_ROWS)}; fill them in, or delete these rows"
        + (hint if any(value for _, _, value in faults) else "")
    )


def list_table(source: str, folder: str, rows: pa.Table) -> dict[str, object]:
    """Find the files of the clips that `read_table` returned.

    Relative paths start at `folder`, or at the nearest folder above it that has one of the files.

    Returns:
        The columns of the manifest that a table has.

    Raises:
        CorpusError: rows contradict each other, or a path has a password in it.
    """
    written = rows["path"].to_pylist()
    folder = _base(folder, written)
    files = {path: _find(folder, path) for path in dict.fromkeys(written)}
    found = [files[path] for path in written]
    locations = [file.location for file in found]
    for row, location in enumerate(locations, start=1):
        try:
            refuse_password(location)
        except ConfigError as error:
            raise CorpusError(f"{source}: row {row} (after the header): {error}") from error
    if "take" not in rows.column_names:
        times = zip(rows["start"].to_pylist(), rows["end"].to_pylist(), strict=True)
        takes = [
            (file.inside if ROW in file.inside else os.path.splitext(file.inside)[0])  # noqa: PTH122
            + ("" if start is None else f" {start}-{'end' if end is None else end}")
            for file, (start, end) in zip(found, times, strict=True)
        ]
        rows = rows.append_column("take", [takes])
    rows = rows.set_column(rows.column_names.index("path"), "path", [locations])
    rows = rows.append_column("clip", clip_keys(rows))
    for column in ("speaker", "label"):
        _require_one(source, rows, "clip", column)
        _require_one(source, rows, "take", column)
    return {
        **{name: rows[name] for name in ("path", "start", "end", "speaker", "take", "split")},
        "emotion": rows["label"],
        "size": [file.size for file in found],
        "modified": [file.modified for file in found],
        "modality": ["audio"] * len(rows),
        "status": ["unreadable" if file.problem else None for file in found],
        "reason": [file.problem for file in found],
    }


def _base(folder: str, paths: list[str]) -> str:
    """Return the folder at which relative paths start."""
    if "://" in folder:
        return folder
    first = [path for path in dict.fromkeys(paths[:1000]) if "://" not in path]
    above = [folder, *map(str, Path(folder).parents)][:_FOLDERS_ABOVE]
    return next((base for base in above if any(_exists(base, path) for path in first)), folder)


def _find(folder: str, path: str) -> ListedFile:
    """Find a file by its path in the table."""
    path, mark, row = path.partition(ROW)
    location, is_foreign = path, False
    if "://" not in path:
        if not _exists(folder, path):
            is_foreign = re.match(r"[A-Za-z]:[\\/]|\\\\", path) is not None
            path = path if is_foreign else path.replace("\\", "/")  # written on Windows
        if not is_foreign:
            path = os.path.normpath(path)
            location = os.path.expanduser(path)  # noqa: PTH111 - a million Path objects are slow
        if not (is_foreign or os.path.isabs(location)):  # noqa: PTH117
            location = location_inside(folder, location)
    status, problem = None, None
    if "://" not in location:
        location = find_local(location)
        status, problem = stat_file(location)
    if problem == NO_FILE and is_foreign:
        problem = OTHER_DRIVE
    elif problem == NO_FILE and not os.path.isdir(os.path.dirname(location)):  # noqa: PTH112, PTH120
        problem = NO_FOLDER
    inside = path.removeprefix(f"{folder}/") + mark + row
    location += mark + row
    if status is None or problem:
        return ListedFile(inside, location, None, None, problem)
    return ListedFile(inside, location, status.st_size, status.st_mtime_ns, None)


def _exists(folder: str, path: str) -> bool:
    return "://" not in folder and os.path.lexists(location_inside(folder, path))


def _require_one(
    source: str, rows: pa.Table, key: Literal["take", "clip"], column: Literal["speaker", "label"]
) -> None:
    """Refuse a take or clip with two speakers or labels."""
    counts = rows.group_by(key, use_threads=False).aggregate([(column, "count_distinct")])
    mixed = counts.filter(pc.greater(counts[f"{column}_count_distinct"], 1))
    if len(mixed) == 0:
        return
    name = mixed[key][0].as_py()
    shown = name.rstrip("\n").replace("\n", " ")  # `clip_keys` joins by line ends
    numbers = np.flatnonzero(pc.equal(rows[key], name).to_numpy())
    values = rows[column].take(numbers).to_pylist()
    other = next(i for i, value in enumerate(values) if value != values[0])
    hint = (
        "; a take is one performance, named by the column take or, without this column, by the "
        "path without its extension"
    )
    raise CorpusError(
        f"{source}: rows {numbers[0] + 1} and {numbers[other] + 1} (after the header) are one "
        f"{key}, {shown!r}, but their {column} is {values[0]!r} and {values[other]!r}"
        + (hint if key == "take" else "")
    )
