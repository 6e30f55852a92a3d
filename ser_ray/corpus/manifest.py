"""Lists a folder, bucket or table as a manifest: one row for each recording or segment.

RAVDESS is recognised by its file names alone (`ravdess.names`), in any layout: the archives of
Zenodo, the Kaggle archive, which has every file twice, or one flat folder. Other corpora need a
table (`tables`). No recording is decoded here. If the outcome of a file is known from the listing,
its row already has a `status` and a `reason`.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ser_ray.corpus.audio_files import describe_left_out, is_recording, suffix_of
from ser_ray.corpus.ravdess.names import EMOTIONS, EXAMPLE_NAME, ClipName, NameProblem, parse_name
from ser_ray.corpus.tables.clips import clip_keys, list_table
from ser_ray.corpus.tables.columns import read_table
from ser_ray.corpus.tables.files import TABLE_SUFFIXES
from ser_ray.corpus.words import MISSING_WORDS, CorpusKind
from ser_ray.errors import CorpusError
from ser_ray.storage.listing import DEVICE, ListedFile, list_files
from ser_ray.storage.paths import absolute, as_utf8, filesystem_of, folder_of

SYNTHETIC_MARKER = "SYNTHETIC.txt"
"""A file of this name marks a corpus folder whose clips are synthetic."""

MANIFEST_SCHEMA = pa.schema(
    {
        "path": pa.string(),  # absolute path or URI, which every worker can open
        "size": pa.int64(),  # bytes; null if unknown
        "modified": pa.int64(),  # nanoseconds since 1970; null if unknown
        "start": pa.float64(),  # start of the segment in seconds; null for a complete file
        "end": pa.float64(),  # end of the segment in seconds; null for the end of the file
        "modality": pa.string(),  # av | video | audio
        "channel": pa.string(),  # speech | song; null for tables
        "emotion": pa.string(),  # the label
        "intensity": pa.string(),  # normal | strong; null for tables
        "statement": pa.int8(),  # null for tables
        "repetition": pa.int8(),  # null for tables
        "speaker": pa.string(),
        "sex": pa.string(),  # male | female; null for tables
        "take": pa.string(),  # the performance: equal for its wav and its mp4s
        "split": pa.string(),  # train | validation | test, or a fold; null for RAVDESS
        # unreadable | name_not_understood | duplicate | excluded; null for a file to decode
        "status": pa.string(),
        "reason": pa.string(),  # explains the status
    }
)
ORDER = [(name, "ascending") for name in ("path", "start", "end")]
"""The order of the rows. The segments of a file are consecutive."""
SAME_NAME = "has the file name of "
"""Begins the `reason` of a duplicate in a folder; the path of the file that is used follows."""

_NAME_FIELDS = [*(field.name for field in dataclasses.fields(ClipName)), "sex", "take"]


@dataclass(frozen=True)
class Corpus:
    """A listed corpus."""

    name: CorpusKind
    """The kind of corpus. The synthetic corpus has the same file names as RAVDESS."""
    root: str
    """The folder, bucket or table, as the user wrote it."""
    labels: tuple[str, ...]
    """The label set; the position of a label is its class index."""
    manifest: pa.Table
    """A table with the columns of `MANIFEST_SCHEMA`, sorted by `ORDER`."""
    notes: tuple[str, ...]
    """Lines for the user about the listing."""


def list_corpus(
    source: str,
    missing: Iterable[str] = MISSING_WORDS,
    columns: Mapping[str, str] | None = None,
) -> Corpus:
    """List RAVDESS in a folder or bucket, in any layout, or the clips of a table.

    Every recording in a folder of RAVDESS becomes a row, and the notes count the other files.
    Hidden files, such as `._name.wav` of macOS, are ignored.

    Args:
        source: folder, URI or table.
        missing: words that mean a missing value in a table, in upper or lower case.
        columns: {column of the corpus (`words.COLUMNS`): name in the table}.

    Raises:
        CorpusError: the location does not exist or cannot be read, has no RAVDESS clip, or is a
            table that is incomplete or contradicts itself.
        ConfigError: as `filesystem_of`.
    """
    filesystem, path = filesystem_of(source)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == fs.FileType.NotFound:
            raise CorpusError(f"{source}: this folder or table does not exist; check the path")
        is_folder = kind == fs.FileType.Directory
        if not is_folder and not path.lower().endswith(TABLE_SUFFIXES):
            raise CorpusError(
                f"{source}: is neither a folder nor a table ({', '.join(TABLE_SUFFIXES)}); unpack "
                "an archive first, or save a spreadsheet as .csv"
            )
        read = read_table(source, missing, columns or {})
        if read is None:
            return _list_ravdess(source, _is_in_synthetic(filesystem, path))
    except OSError as error:
        where = as_utf8(os.fsdecode(error.filename)) if error.filename else source
        reason = error.strerror or str(error)
        raise CorpusError(f"{where}: cannot be listed ({reason})") from error
    rows, notes = read
    labels = tuple(sorted(pc.unique(rows["label"]).to_pylist()))
    folder = absolute(source) if is_folder else folder_of(source)
    null_columns = dict.fromkeys(MANIFEST_SCHEMA.names, pa.nulls(len(rows)))
    listed = pa.table(null_columns | list_table(source, folder, rows)).cast(MANIFEST_SCHEMA)
    listed = listed.sort_by(ORDER)
    keys = clip_keys(listed).to_pylist()
    manifest = _mark_duplicates(listed, keys, "the table lists it before: ")
    return Corpus("table", source, labels, manifest, notes)


def exclude(manifest: pa.Table, include: Iterable[str]) -> pa.Table:
    """Set the status `excluded` in rows that have no status and a modality outside `include`."""
    included = sorted(set(include))
    is_included = pc.is_in(manifest["modality"], value_set=pa.array(included))
    is_excluded = pc.and_(pc.is_null(manifest["status"]), pc.invert(is_included))
    return _with_status(manifest, is_excluded, "excluded", f"only {','.join(included)} is included")


# --- RAVDESS: labels from file names ---


def _is_in_synthetic(filesystem: fs.FileSystem, path: str) -> bool:
    """Return whether a folder is a synthetic corpus or inside one."""
    folders = [path]
    if isinstance(filesystem, fs.LocalFileSystem):  # in a bucket, they may be unreadable
        folders += map(str, PurePosixPath(path).parents)
    markers = [f"{folder.rstrip('/')}/{SYNTHETIC_MARKER}" for folder in folders]
    return any(info.is_file for info in filesystem.get_file_info(markers))


def _list_ravdess(source: str, is_synthetic: bool) -> Corpus:
    """List a folder, and read the labels from RAVDESS's file names."""
    others: Counter[str] = Counter()
    recordings = list(_only_recordings(source, others, is_synthetic))
    recordings.sort(key=lambda file: file.location)
    rows = list(map(_row_of, recordings))
    notes = [describe_left_out(others)] if others else []
    if not any("modality" in row for row in rows):
        if rows:
            first = f"{rows[0]['path']} ({rows[0]['reason']})"
            notes.insert(0, f"{len(rows)} recordings; the first is {first}")
        raise CorpusError(
            f"{source}: has no RAVDESS clip (found: {'; '.join(notes) or 'no files'}). RAVDESS "
            f"files are named like {EXAMPLE_NAME}; other corpora need a table with the columns "
            "path,label,speaker"
            + (", given by its own path" if set(TABLE_SUFFIXES) & set(others) else "")
        )
    manifest = pa.Table.from_pylist(rows, MANIFEST_SCHEMA)
    names = [_name_of(file).lower() for file in recordings]
    manifest = _mark_duplicates(manifest, names, SAME_NAME)
    name: CorpusKind = "synthetic" if is_synthetic else "ravdess"
    return Corpus(name, source, EMOTIONS, manifest, tuple(notes))


