"""Reads a table of any format, or a folder of another tool's tables, as one Arrow table.

    text                   separated by commas, semicolons, tabs or |; UTF-8, UTF-16, Windows-1252
    JSON lines             EmoBox; also a folder of its folds, fold_1/*_test_fold_1.jsonl
    Parquet                any; also Hugging Face data sets, with recordings in the column `audio`
    db.yaml                a folder of audformat, read by the package audformat
    wav.scp                a folder of Kaldi: utt2spk, utt2emo or text, segments
    *supervisions*.jsonl   a folder of lhotse, which also has *recordings*.jsonl

The columns keep their names; `table` chooses the columns that a corpus needs. No recording is
opened here.
"""

import codecs
import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.corpus.words import COLUMNS
from ser_ray.errors import CorpusError
from ser_ray.storage.packed import COLUMN, packed_location
from ser_ray.storage.paths import absolute, location_inside

TEXT_SUFFIXES = (".csv", ".tsv", ".tab", ".txt")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz")
TABLE_SUFFIXES = (*TEXT_SUFFIXES, ".parquet", *JSON_SUFFIXES)
Find = Callable[[Sequence[str]], Mapping[str, str]]
"""Chooses the columns to read from the names in a table: {column in `COLUMNS`: name in table}."""
Row = Mapping[str, Any]
_SEPARATORS = (",", ";", "\t", "|")
FOLD = re.compile(r".*_(train|valid|test)_fold_?(\d+)\.jsonl")
SIDE = re.compile(r"(?:.*[-_.])?(train|validation|valid|dev|test)[-_.]")
"""Matches a file name that contains the side of its rows."""


def read_any(
    source: str, filesystem: fs.FileSystem, path: str, find: Find, wanted: set[str]
) -> tuple[pa.Table | None, tuple[str, ...]]:
    """Read a table or a folder of tables.

    Args:
        source: the table or folder, as the user wrote it.
        filesystem: the filesystem of the source.
        path: the path of the source on it.
        find: chooses the columns.
        wanted: names of columns that the user gave.

    Returns:
        The table, or None if the folder has no tables of these formats; and lines for the user.

    Raises:
        CorpusError: the tables contradict each other, or need a package that is not installed.
    """
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        return _read_folder(source, filesystem, path, find), ()
    if path.lower().endswith(".parquet"):
        return _read_parquet(absolute(source), filesystem, path, find), ()
    if path.lower().endswith(JSON_SUFFIXES):
        return _as_table(_read_json_lines(filesystem, path)), ()
    with filesystem.open_input_file(path) as file:
        text, notes = _decode(source, file.read())
    return _parse(source, text, wanted), notes


def _read_folder(source: str, filesystem: fs.FileSystem, path: str, find: Find) -> pa.Table | None:
    """Read the tables in a folder, or return None if it has none of these formats."""
    files, folders = _entries(filesystem, path)
    if "db.yaml" in files:
        return _read_audformat(source, path, find)
    if "wav.scp" in files:
        return _read_kaldi(source, filesystem, files, find)
    if any("supervisions" in name and ".jsonl" in name for name in files):
        return _read_lhotse(source, filesystem, files)
    folds = [_entries(filesystem, folders[name])[0] for name in folders if name.startswith("fold")]
    if tables := {name: file for fold in folds for name, file in fold.items() if FOLD.match(name)}:
        return _read_folds(filesystem, tables)
    if "data" in folders and not any(name.endswith(".parquet") for name in files):
        inner = _entries(filesystem, folders["data"])[0]
        files = {f"data/{name}": file for name, file in inner.items()}
    parquets = sorted(name for name in files if name.endswith(".parquet"))
    read = [
        _read_parquet(location_inside(source, name), filesystem, files[name], find)
        for name in parquets
    ]
    return pa.concat_tables(read, promote_options="permissive") if read else None


