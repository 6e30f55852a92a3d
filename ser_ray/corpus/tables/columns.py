"""Reads the columns of a custom corpus's table, and checks their values.

Tables come from spreadsheets and other systems, so column names may have blanks, hyphens and
capitals, and values may have blanks around them. It is an error if a path, label, speaker or take
is missing, if a time is invalid, or if two columns have the same name.
"""

import csv
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.tables.files import FOLDER, TEXT_SUFFIXES, TableError, as_texts, column_key
from ser_ray.corpus.tables.formats import read_any
from ser_ray.corpus.words import COLUMNS, MISSING_WORDS, PARTS, shorten
from ser_ray.errors import CorpusError
from ser_ray.storage.paths import is_storage_failure, printable

_REQUIRED = ("path", "label", "speaker")
_BEFORE = r"((segment|seg|clip|utterance|utt|turn|audio|speech|time|timestamp)[\W_]*)?"
_UNIT = (
    r"([\W_]*(in|time|timestamp|s|secs?|seconds?|ms|msecs?|millis|milliseconds?|samples?|frames?))*"
    r"[\W_]*"
)
_TIMES = f"{_BEFORE}(start|begin|onset|end|stop|offset|[xt]min|[xt]max){_UNIT}"
_LENGTH = f"{_BEFORE}(dur|duration|length){_UNIT}"
"""Patterns for the names of time columns in lower case. A column that matches `_LENGTH` is a time
column only if the table also has a column for the start."""
_DURATION = re.compile(
    r"(\d+ days? )?\+?\d+:\d{1,2}:\d{1,2}(\.\d+)?|PT.*"
    r"|\d+(\.\d+)?\s?(ns|us|ms|s|secs?|min|m|h|d|days?)"
)
"""Matches the durations that are accepted. `pandas.Timedelta` accepts more, but it reads a number
without a unit as nanoseconds, and ignores commas and blanks in numbers."""
_THOUSANDS = re.compile(r"[1-9]\d{0,2},\d{3}")
"""Matches a number in which a comma could also separate thousands."""
_MISSING_VALUES = {*MISSING_WORDS, ""}
"""Words for a missing value in the columns `start`, `end` and `split`."""
_SHOWN_ROWS = 5
_SHOWN_LETTERS = 300


def read_table(
    source: str, missing: Iterable[str], columns: Mapping[str, str]
) -> tuple[pa.Table, tuple[str, ...]] | None:
    """Read the clips of a table or a folder of tables; return None if the folder has no table.

    Args:
        source: the table or folder, as the user wrote it.
        missing: words that mean a missing value, in upper or lower case.
        columns: {column in `COLUMNS`: name in the table}.

    Returns:
        The clips, and lines for the user. The columns `path`, `label`, `speaker` and `split` are
        texts without blanks around them. `start` and `end` are in seconds, and both are null for a
        complete file. The columns `take` and `files.FOLDER` are missing if the source lacks them.

    Raises:
        CorpusError: the table cannot be read, or lacks a column or a value.
    """
    values, notes = _read_columns(source, columns)
    if values is None:
        return None
    num_rows = len(values["path"])
    if num_rows == 0:
        raise CorpusError(f"{source}: the table has no rows")
    nulls = pa.nulls(num_rows, pa.string())
    starts, ends, split = (values.pop(name, nulls) for name in ("start", "end", "split"))
    needed = {name: values[name] for name in COLUMNS if name in values}
    _refuse_missing(source, needed, {word.strip().lower() for word in missing})
    segments = _read_times(source, starts.to_pylist(), ends.to_pylist())
    times = (pa.array(seconds, pa.float64()) for seconds in zip(*segments, strict=True))
    values |= dict(zip(("start", "end"), times, strict=True))
    return pa.table(values | {"split": _read_split(split)}), notes


