"""Listing a folder, bucket or table as a manifest: one row for each file named like a clip.

RAVDESS is recognised by its file names alone, in any layout: the unpacked archives of Zenodo, the
Kaggle archive with its second copy, one flat folder. Other corpora come as a CSV or Parquet table
with the columns `path,label,speaker` and optionally `take`. No clip is opened here. A file whose
outcome is known without opening it already has its `status` and `reason`.
"""

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from pyarrow import fs

from ser_ray.corpus.ravdess import (
    EMOTIONS,
    EXAMPLE_NAME,
    SUFFIXES,
    ClipName,
    NameProblem,
    parse_name,
)
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.storage.listing import DEVICE, ListedFile, list_files, stat_file
from ser_ray.storage.paths import filesystem_of, folder_of, location_inside, refuse_password

SYNTHETIC_MARKER = "SYNTHETIC.txt"
"""A file of this name marks a corpus folder whose clips are synthetic."""

MANIFEST_SCHEMA = pa.schema(
    {
        "path": pa.string(),  # absolute path or URI, which every worker can open
        "size": pa.int64(),  # bytes; null where the listing does not say
        "modality": pa.string(),  # av | video | audio
        "channel": pa.string(),  # speech | song; null for tables, like intensity to repetition
        "emotion": pa.string(),  # the label
        "intensity": pa.string(),  # normal | strong
        "statement": pa.int8(),
        "repetition": pa.int8(),
        "speaker": pa.string(),
        "sex": pa.string(),  # male | female; null for tables
        "take": pa.string(),  # the performance: equal for its wav and its mp4s
        "status": pa.string(),  # one of `PRE_DECODE`; null for a file to decode
        "reason": pa.string(),  # explains the status
    }
)
PRE_DECODE = ("unreadable", "name_not_understood", "duplicate", "excluded")
"""The outcomes that are known before a clip is opened."""

_NAME_FIELDS = MANIFEST_SCHEMA.names[2:-2]
_TABLE_COLUMNS = ("path", "label", "speaker", "take")
_TABLE_SUFFIXES = (".csv", ".parquet")
_LISTING_BATCH = 65_536  # files held as Python objects at a time


@dataclass(frozen=True)
class Corpus:
    """A listed corpus."""

    name: Literal["ravdess", "synthetic", "table"]
    """Real RAVDESS, the synthetic corpus with the same names, or the user's own corpus."""
    root: str
    """The folder, bucket or table, as the user wrote it."""
    labels: tuple[str, ...]
    """The label set; the position of a label is its class index."""
    manifest: pa.Table
    """`MANIFEST_SCHEMA`, sorted by path."""


def list_corpus(source: str) -> Corpus:
    """List a folder or URI that holds RAVDESS in any layout, or a `.csv` or `.parquet` table.

    In a folder every `.wav` and `.mp4` (any case) becomes a row. Other files and hidden ones, such
    as the `._name.wav` of macOS, are ignored.

    Raises:
        CorpusError: the location does not exist, no clip in it is recognised, or a table
            contradicts itself.
        ConfigError: no filesystem opens the location.
    """
    filesystem, path = filesystem_of(source)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise CorpusError(f"{source}: this folder or table does not exist; check the path")
        if kind == fs.FileType.Directory:
            is_synthetic = _is_in_synthetic(filesystem, path)
            name: Literal["synthetic", "ravdess"] = "synthetic" if is_synthetic else "ravdess"
            return Corpus(name, source, EMOTIONS, _list_folder(source, is_synthetic))
        if not path.lower().endswith(_TABLE_SUFFIXES):
            raise CorpusError(
                f"{source}: neither a folder nor a .csv or .parquet table; unpack an archive first"
            )
        rows = _read_table(source, filesystem, path)
    except OSError as error:
        raise CorpusError(f"{source}: cannot be listed ({error})") from error
    labels = tuple(sorted(pc.unique(rows["label"]).to_pylist()))
    return Corpus("table", source, labels, _list_table(source, rows))


def exclude(manifest: pa.Table, include: Iterable[str]) -> pa.Table:
    """Mark the rows to be decoded whose modality is not in `include` as `excluded`."""
    wanted = sorted(set(include))
    is_wanted = pc.is_in(manifest["modality"], value_set=pa.array(wanted))
    left_out = pc.and_(pc.is_null(manifest["status"]), pc.invert(is_wanted))
    return _with_status(manifest, left_out, "excluded", f"only {','.join(wanted)} is included")


# --- RAVDESS: labels from file names ---