def _only_recordings(source: str, others: Counter[str], is_synthetic: bool) -> Iterator[ListedFile]:
    """Yield the recordings, and count the other files by suffix.

    Raises:
        CorpusError: an entry cannot be read and may be a folder, such as a link to a disk that is
            not mounted; or a folder inside `source` is a synthetic corpus.
    """
    for file in list_files(source):
        if is_recording(file):
            yield file
        elif file.problem is None:
            if _name_of(file) == SYNTHETIC_MARKER:
                if is_synthetic:
                    continue
                folder = file.inside.removesuffix(f"/{SYNTHETIC_MARKER}")
                raise CorpusError(
                    f"{source}: its folder {folder} has synthetic clips, which must not be mixed "
                    f"with RAVDESS; move {folder} elsewhere, or use it alone"
                )
            others[suffix_of(file.inside)] += 1
        elif not suffix_of(file.inside) and file.problem != DEVICE:
            raise CorpusError(
                f"{file.location}: {file.problem}; if this should be a folder, its clips would "
                "be missing, so repair it or remove it"
            )


def _row_of(file: ListedFile) -> dict[str, Any]:
    """Return the row of a file, with the columns of `MANIFEST_SCHEMA` that are known."""
    row: dict[str, Any] = {"path": file.location, "size": file.size, "modified": file.modified}
    try:
        clip = parse_name(_name_of(file))
        row |= {field: getattr(clip, field) for field in _NAME_FIELDS}
    except NameProblem as problem:
        row |= {"status": "name_not_understood", "reason": str(problem)}
    if file.problem is not None:
        row |= {"status": "unreadable", "reason": file.problem}
    return row


def _name_of(file: ListedFile) -> str:
    return file.inside.rpartition("/")[2]


# --- copies of files ---


def _mark_duplicates(manifest: pa.Table, keys: Sequence[str], reason: str) -> pa.Table:
    """Keep one of the rows with the same key, and give the others the status `duplicate`.

    Rows that have a status are ignored. The largest file is kept, because a copy may be truncated.
    Among files of equal size, the one with the fewest folders above it is kept, then the first one.

    Args:
        manifest: the listed files.
        keys: a key for each row.
        reason: begins the reason of a duplicate; the path of the kept file follows.
    """
    depths = pc.count_substring(manifest["path"], "/").to_numpy()
    ranked = np.lexsort((depths, -pc.fill_null(manifest["size"], -1).to_numpy()))  # best first
    kept: dict[str, int] = {}
    originals = np.arange(len(manifest))
    for row in ranked[pc.is_null(manifest["status"]).to_numpy()[ranked]].tolist():
        originals[row] = kept.setdefault(keys[row], row)
    is_copy = pa.array(originals != np.arange(len(manifest)))
    reasons = pc.binary_join_element_wise(reason, manifest["path"].take(originals), "")
    return _with_status(manifest, is_copy, "duplicate", reasons)


def _with_status(
    manifest: pa.Table, mask: pa.Array, status: str, reason: str | pa.ChunkedArray
) -> pa.Table:
    """Set the status and the reason in the rows where the mask is true."""
    for name, value in (("status", status), ("reason", reason)):
        manifest = replace_column(manifest, name, pc.if_else(mask, value, manifest[name]))
    return manifest


def replace_column(table: pa.Table, name: str, column: pa.Array | pa.ChunkedArray) -> pa.Table:
    """Return the table with `column` instead of its column `name`."""
    return table.set_column(table.schema.get_field_index(name), name, column)