def _read_columns(
    source: str, columns: Mapping[str, str]
) -> tuple[dict[str, pa.ChunkedArray] | None, tuple[str, ...]]:
    """Return the columns as texts, or None if a folder has no table; and lines for the user.

    Raises:
        CorpusError: the table cannot be read, or lacks a column.
    """
    find = partial(_find_columns, source, columns)
    try:
        table, notes = read_any(source, find)
        if table is None:
            return None, notes
        found = find(table.column_names)
        notes += _ambiguous_columns(source, table.column_names, found, columns)
        table.select(list(found.values())).validate(full=True)  # finds text that is not UTF-8
        values = {column: as_texts(name, table[name]) for column, name in found.items()}
        if FOLDER in table.column_names:
            values[FOLDER] = table[FOLDER]
        for column in ("label", "speaker"):
            values[column] = _composed(values[column])
    except (
        pa.ArrowException, AttributeError, LookupError, ValueError, TypeError, OSError, csv.Error
    ) as error:  # fmt: skip
        if isinstance(error, OSError) and is_storage_failure(error, source):
            raise
        if isinstance(error, TableError):
            reason = str(error)
        elif isinstance(error, KeyError):
            reason = f"a row has no {error.args[0]}"
        else:
            reason = "its content is damaged"
        advice = "correct it, or save it again"
        if source.lower().endswith(TEXT_SUFFIXES):
            advice = (
                "save it again with a header row, and with the same number of values in every row"
            )
        raise CorpusError(f"{source}: the table cannot be read ({reason}); {advice}") from error
    return values, notes


def _read_split(column: pa.ChunkedArray) -> pa.Array:
    """Replace the names of parts by train, validation or test. Other values are folds."""
    texts = [text or "" for text in column.to_pylist()]
    known = PARTS | dict.fromkeys(_MISSING_VALUES)
    return pa.array([known.get(text.lower(), text) for text in texts], pa.string())


def _read_times(
    source: str, starts: list[str | None], ends: list[str | None]
) -> list[tuple[float | None, float | None]]:
    """Return the start and end of every row in seconds; both are None for a complete file.

    Raises:
        CorpusError: the times of a row do not define a segment.
    """
    segments: list[tuple[float | None, float | None]] = []
    with_comma = [text for text in (*starts, *ends) if text and "," in text]
    # A comma is a decimal mark. If every comma could separate thousands, the times are refused.
    mark = "." if all(map(_THOUSANDS.fullmatch, with_comma)) else ","
    for row, texts in enumerate(zip(starts, ends, strict=True), start=1):
        start, end = (_seconds(text and text.replace(mark, ".")) for text in texts)
        start = start or 0.0
        if math.isnan(start) or (end is not None and (math.isnan(end) or start >= end)):
            raise CorpusError(
                f"{source}: row {row} (after the header) has the start {texts[0] or 'of the file'} "
                f"and the end {texts[1] or 'of the file'}; a segment needs a start before "
                "its end, both in seconds (1.5) or as in 0 days 00:00:01.5"
            )
        segments.append((None if start == 0 and end is None else start, end))
    return segments


def _seconds(text: str | None) -> float | None:
    """Return a time in seconds; None if it is missing, and NaN if it is not a time."""
    if text is None or text.lower() in _MISSING_VALUES:
        return None
    try:
        seconds = float(text)
    except ValueError:
        if not _DURATION.fullmatch(text):
            return math.nan
        import pandas as pd

        try:
            seconds = pd.Timedelta(text).total_seconds()
        except ValueError:
            return math.nan
    return seconds if 0 <= seconds < math.inf else math.nan


def _composed(texts: pa.ChunkedArray) -> pa.ChunkedArray:
    """Compose letters with accents (NFC). `utf8_normalize` of pyarrow 25 leaves them decomposed."""
    coded = texts.combine_chunks().dictionary_encode()
    forms = [unicodedata.normalize("NFC", text) for text in coded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(forms, pa.string()).take(coded.indices)])


