"""Reads a corpus of another tool into one table, whose columns have that tool's names.

    JSON lines             EmoBox; also a folder of its folds, fold_1/*_test_fold_1.jsonl
    Parquet                any; also a Hugging Face data set, whose `audio` holds the recordings
    db.yaml                a folder of audformat, read by the package audformat
    wav.scp                a folder of Kaldi: utt2spk, utt2emo or text, segments
    *supervisions*.jsonl   a folder of lhotse, with the recordings beside the supervisions

`table` finds the columns that a corpus needs and checks them. Only tables are opened here.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.errors import CorpusError
from ser_ray.storage.packed import COLUMN, packed_location
from ser_ray.storage.paths import location_inside

Find = Callable[[list[str]], Mapping[str, str]]
"""Finds the corpus's columns among a table's names: {corpus column: name in the table}."""
Row = Mapping[str, Any]
FOLD = re.compile(r".*_(train|valid|test)_fold_?(\d+)\.jsonl")
SIDE = re.compile(r"(?:.*[-_.])?(train|validation|valid|dev|test)[-_.]")
"""Matches a file name that says to which part of a split its rows belong."""


def read_folder(source: str, filesystem: fs.FileSystem, path: str, find: Find) -> pa.Table | None:
    """Read the tables in a folder, or return None if it has none of these formats.

    Args:
        source: the folder, as the user wrote it.
        filesystem: where it is.
        path: its path there.
        find: chooses the columns.

    Raises:
        CorpusError: the tables contradict each other, or need a package that is not installed.
    """
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
        read_parquet(location_inside(source, name), filesystem, files[name], find)
        for name in parquets
    ]
    return pa.concat_tables(read, promote_options="permissive") if read else None


def _entries(filesystem: fs.FileSystem, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the paths of the files and of the folders in a folder, both by name."""
    entries = filesystem.get_file_info(fs.FileSelector(path))
    files = {entry.base_name: entry.path for entry in entries if entry.is_file}
    kind = fs.FileType.Directory
    return files, {entry.base_name: entry.path for entry in entries if entry.type == kind}


def read_json_lines(filesystem: fs.FileSystem, path: str) -> list[Row]:
    """Read a file of JSON objects, one per line, which may be compressed by gzip."""
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


def as_table(rows: Iterable[Row]) -> pa.Table:
    """Return a string column for every name in the rows; objects and lists are left out."""
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
    """Read the folds of EmoBox: the column `fold` says in which fold a recording is tested.

    If there is only one fold, the column says train, valid or test.
    """
    has_one = len({match[2] for name in tables if (match := FOLD.match(name))}) == 1
    rows: dict[str, Row] = {}
    for name in sorted(tables, key=lambda name: "_test_" in name):
        match = FOLD.match(name)
        assert match is not None
        for row in read_json_lines(filesystem, tables[name]):
            fold = match[2] if match[1] == "test" else "train"
            rows[str(row.get("key"))] = {**row, "fold": match[1] if has_one else fold}
    return as_table(rows.values())


def read_parquet(location: str, filesystem: fs.FileSystem, path: str, find: Find) -> pa.Table:
    """Read the columns that `find` chooses from a Parquet file.

    In a file of Hugging Face, numbers of a ClassLabel become its names, and a column `path` locates
    the recordings in `audio`. A file name such as train-00000-of-00001 gives the `split`.
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
    """Return where the recordings are: in the rows, or in files beside the Parquet file."""
    first = next(file.iter_batches(1, columns=[f"{COLUMN}.bytes"]), None)
    if first is not None and first[COLUMN].field("bytes")[0].is_valid:
        return [packed_location(location, row) for row in range(file.metadata.num_rows)]
    column = file.read([f"{COLUMN}.path"])[COLUMN].combine_chunks()
    return list(column.field("path").to_pylist())


def _read_kaldi(
    source: str, filesystem: fs.FileSystem, files: Mapping[str, str], find: Find
) -> pa.Table:
    """Read a data folder of Kaldi. Each file of utterance ids is a column of the file's name."""

    def read(name: str) -> dict[str, str]:
        with filesystem.open_input_file(files[name]) as file:
            lines = [line.split(maxsplit=1) for line in file.read().decode().splitlines()]
        return {line[0]: line[1].strip() for line in lines if len(line) == 2}

    scp = read("wav.scp")
    if pipe := next((name for name, path in scp.items() if path.endswith("|")), None):
        raise CorpusError(
            f"{source}/wav.scp: {pipe} is the output of a command, which is not run; write the "
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
    return as_table(
        {"path": scp.get(recording), "start": start, "end": None if end == "-1" else end}
        | {column: values.get(name) for column, values in columns.items()}
        for name, (recording, start, end) in segments.items()
    )


def _read_lhotse(source: str, filesystem: fs.FileSystem, files: Mapping[str, str]) -> pa.Table:
    """Read the recordings and supervisions of lhotse; a supervision is a clip."""
    rows = []
    for name in sorted(name for name in files if "supervisions" in name and ".jsonl" in name):
        beside = name.replace("supervisions", "recordings")
        if beside not in files:
            raise CorpusError(f"{source}: has {name}, but not {beside} with its recordings")
        recordings = {row["id"]: row for row in read_json_lines(filesystem, files[beside])}
        side = SIDE.match(name)
        for row in read_json_lines(filesystem, files[name]):
            recording = recordings.get(row["recording_id"], {"sources": [], "duration": 0.0})
            paths = [found["source"] for found in recording["sources"] if found["type"] == "file"]
            end = row["start"] + row["duration"]
            is_whole = row["start"] == 0 and abs(end - recording["duration"]) < 0.001
            times = {} if is_whole else {"start": row["start"], "end": round(end, 6)}
            split = {"split": side[1]} if side else {}
            custom = row.get("custom") or {}
            plain = {key: row[key] for key in row if key not in ("start", "custom")}
            rows.append({**custom, **plain, **split, **times, "path": (paths or [None])[0]})
    return as_table(rows)


def _read_audformat(source: str, path: str, find: Find) -> pa.Table:
    """Read a folder of audformat: the clips that have a label, with their split."""
    try:
        import audformat
    except ImportError as error:
        raise CorpusError(
            f"{source}: reading a folder of audformat needs its package: pip install audformat"
        ) from error
    if any(name.endswith(".pkl") for name in _entries(fs.LocalFileSystem(), path)[0]):
        raise CorpusError(
            f"{source}: has pickled tables, which can run code; save the database with "
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
