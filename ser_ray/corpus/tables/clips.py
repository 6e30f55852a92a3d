"""Finds the files of the clips in a custom corpus's table.

A clip is a file, or a segment of a file between the times `start` and `end`. `columns.read_table`
reads the rows, and `list_table` turns them into rows of the manifest. Paths may have backslashes or
begin with `~`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.tables.files import FOLDER
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.storage.listing import NO_FILE, ListedFile, find_local, stat_file
from ser_ray.storage.packed import ROW
from ser_ray.storage.paths import location_inside, refuse_password

NO_FOLDER = "its folder does not exist"
OTHER_DRIVE = "a Windows path, which does not exist here"
MISSING_FILES = (NO_FILE, NO_FOLDER, OTHER_DRIVE)
"""The reasons that mean that a file does not exist."""
_FOLDERS_TRIED = 5
_FILE_URI = re.compile(r"file:(//(localhost)?)?(?=/)", re.IGNORECASE)
"""Matches the beginning of a URI of a local file, before its path."""


def list_table(source: str, folder: str, rows: pa.Table) -> dict[str, object]:
    """Find the files of the clips, and return the manifest's columns for them.

    Args:
        source: the table, as the user wrote it.
        folder: the folder of the corpus. Relative paths start here, or in the folder below it that
            the column `files.FOLDER` names. If a local folder has none of the files, relative paths
            start at the nearest of the four folders above it that has one of them.
        rows: the clips, from `columns.read_table`.

    Raises:
        CorpusError: a take or clip has two labels or speakers, or a path has a password in it.
    """
    paths = rows["path"].to_pylist()
    insides = rows[FOLDER].to_pylist() if FOLDER in rows.column_names else [""] * len(rows)
    keys = list(zip(insides, paths, strict=True))
    distinct = dict.fromkeys(keys)
    starts = {}
    for inside in dict.fromkeys(insides):
        own_paths = [path for name, path in distinct if name == inside]
        own_folder = location_inside(folder, inside) if inside else folder
        starts[inside] = _start_of_paths(own_folder, own_paths)
    files = {key: _find_file(folder, starts[key[0]], key[1]) for key in distinct}
    found = [files[key] for key in keys]
    locations = [file.location for file in found]
    for row, location in enumerate(locations, start=1):
        try:
            refuse_password(location)
        except ConfigError as error:
            raise CorpusError(f"{source}, row {row} (after the header): {error}") from error
    if "take" not in rows.column_names:
        rows = rows.append_column("take", [_default_takes(rows, found)])
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


def _default_takes(rows: pa.Table, files: Sequence[ListedFile]) -> list[str]:
    """Return a take for each row: the path without its suffix, and the times of a segment."""
    takes = []
    columns = files, rows["start"].to_pylist(), rows["end"].to_pylist()
    for file, start, end in zip(*columns, strict=True):
        take = file.inside if ROW in file.inside else os.path.splitext(file.inside)[0]  # noqa: PTH122
        if start is not None:
            take += f" {start}-{'end' if end is None else end}"
        takes.append(take)
    return takes


def _start_of_paths(folder: str, paths: list[str]) -> str:
    """Return the folder at which relative paths start: `folder`, or one of the four above it."""
    if "://" in folder:
        return folder
    first_paths = [path for path in paths[:1000] if "://" not in path]
    for start in [folder, *map(str, Path(folder).parents)][:_FOLDERS_TRIED]:
        if any(_exists(start, path) for path in first_paths):
            return start
    return folder


def _find_file(corpus: str, folder: str, path: str) -> ListedFile:
    """Find a file by its path in the table, which starts at `folder`, in or above the corpus."""
    path, mark, row = path.partition(ROW)
    if uri := _FILE_URI.match(path):
        path = unquote(path[uri.end() :])
    location, is_windows_path = path, False
    if "://" not in path:
        exists = _exists(folder, path)
        is_windows_path = not exists and re.match(r"[A-Za-z]:[\\/]|\\\\", path) is not None
        if not is_windows_path:
            # Backslashes in a relative path are from Windows, unless they are in the file's name.
            path = os.path.normpath(path if exists else path.replace("\\", "/"))
            location = os.path.expanduser(path)  # noqa: PTH111 - a million Path objects are slow
            if not os.path.isabs(location):  # noqa: PTH117
                location = location_inside(folder, location)
    status, problem = None, None
    if "://" not in location:
        location = find_local(location)
        status, problem = stat_file(location)
    if problem == NO_FILE and is_windows_path:
        problem = OTHER_DRIVE
    elif problem == NO_FILE and not os.path.isdir(os.path.dirname(location)):  # noqa: PTH112, PTH120
        problem = NO_FOLDER
    below = f"{folder.removeprefix(corpus).strip('/')}/" if folder.startswith(f"{corpus}/") else ""
    inside = below + path.removeprefix(f"{folder}/") + mark + row
    location += mark + row
    if status is None or problem:
        return ListedFile(inside, location, None, None, problem)
    return ListedFile(inside, location, status.st_size, status.st_mtime_ns, None)


def _exists(folder: str, path: str) -> bool:
    return "://" not in folder and os.path.lexists(find_local(location_inside(folder, path)))


def _require_one(
    source: str, rows: pa.Table, key: Literal["take", "clip"], column: Literal["speaker", "label"]
) -> None:
    """Raise a CorpusError if a take or clip has two speakers or two labels."""
    counts = rows.group_by(key, use_threads=False).aggregate([(column, "count_distinct")])
    mixed = counts.filter(pc.greater(counts[f"{column}_count_distinct"], 1))
    if len(mixed) == 0:
        return
    name = mixed[key][0].as_py()
    shown = name.rstrip("\n").replace("\n", " ")  # `clip_keys` joins by line breaks
    numbers = np.flatnonzero(pc.equal(rows[key], name).to_numpy())
    values = rows[column].take(numbers).to_pylist()
    other = next(i for i, value in enumerate(values) if value != values[0])
    hint = (
        "; a take is one performance. The column take names it, or else the path without its suffix"
    )
    raise CorpusError(
        f"{source}: rows {numbers[0] + 1} and {numbers[other] + 1} (after the header) are one "
        f"{key}, {shown!r}, but their {column} is {values[0]!r} and {values[other]!r}"
        + (hint if key == "take" else "")
    )


def clip_keys(rows: pa.Table) -> pa.ChunkedArray:
    """Join the path, start and end of each row of a table or manifest to one key."""
    times = [pc.fill_null(rows[name].cast("string"), "") for name in ("start", "end")]
    return pc.binary_join_element_wise(rows["path"], *times, "\n")
