"""Lists the files below a folder or in a bucket, without opening them."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from ser_ray.storage.paths import NOT_UTF8, NULL_CHARACTER, as_utf8, filesystem_of, location_inside

DEVICE = "a device or pipe, not a file"
NO_FILE = "there is no such file"
FOLDER = "a folder, not a file"
_SYSTEM_FOLDERS = (
    "__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "#recycle",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file below a folder or in a table, or a folder that is named like a file."""

    inside: str
    """Path relative to the folder, with forward slashes."""
    location: str
    """Absolute path or URI of the file."""
    size: int | None
    """Bytes; None if unknown."""
    modified: int | None
    """Time of the last change in nanoseconds since 1970; None if unknown."""
    problem: str | None
    """Why the file cannot be opened; None if the listing shows no reason."""


def list_files(location: str) -> Iterator[ListedFile]:
    """Yield the files below a folder, in no particular order.

    A folder that is named like a file, such as `clip.wav`, is also yielded, with a problem. Hidden
    entries (`.DS_Store`, `._name.wav`) and folders of operating systems (`__MACOSX`) are skipped.

    Raises:
        OSError: the folder or a folder below it cannot be listed.
        ConfigError: as `filesystem_of`.
    """
    filesystem, root = filesystem_of(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _list_local(root)
    else:
        yield from _list_remote(filesystem, location, root)


def names_inside(location: str) -> tuple[list[str], list[str]]:
    """Return the names of the files and of the folders in a folder.

    Hidden entries and system folders are skipped, as in `list_files`.

    Raises:
        OSError: the folder cannot be listed.
        ConfigError: as `filesystem_of`.
    """
    filesystem, root = filesystem_of(location)
    if isinstance(filesystem, fs.LocalFileSystem):  # pyarrow fails if a name is not UTF-8
        with os.scandir(root) as entries:
            # Unlike `entry.is_dir()`, `Path.is_dir` does not fail if a link leads to itself.
            found = [(as_utf8(entry.name), Path(entry.path).is_dir()) for entry in entries]
    else:
        infos = filesystem.get_file_info(fs.FileSelector(root))
        found = [(info.base_name, info.type == fs.FileType.Directory) for info in infos]
    found = [(name, is_folder) for name, is_folder in found if not _is_skipped(name)]
    files = [name for name, is_folder in found if not is_folder]
    return files, [name for name, is_folder in found if is_folder]


def _list_local(root: str) -> Iterator[ListedFile]:
    """List a local folder, following links except to a folder that contains the link.

    pyarrow's recursive listing is not used, because it skips dangling links, never ends if a folder
    links to itself, and fails if any name is not UTF-8.
    """
    pending: list[tuple[str, tuple[os.stat_result, ...]]] = [(root, ())]
    while pending:
        folder, outer_folders = pending.pop()
        open_folders = (*outer_folders, Path(folder).stat())
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_skipped(entry.name):
                    continue
                status, problem = stat_file(entry.path)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    if not any(os.path.samestat(status, outer) for outer in open_folders):
                        pending.append((entry.path, open_folders))
                    if "." not in entry.name:
                        continue
                size, modified = None, None
                if status is not None and problem is None:
                    size, modified = status.st_size, status.st_mtime_ns
                inside = entry.path.removeprefix(root).lstrip("/")
                yield ListedFile(as_utf8(inside), as_utf8(entry.path), size, modified, problem)


def stat_file(path: str) -> tuple[os.stat_result | None, str | None]:
    """Return the status of a path, and why it cannot be opened as a file.

    The status is None if it cannot be read. The reason is None if the path is that of a file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - Path objects are slow for a million files
    except FileNotFoundError:
        return None, "a link to nothing" if os.path.islink(path) else NO_FILE  # noqa: PTH114
    except OSError as error:  # such as a link to itself
        return None, error.strerror or str(error)
    except ValueError:
        return None, NULL_CHARACTER if as_utf8(path) == path else NOT_UTF8
    if stat.S_ISDIR(status.st_mode):
        return status, FOLDER
    if not stat.S_ISREG(status.st_mode):
        return status, DEVICE
    return status, None if as_utf8(path) == path else NOT_UTF8


def find_local(path: str) -> str:
    """Return a path in the Unicode normal forms in which it exists, or unchanged if it does not.

    Operating systems write accented letters in different normal forms, so a path in a table that
    was written on one system may not be found on another. The folders and the file may differ in
    their forms.
    """
    if path.isascii() or os.path.lexists(path):
        return path
    found = ""
    for place, name in enumerate(path.split("/")):
        forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
        paths = [f"{found}/{form}" if place else form for form in forms]
        exists = (form for form in paths if form == "" or os.path.lexists(form))
        if (one := next(exists, None)) is None:
            return path
        found = one
    return found


def _list_remote(filesystem: fs.FileSystem, location: str, root: str) -> Iterator[ListedFile]:
    """List a bucket or any other remote folder in one call."""
    for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        inside = entry.path.removeprefix(root).strip("/")
        if any(_is_skipped(name) for name in inside.split("/")):
            continue
        if entry.is_file or "." in entry.base_name:
            modified, problem = (entry.mtime_ns, None) if entry.is_file else (None, FOLDER)
            uri = location_inside(location, inside)
            yield ListedFile(inside, uri, entry.size, modified, problem)


def _is_skipped(name: str) -> bool:
    return name.startswith(".") or name in _SYSTEM_FOLDERS