def _decode(source: str, data: bytes) -> tuple[str, tuple[str, ...]]:
    """Decode a text table; also return a line for the user if the encoding was guessed."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif b"\0" in data[:1000]:
        encodings = ["utf-16-be" if data[:1] == b"\0" else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", "cp1252"]
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        notes = (f"{source}: is not UTF-8, and was read as Windows-1252",)
        return text, notes if encoding == "cp1252" else ()
    raise CorpusError(
        f"{source}: the table cannot be read: it is not text in UTF-8, UTF-16 or Windows-1252; "
        "save it again as UTF-8"
    )


def _parse(source: str, text: str, wanted: set[str]) -> pa.Table:
    """Parse separated values; the separator is the one that yields the most known columns."""
    text = text.lstrip("\r\n")
    if declared := re.match(r"sep=.\r?\n", text):  # Excel's own first line
        text = text[declared.end() :]
    if not text.strip():
        raise CorpusError(f"{source}: the table is empty")
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    rows = {separator: next(csv.reader([header], delimiter=separator)) for separator in _SEPARATORS}
    known = {column_key(name) for names in (*COLUMNS.values(), wanted) for name in names}
    num_known = {mark: len(known & set(map(column_key, names))) for mark, names in rows.items()}
    separator = max(rows, key=lambda mark: (num_known[mark], len(rows[mark])))
    names = rows[separator]
    numbered = [f"column {number}" for number in range(len(names))]
    table = pa.csv.read_csv(
        io.BytesIO(text.encode()),
        pa.csv.ReadOptions(column_names=numbered, skip_rows=1),
        pa.csv.ParseOptions(delimiter=separator, newlines_in_values=True),
        # All as text: otherwise speaker 01 becomes the number 1.
        pa.csv.ConvertOptions(column_types=dict.fromkeys(numbered, pa.string())),
    )
    return table.rename_columns(names)


def column_key(name: str) -> str:
    """Return a column's name in lower case, without blanks around it."""
    return name.strip().lower()


