"""Reads a table of any format, or a folder of tables, as one Arrow table.

    text                   separated by commas, semicolons, tabs or |; UTF-8, UTF-16, Windows-1252
    JSON lines             EmoBox; also a folder of its folds, fold_1/*_test_fold_1.jsonl
    Parquet                any; also Hugging Face data sets, with the recordings in a column
    db.yaml                a folder of audformat, read by the package audformat
    wav.scp                a folder of Kaldi: utt2spk, utt2emo or text, segments
    *supervisions*.jsonl   lhotse, with the recordings beside the supervisions; also *cuts*.jsonl
    *_train.csv, ...       text or JSON lines of which each file is one side, as nkululeko has them
    train, dev, test       folders that are one side each, of any of these formats

The columns keep their names; `table` chooses the columns that a corpus needs. No recording is
opened here.
"""

import pyarrow as pa
from pyarrow import fs

from ser_ray.corpus.table_files import (
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    Find,
    as_table,
    read_json_lines,
    read_parquet,
    read_text,
)
from ser_ray.corpus.table_tools import (
    FOLD,
    is_lhotse,
    read_audformat,
    read_folds,
    read_kaldi,
    read_lhotse,
)
from ser_ray.corpus.words import SIDES, side_of_file
from ser_ray.errors import CorpusError
from ser_ray.storage.paths import absolute, folder_of, location_inside

Read = tuple[pa.Table | None, tuple[str, ...]]
"""A table, or None if a folder has none, and lines for the user."""
_METADATA = ("metadata.csv", "metadata.jsonl")
"""The tables of Hugging Face's folders of recordings."""


def read_any(
    source: str, filesystem: fs.FileSystem, path: str, find: Find, wanted: set[str]
) -> Read:
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
        return _read_folder(source, filesystem, path, find, wanted)
    name = path.rpartition("/")[2]
    if name.lower().endswith(".parquet"):
        return read_parquet(absolute(source), filesystem, path, find), ()
    if is_lhotse(name):
        beside = _entries(filesystem, folder_of(path))[0] if "supervisions" in name else {}
        recordings = {other: file for other, file in beside.items() if "recordings" in other}
        return read_lhotse(source, filesystem, {**recordings, name: path}), ()
    if name.lower().endswith(JSON_SUFFIXES):
        return as_table(read_json_lines(filesystem, path)), ()
    return read_text(source, filesystem, path, find, wanted)


def _read_folder(
    source: str, filesystem: fs.FileSystem, path: str, find: Find, wanted: set[str]
) -> Read:
    """Read the tables in a folder."""
    files, folders = _entries(filesystem, path)
    if "db.yaml" in files:
        return read_audformat(source, filesystem, files, find), ()
    if "wav.scp" in files:
        return read_kaldi(source, filesystem, files, find), ()
    if any(map(is_lhotse, files)):
        return read_lhotse(source, filesystem, files), ()
    folds = [_entries(filesystem, folders[name])[0] for name in folders if name.startswith("fold")]
    if tables := {name: file for fold in folds for name, file in fold.items() if FOLD.match(name)}:
        return read_folds(filesystem, tables), ()
    parquets = [name for name in files if name.endswith(".parquet")]
    sides = {name: side_of_file(name) for name in sorted(parquets or _texts(files))}
    if parquets or len(set(filter(None, sides.values()))) > 1:
        chosen = {name: side for name, side in sides.items() if side or parquets}
        read = [
            (read_any(location_inside(source, name), filesystem, files[name], find, wanted), side)
            for name, side in chosen.items()
        ]
        ignored = [name for name in sides if name not in chosen]
        text = f"{source}: {', '.join(chosen)} were read, and {', '.join(ignored)} were not"
        return _join(read, (text,) if ignored else ())
    for name in _METADATA:
        if name in files:
            return read_any(location_inside(source, name), filesystem, files[name], find, wanted)
    if {"dataset_dict.json", "dataset_info.json"} & files.keys():
        raise CorpusError(
            f"{source}: was written by save_to_disk, whose Arrow files are not read; write the "
            "data set with to_parquet instead, and each split to a file such as train-0.parquet"
        )
    inner = {name: SIDES.get(name.lower()) for name in folders}
    found = []
    for name in sorted(name for name, side in inner.items() if side or name == "data"):
        place = location_inside(source, name)
        found.append((_read_folder(place, filesystem, folders[name], find, wanted), inner[name]))
    return _join(found)


def _texts(files: dict[str, str]) -> list[str]:
    return [name for name in files if name.lower().endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES))]


def _join(parts: list[tuple[Read, str | None]], notes: tuple[str, ...] = ()) -> Read:
    """Join tables, each of which is one side if it is named after one."""
    tables = []
    for (table, told), side in parts:
        notes += told
        if table is not None and side and "split" not in table.column_names:
            table = table.append_column("split", pa.array([side] * len(table), pa.string()))
        tables += [] if table is None else [table]
    return pa.concat_tables(tables, promote_options="permissive") if tables else None, notes


def _entries(filesystem: fs.FileSystem, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the files and the folders in a folder: {name: path} for each."""
    entries = filesystem.get_file_info(fs.FileSelector(path))
    files = {entry.base_name: entry.path for entry in entries if entry.is_file}
    kind = fs.FileType.Directory
    return files, {entry.base_name: entry.path for entry in entries if entry.type == kind}
