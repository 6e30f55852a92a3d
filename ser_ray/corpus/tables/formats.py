"""Reads a table of any format, or a folder of tables, as one Arrow table.

    text                   separated by commas, semicolons, tabs or |; UTF-8, -16, -32, Windows-1252
    JSON lines             any table; EmoBox also has a folder of folds, fold_1/*_test_fold_1.jsonl
    Parquet                any table, or data sets of Hugging Face with recordings in a column
    db.yaml                a folder of audformat, read by the package audformat
    wav.scp                a folder of Kaldi: utt2spk, utt2emo or text, segments
    *supervisions*.jsonl   lhotse, with *recordings*.jsonl in the same folder; also *cuts*.jsonl
    *_train.csv, ...       nkululeko: a text or JSON file for each part of the split
    metadata.csv, .jsonl   a folder of recordings for Hugging Face's datasets
    train, dev, test       a folder for each part of the split, in any of these formats

The columns keep their names, except as `tools` says; `columns` chooses those that a corpus needs.
Recordings are not decoded here.
"""

from collections.abc import Sequence
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ser_ray.corpus.tables.files import (
    FOLDER,
    JSON_SUFFIXES,
    TEXT_SUFFIXES,
    FindColumns,
    as_table,
    as_texts,
    read_json_lines,
    read_parquet,
    read_text,
)
from ser_ray.corpus.tables.tools import (
    FOLD,
    is_lhotse,
    read_audformat,
    read_folds,
    read_kaldi,
    read_lhotse,
)
from ser_ray.corpus.words import PARTS, part_of_file
from ser_ray.errors import CorpusError
from ser_ray.storage.listing import names_inside
from ser_ray.storage.paths import filesystem_of, folder_of, location_inside

TableAndNotes = tuple[pa.Table | None, tuple[str, ...]]
"""A table, or None if a folder has no table; and lines for the user."""
_METADATA = ("metadata.csv", "metadata.jsonl")
"""The names of the table in Hugging Face's folders of recordings."""


def read_any(location: str, find: FindColumns) -> TableAndNotes:
    """Read a table or a folder of tables.

    Args:
        location: path or URI of the table or folder.
        find: chooses the columns to read, as in `files`.

    Returns:
        The table, or None if the folder has no tables of these formats; and lines for the user.

    Raises:
        CorpusError: the table lacks a column, needs a package that is not installed, or has content
            that the functions of `files` and `tools` refuse.
        pa.ArrowException, LookupError, ValueError, TypeError, OSError, csv.Error: the table is
            damaged, or the tables of a folder contradict each other.
    """
    filesystem, path = filesystem_of(location)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        return _read_folder(location, find)
    name = path.rpartition("/")[2]
    if name.lower().endswith(".parquet"):
        return read_parquet(location, find), ()
    if is_lhotse(name):
        folder = folder_of(location)
        recordings = [other for other in names_inside(folder)[0] if "recordings" in other]
        return read_lhotse(folder, [*recordings, name]), ()
    if name.lower().endswith(JSON_SUFFIXES):
        return as_table(read_json_lines(location)), ()
    return read_text(location, find)


def _read_folder(location: str, find: FindColumns) -> TableAndNotes:
    """Read the tables in a folder. The first format whose files are in the folder is used."""
    inside = partial(location_inside, location)
    files, folders = names_inside(location)
    if "db.yaml" in files:
        return read_audformat(location, files, find), ()
    if "wav.scp" in files:
        return read_kaldi(location, files, find), ()
    if any(map(is_lhotse, files)):
        return read_lhotse(location, files), ()
    folds = [name for name in folders if name.startswith("fold")]
    found = [f"{fold}/{name}" for fold in folds for name in names_inside(inside(fold))[0]]
    if tables := {name: inside(name) for name in found if FOLD.match(name)}:
        return read_folds(tables), ()
    parquets = [name for name in files if name.lower().endswith(".parquet")]
    texts = [name for name in files if name.lower().endswith((*TEXT_SUFFIXES, *JSON_SUFFIXES))]
    part_of = {name: part_of_file(name) for name in sorted(parquets or texts)}
    if parquets or len(set(filter(None, part_of.values()))) > 1:
        used = [name for name, part in part_of.items() if part or parquets]
        ignored = [name for name in part_of if name not in used]
        note = f"{location}: {', '.join(used)} were read, and {', '.join(ignored)} were not"
        return _concatenate(
            [(read_any(inside(name), find), part_of[name]) for name in used],
            find,
            (note,) if ignored else (),
        )
    for name in _METADATA:
        if name in files:
            return read_any(inside(name), find)
    if {"dataset_dict.json", "dataset_info.json"} & set(files):
        raise CorpusError(
            f"{location}: was written by save_to_disk, whose Arrow files are not read; write the "
            "data set with to_parquet instead, with each split in a file such as train-0.parquet"
        )
    return _read_parts(location, folders, find)


def _read_parts(location: str, folders: Sequence[str], find: FindColumns) -> TableAndNotes:
    """Read the tables in the folders that are named like a part of the split, or `data`."""
    tables = []
    for name in sorted(folders):
        part = PARTS.get(name.lower())
        if part is None and name != "data":
            continue
        table, notes = _read_folder(location_inside(location, name), find)
        if table is not None and FOLDER in table.column_names:  # the tables are in folders in it
            below = pc.binary_join_element_wise(name, table[FOLDER], "/")
            table = table.set_column(table.column_names.index(FOLDER), FOLDER, below)
        elif table is not None:
            table = table.append_column(FOLDER, pa.array([name] * len(table), pa.string()))
        tables.append(((table, notes), part))
    return _concatenate(tables, find)


def _concatenate(
    tables_and_parts: list[tuple[TableAndNotes, str | None]],
    find: FindColumns,
    notes: tuple[str, ...] = (),
) -> TableAndNotes:
    """Concatenate tables.

    A table that is one part of the split gets a column `split`, if it has none. The columns that
    `find` chooses are renamed to their names in the first table that has them.
    """
    tables = []
    names: dict[str, str] = {}
    for (table, more_notes), part in tables_and_parts:
        notes += more_notes
        if table is None:
            continue
        if part and "split" not in table.column_names:
            table = table.append_column("split", pa.array([part] * len(table), pa.string()))
        columns = dict(zip(table.column_names, table.columns, strict=True))
        chosen: dict[str, pa.ChunkedArray] = {}
        for column, name in find(table.column_names).items():
            chosen[names.setdefault(column, name)] = as_texts(name, columns.pop(name))
        tables.append(pa.table(columns | chosen))
    return pa.concat_tables(tables, promote_options="permissive") if tables else None, notes