def _entries(filesystem: fs.FileSystem, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files and the folders in a folder: {name: path} for each."""
    entries = filesystem.get_file_info(fs.FileSelector(path))
    files = {entry.base_name: entry.path for entry in entries if entry.is_file}
    kind = fs.FileType.Directory
    return files, {entry.base_name: entry.path for entry in entries if entry.type == kind}


def _read_json_lines(filesystem: fs.FileSystem, path: str) -> list[Row]:
    """Read a file of JSON objects, one per line. A file named .gz is decompressed."""
    with filesystem.open_input_file(path) as file:
        data = file.read()
    text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
    rows: list[Row] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            rows.append(row)
    return rows


def _as_table(rows: Iterable[Row]) -> pa.Table:
    """Make a table with a string column for every name, except names of objects and lists."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if not any(isinstance(value, dict | list) for value in values):
            texts = [None if value is None else str(value) for value in values]
            columns[name] = pa.array(texts, pa.string())
    return pa.table(columns)


def _read_folds(filesystem: fs.FileSystem, tables: Mapping[str, str]) -> pa.Table:
    """Read the folds of EmoBox; the column `fold` is the number of the fold that tests a row.

    If there is only one fold, the column `fold` is train, valid or test.
    """
    has_one = len({match[2] for name in tables if (match := FOLD.match(name))}) == 1
    rows: dict[str, Row] = {}
    for name in sorted(tables, key=lambda name: "_test_" in name):
        match = FOLD.match(name)
        assert match is not None
        for row in _read_json_lines(filesystem, tables[name]):
            fold = match[2] if match[1] == "test" else "train"
            rows[str(row.get("key"))] = {**row, "fold": match[1] if has_one else fold}
    return _as_table(rows.values())


def _read_parquet(location: str, filesystem: fs.FileSystem, path: str, find: Find) -> pa.Table:
    """Read the columns that `find` chooses from a Parquet file.

    A file of Hugging Face gets a column `path`, with the locations of the recordings in `audio`,
    and a column `split` if its name is like train-00000-of-00001. The numbers of a ClassLabel
    become names.
    """
    with pq.ParquetFile(path, filesystem=filesystem) as file:
        schema = file.schema_arrow
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = info.get("info", {}).get("features", {})
        audio = schema.field(COLUMN).type if COLUMN in schema.names else None
        is_packed = audio is not None and pa.types.is_struct(audio)
        side = SIDE.match(path.rpartition("/")[2]) if is_packed else None
        made = (["path"] if is_packed else []) + (["split"] if side else [])
        names = [name for name in schema.names if not (is_packed and name == COLUMN)]
        added = [name for name in made if name not in names]
        chosen = list(dict.fromkeys(find([*names, *added]).values()))
        table = file.read([name for name in chosen if name not in added])
        if "path" in added:
            table = table.append_column("path", pa.array(_packed_paths(location, file)))
    if side and "split" in added:
        table = table.append_column("split", pa.array([side[1]] * len(table)))
    for name in table.column_names:
        if classes := (features.get(name) or {}).get("names"):
            numbers = table[name].to_pylist()
            known = [
                None if n is None or not 0 <= n < len(classes) else classes[n] for n in numbers
            ]
            index = table.column_names.index(name)
            table = table.set_column(index, name, pa.array(known, pa.string()))
    return table


def _packed_paths(location: str, file: pq.ParquetFile) -> list[str | None]:
    """Return the locations of the recordings, which are in the rows or in separate files."""
    first = next(file.iter_batches(1, columns=[f"{COLUMN}.bytes"]), None)
    if first is not None and first[COLUMN].field("bytes")[0].is_valid:
        return [packed_location(location, row) for row in range(file.metadata.num_rows)]
    column = file.read([f"{COLUMN}.path"])[COLUMN].combine_chunks()
    return list(column.field("path").to_pylist())


def _read_kaldi(
    source: str, filesystem: fs.FileSystem, files: Mapping[str, str], find: Find
) -> pa.Table:
    """Read a data folder of Kaldi; each file of lines `UTTERANCE VALUE` is a column."""

    def read(name: str) -> dict[str, str]:
        with filesystem.open_input_file(files[name]) as file:
            lines = [line.split(maxsplit=1) for line in file.read().decode().splitlines()]
        return {line[0]: line[1].strip() for line in lines if len(line) == 2}

    scp = read("wav.scp")
    if pipe := next((name for name, path in scp.items() if path.endswith("|")), None):
        raise CorpusError(
            f"{source}/wav.scp: {pipe} is a command, and commands are not run; write the "
            "recordings into files first"
        )
    label = "utt2emo" if "utt2emo" in files else "text"
    others = {{"utt2spk": "speaker", label: "label"}.get(name, name): name for name in files}
    found = find(["path", "start", "end", *others])
    columns = {name: read(others[name]) for name in found.values() if name in others}
    segments: dict[str, tuple[str, str | None, str | None]] = {
        name: (name, None, None) for name in scp
    }
    if "segments" in files:
        parts = {name: text.split() for name, text in read("segments").items()}
        segments = {name: (part[0], part[1], part[2]) for name, part in parts.items()}
    return _as_table(
        {"path": scp.get(recording), "start": start, "end": None if end == "-1" else end}
        | {column: values.get(name) for column, values in columns.items()}
        for name, (recording, start, end) in segments.items()
    )


def _read_lhotse(source: str, filesystem: fs.FileSystem, files: Mapping[str, str]) -> pa.Table:
    """Read the recordings and supervisions of lhotse; each supervision is a clip."""
    rows = []
    for name in sorted(name for name in files if "supervisions" in name and ".jsonl" in name):
        beside = name.replace("supervisions", "recordings")
        if beside not in files:
            raise CorpusError(f"{source}: has {name}, but not {beside} with its recordings")
        recordings = {row["id"]: row for row in _read_json_lines(filesystem, files[beside])}
        side = SIDE.match(name)
        for row in _read_json_lines(filesystem, files[name]):
            recording = recordings.get(row["recording_id"], {"sources": [], "duration": 0.0})
            paths = [found["source"] for found in recording["sources"] if found["type"] == "file"]
            end = row["start"] + row["duration"]
            is_whole = row["start"] == 0 and abs(end - recording["duration"]) < 0.001
            times = {} if is_whole else {"start": row["start"], "end": round(end, 6)}
            split = {"split": side[1]} if side else {}
            custom = row.get("custom") or {}
            plain = {key: row[key] for key in row if key not in ("start", "custom")}
            rows.append({**custom, **plain, **split, **times, "path": (paths or [None])[0]})
    return _as_table(rows)


def _read_audformat(source: str, path: str, find: Find) -> pa.Table:
    """Read a folder of audformat: the labelled clips and their splits."""
    try:
        import audformat
    except ImportError as error:
        raise CorpusError(
            f"{source}: a folder of audformat needs the package audformat: pip install audformat"
        ) from error
    if any(name.endswith(".pkl") for name in _entries(fs.LocalFileSystem(), path)[0]):
        raise CorpusError(
            f"{source}: has pickled tables, which can run code; save the database with the "
            "storage_format csv or parquet, and delete the files *.pkl"
        )
    database = audformat.Database.load(path)
    tables = [column for table in database.tables.values() for column in table.columns]
    labels = [key for scheme in database.schemes.values() if isinstance(scheme.labels, dict)
              for value in scheme.labels.values() if isinstance(value, dict)
              for key in value]  # fmt: skip
    names = list(dict.fromkeys([*database.schemes, *tables, *labels]))
    chosen = find(["file", "start", "end", "split", *names])
    wanted = [name for name in chosen.values() if name in names]
    label = chosen["label"]
    frame = database.get(label, [name for name in wanted if name != label])
    frame = frame.set_axis(audformat.utils.to_segmented_index(frame.index))
    sides = {}
    for split, kind in ((name, item.type) for name, item in database.splits.items()):
        inside = database.get(label, splits=split)
        for key in audformat.utils.to_segmented_index(inside.index):
            sides[key] = kind
    table = pa.Table.from_pandas(
        frame.reset_index().astype({"file": "string"}), preserve_index=False
    )
    return table.append_column(
        "split", pa.array([sides.get(key) for key in frame.index], pa.string())
    )