def _is_in_synthetic(filesystem: fs.FileSystem, path: str) -> bool:
    """Whether a folder, or a folder above it, is marked as a synthetic corpus."""
    folders = [path]
    if isinstance(filesystem, fs.LocalFileSystem):  # in a bucket, only the folder may be readable
        folders += map(str, PurePosixPath(path).parents)
    markers = [f"{folder.rstrip('/')}/{SYNTHETIC_MARKER}" for folder in folders]
    return any(found.is_file for found in filesystem.get_file_info(markers))


def _list_folder(source: str, is_synthetic: bool) -> pa.Table:
    """List a folder of RAVDESS names: `MANIFEST_SCHEMA`, sorted by path."""
    others: Counter[str] = Counter()
    clips = _only_clips(source, others, is_synthetic=is_synthetic)
    batches = []
    while batch := list(itertools.islice(clips, _LISTING_BATCH)):
        batches.append(_read_names(batch))
    table = pa.concat_tables(batches).sort_by("path") if batches else None
    if table is None or table["modality"].null_count == len(table):
        raise _nothing_recognised(source, table, others)
    manifest = table.select(MANIFEST_SCHEMA.names)
    return _mark_duplicates(manifest, table["name"], table["depth"], "has the file name of ")


def _only_clips(source: str, others: Counter[str], *, is_synthetic: bool) -> Iterator[ListedFile]:
    """Yield the files that are named like clips, and count the others by extension.

    Raises:
        CorpusError: an entry that may be a folder cannot be read, such as a link to a disk that is
            not mounted; or there are synthetic clips among others.
    """
    for file in list_files(source):
        extension = os.path.splitext(file.inside)[1].lower()  # noqa: PTH122 - a million of them
        if extension in SUFFIXES:
            yield file
        elif file.problem is None:
            if not is_synthetic and file.inside.endswith(f"/{SYNTHETIC_MARKER}"):
                folder = file.inside.removesuffix(f"/{SYNTHETIC_MARKER}")
                raise CorpusError(
                    f"{source}: {folder} in it has synthetic clips, which must not be mistaken for "
                    "RAVDESS: give one of the two folders"
                )
            others[extension or "without extension"] += 1
        elif not extension and file.problem != DEVICE:
            raise CorpusError(
                f"{file.location}: {file.problem}; if it should be a folder, its clips would be "
                "missing: repair it or remove it"
            )


def _read_names(files: list[ListedFile]) -> pa.Table:
    """Return one row per file: `MANIFEST_SCHEMA`, and its name and depth for finding copies."""
    names = [file.inside.rpartition("/")[2] for file in files]
    clips: list[ClipName | None] = []
    statuses: list[str | None] = []
    reasons: list[str | None] = []
    for file, name in zip(files, names, strict=True):
        clip, status, reason = None, None, None
        try:
            clip = parse_name(name)
        except NameProblem as problem:
            status, reason = "name_not_understood", str(problem)
        if file.problem is not None:
            status, reason = "unreadable", file.problem
        clips.append(clip)
        statuses.append(status)
        reasons.append(reason)
    columns = {field: [getattr(clip, field, None) for clip in clips] for field in _NAME_FIELDS}
    columns |= {"path": [f.location for f in files], "size": [f.size for f in files]}
    columns |= {"status": statuses, "reason": reasons}
    table = pa.Table.from_pydict(columns, MANIFEST_SCHEMA)
    depths = [file.inside.count("/") for file in files]
    return table.append_column("name", pa.array([n.lower() for n in names])).append_column(
        "depth", pa.array(depths, pa.int32())
    )


def _nothing_recognised(source: str, table: pa.Table | None, others: Counter[str]) -> CorpusError:
    found = [f"{count} {extension}" for extension, count in others.most_common(5)]
    if table is not None:
        first = table.slice(0, 1).to_pylist()[0]
        found.insert(0, f"{len(table)} .wav or .mp4, the first {first['path']}: {first['reason']}")
    hint = " Unpack the archives first." if ".zip" in others else ""
    return CorpusError(
        f"{source}: has no RAVDESS clip (found: {'; '.join(found) or 'no files'}). RAVDESS "
        f"files are named like {EXAMPLE_NAME}; other corpora need a .csv or .parquet table with "
        f"the columns path,label,speaker.{hint}"
    )


# --- own corpora: labels from a table ---