def _find_columns(source: str, columns: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """Choose the columns to read from the names in a table: {column in `COLUMNS`: name in table}.

    Raises:
        CorpusError: a column is missing or appears twice, or a column of times has an unknown name.
    """
    if not names:
        raise CorpusError(f"{source}: the table is empty")
    found: dict[str, str] = {}
    shown = printable(",".join(names))[:_SHOWN_LETTERS]  # long if the file is not a table
    for column, known in COLUMNS.items():
        wanted = (columns[column],) if column in columns else known
        matches = [[n for n in names if column_key(n) == column_key(want)] for want in wanted]
        same = next(filter(None, matches), [])
        if len(same) > 1:
            raise CorpusError(
                f"{source}: has the column {column_key(same[0])} twice, as {same[0]!r} and "
                f"{same[1]!r}; rename or remove one of them"
            )
        if same:
            found[column] = same[0]
        elif column in columns:
            raise CorpusError(
                f"{source}: has no column {columns[column]}, which --columns names as {column}; it "
                f"has {shown}"
            )
    is_time = re.compile(f"{_TIMES}|{_LENGTH}" if "start" in found else _TIMES).fullmatch
    unread = [n for n in names if is_time(n.strip().lower()) and n not in found.values()]
    if unread and not {"start", "end"} <= set(found):
        raise CorpusError(
            f"{source}: has the column {unread[0]}, so its rows seem to be segments of files. Use "
            "--columns to name the columns with the start and end in seconds, or remove this column"
        )
    if lacking := sorted(set(_REQUIRED) - set(found)):
        hint = "Use another column with --columns, as in --columns label=mood"
        if len(names) == 1:
            hint = "Separate the values by commas, semicolons, tabs or |"
        if lacking == ["speaker"] and "split" in found:
            hint = (
                f"If no speaker is in two parts of the column {found['split']}, use these parts as "
                f"speakers with --columns speaker={found['split']}"
            )
        raise CorpusError(
            f"{source}: no column {', '.join(lacking)}; the table needs path,label,speaker and may "
            f"have take,start,end,split, but it has {shown}. {hint}"
        )
    return found


def _ambiguous_columns(
    source: str, names: Sequence[str], found: Mapping[str, str], columns: Mapping[str, str]
) -> tuple[str, ...]:
    """Return a line for each column of the corpus that has two candidates in the table."""
    keys = {column_key(name): name for name in reversed(names)}
    lines = []
    for column, name in found.items():
        also = [keys[key] for key in COLUMNS[column] if keys.get(key, name) != name]
        if also and column not in columns:
            lines.append(
                f"{source}: the {column} is read from the column {name}, and not from {also[0]}; "
                f"--columns {column}={also[0]} reads the other column"
            )
    return tuple(lines)


def _refuse_missing(source: str, columns: dict[str, pa.ChunkedArray], words: set[str]) -> None:
    """Raise a CorpusError that lists the first rows with a missing value, if there are any."""
    missing = pa.array(sorted({*words, ""}))
    found: list[tuple[int, str, str]] = []
    for name, column in columns.items():
        lower = pc.utf8_lower(pc.fill_null(column, ""))
        for row in np.flatnonzero(pc.is_in(lower, value_set=missing).to_numpy()).tolist():
            found.append((row + 1, name, column[row].as_py() or ""))
    if not found:
        return
    shown = [
        f"row {row}{' (after the header)' if place == 0 else ''} has no {name}"
        + (f" ({value!r})" if value else "")
        + (f", for {path}" if name != "path" and (path := columns["path"][row - 1].as_py()) else "")
        for place, (row, name, value) in enumerate(sorted(found, key=lambda item: item[0]))
    ]
    hint = (
        ". If such a word is a value in your table, list the words that mean a missing value with "
        "--missing, or use --missing without words if there are none"
    )
    raise CorpusError(
        f"{source}: {shorten(shown, _SHOWN_ROWS)}; fill them in, or delete these rows"
        + (hint if any(value for _, _, value in found) else "")
    )