def _read_table(source: str, filesystem: fs.FileSystem, path: str) -> pa.Table:
    """Read string columns `path,label,speaker` and perhaps `take`, without empty values."""
    try:
        with filesystem.open_input_file(path) as file:
            if path.lower().endswith(".csv"):
                # As text, because speaker 01 would otherwise be read as the number 1.
                as_text = pa.csv.ConvertOptions(
                    column_types=dict.fromkeys(_TABLE_COLUMNS, "string")
                )
                table = pa.csv.read_csv(file, convert_options=as_text)
            else:
                table = pa.parquet.read_table(file)
        given = [name for name in _TABLE_COLUMNS if name in table.column_names]
        if missing := {"path", "label", "speaker"} - set(given):
            raise CorpusError(
                f"{source}: no column {', '.join(sorted(missing))}; the table needs "
                f"path,label,speaker and may have take, but it has {','.join(table.column_names)}"
            )
        columns = {name: pc.utf8_trim_whitespace(table[name].cast("string")) for name in given}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowKeyError, KeyError) as error:
        raise CorpusError(
            f"{source}: the table cannot be read ({error}); save it again with one header row"
        ) from error
    if len(table) == 0:
        raise CorpusError(f"{source}: the table has no rows")
    for name, column in columns.items():
        empty = pc.equal(pc.fill_null(column, ""), "")
        if pc.any(empty).as_py():
            row = pc.index(empty, True).as_py() + 1
            raise CorpusError(f"{source}: row {row} (after the header) has no {name}")
    return pa.table(columns)


def _list_table(source: str, rows: pa.Table) -> pa.Table:
    """List the files of a table: `MANIFEST_SCHEMA`, sorted by path."""
    given = [path if "://" in path else os.path.normpath(path) for path in rows["path"].to_pylist()]
    if "take" not in rows.column_names:
        takes = pa.array([os.path.splitext(path)[0] for path in given])  # noqa: PTH122
        rows = rows.append_column("take", takes)
    folder = folder_of(source)
    paths = [
        path if "://" in path or os.path.isabs(path) else location_inside(folder, path)  # noqa: PTH117
        for path in given
    ]
    _refuse_passwords(source, paths)
    rows = rows.set_column(rows.column_names.index("path"), "path", pa.array(paths))
    for column in ("speaker", "label"):
        _require_one(source, rows, "take", column)
        _require_one(source, rows, "path", column)
    seen = [(None, None) if "://" in path else stat_file(path) for path in paths]
    for row, (path, (status, problem)) in enumerate(zip(paths, seen, strict=True), start=1):
        if problem and status is None and not os.path.isdir(os.path.dirname(path)):  # noqa: PTH112, PTH120
            raise CorpusError(
                f"{source}: row {row} (after the header): the folder of {path} does not exist; "
                "paths are relative to the folder of the table"
            )
    nothing = pa.nulls(len(rows))
    columns = dict.fromkeys(MANIFEST_SCHEMA.names, nothing) | {
        "path": rows["path"],
        "size": [status.st_size if status and not problem else None for status, problem in seen],
        "modality": ["audio"] * len(rows),
        "emotion": rows["label"],
        "speaker": rows["speaker"],
        "take": rows["take"],
        "status": ["unreadable" if problem else None for _, problem in seen],
        "reason": [problem for _, problem in seen],
    }
    manifest = pa.table(columns).cast(MANIFEST_SCHEMA).sort_by("path")
    same = pa.array(np.zeros(len(rows), np.int32))
    return _mark_duplicates(manifest, manifest["path"], same, "the table lists it before: ")


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


# --- both ---


def _mark_duplicates(
    manifest: pa.Table, keys: pa.ChunkedArray, depths: pa.ChunkedArray, reason: str
) -> pa.Table:
    """Keep one of the rows to decode that have the same key, and mark the others as duplicates.

    The largest file is kept, because a copy may be truncated. Among files of equal size the one
    with the fewest folders above it is kept, and among those the first by path.
    """
    rows = np.flatnonzero(pc.is_null(manifest["status"]).to_numpy())
    columns = {"key": keys, "size": manifest["size"], "depth": depths}
    ranked = pa.table({name: column.take(rows) for name, column in columns.items()} | {"row": rows})
    ranked = ranked.sort_by(
        [("key", "ascending"), ("size", "descending"), ("depth", "ascending"), ("row", "ascending")]
    )
    rows, keys = ranked["row"].to_numpy(), ranked["key"].combine_chunks()
    is_copy = np.zeros(len(rows), bool)
    is_copy[1:] = pc.equal(keys[1:], keys[:-1]).to_numpy(zero_copy_only=False)
    kept = rows[np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(rows))))]
    mask = np.zeros(len(manifest), bool)
    mask[rows[is_copy]] = True
    original = np.arange(len(manifest))
    original[rows] = kept
    paths = manifest["path"].take(original)
    reasons = pc.binary_join_element_wise(reason, paths, "")
    return _with_status(manifest, pa.array(mask), "duplicate", reasons)


def _with_status(
    manifest: pa.Table, mask: pa.Array, status: str, reason: str | pa.ChunkedArray
) -> pa.Table:
    """Set the status and reason of the rows where the mask is true."""
    for name, value in (("status", status), ("reason", reason)):
        column = pc.if_else(mask, value, manifest[name])
        manifest = manifest.set_column(manifest.schema.get_field_index(name), name, column)
    return manifest
