"""Paths and URIs: the one place where a location becomes a filesystem.

A location is a local path or any URI that pyarrow or fsspec opens (`s3://`, `gs://`, `file://`,
`memory://`). Everything the program reads or writes goes through `filesystem_of`, every folder of
clips through `list_files`.
"""

import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from ser_ray.errors import ConfigError

_BUCKET_SCHEMES = ("s3", "gs", "gcs")
_PERCENT_ENCODED = (*_BUCKET_SCHEMES, "file", "abfs", "abfss", "hdfs", "viewfs")  # pyarrow's own
_PASSWORD = re.compile(r"://[^/?#@:]*:(?!\d+[/?#])[^@]+@")
"""`://user:password@`; keys of S3 may hold slashes, and `://host:9000/` is a port."""
DEVICE = "a device or pipe, not a file"
_LEFT_BY_SYSTEMS = ("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information")


@dataclass(frozen=True, slots=True)
class ListedFile:
    """One entry below a folder that is a file, or is named like one."""

    inside: str
    """Path relative to the folder, with forward slashes."""
    location: str
    """Local path or URI that `filesystem_of` opens, on any machine that sees the folder."""
    size: int | None
    """Bytes, where the listing says."""
    problem: str | None
    """Why it cannot be opened, in words; None for a file."""


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a location and the path inside it.

    Local paths are made absolute, so that a Ray worker in another directory opens the same file.

    Raises:
        ConfigError: no filesystem opens the URI, or it holds a password.
    """
    if "://" not in location:
        return fs.LocalFileSystem(), str(Path(location).expanduser().absolute())
    refuse_password(location)
    if location.startswith(tuple(f"{scheme}://" for scheme in _BUCKET_SCHEMES)):
        location = location.replace("#", "%23")  # a key may hold it, and has no fragment
    parts = urlsplit(location)
    try:
        if parts.scheme in _BUCKET_SCHEMES:
            bucket = parts.netloc.rpartition("@")[2]
            path = f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")
            return _bucket_filesystem(parts.scheme, parts.netloc, parts.query), path
        return fs.FileSystem.from_uri(location)
    except (ValueError, NotImplementedError):
        return _fsspec_filesystem(location)
    except OSError as error:
        raise ConfigError(f"{location}: cannot be opened ({_first_line(error)})") from error


def refuse_password(location: str) -> None:
    """Refuse what would be written into every manifest, shard and run that names the location."""
    for link in location.split("::"):  # fsspec's chains: simplecache::ftp://...
        if _PASSWORD.search(link):
            raise ConfigError(
                f"{link.partition('://')[0]}://...: a location must not hold a password or secret "
                "key; give it to the filesystem by its environment (AWS_SECRET_ACCESS_KEY for s3)"
            )


@lru_cache(maxsize=32)
def _bucket_filesystem(scheme: str, authority: str, query: str) -> fs.FileSystem:
    """One client for all objects of a bucket: building it takes 13 ms, and it keeps connections."""
    return fs.FileSystem.from_uri(f"{scheme}://{authority}?{query}")[0]


def _fsspec_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(
            f"{location}: no filesystem opens this location ({_first_line(error)})"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def absolute(location: str) -> str:
    """Make a local path absolute; a URI is as it is."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


@contextmanager
def atomic_write(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    """Yield where to write a file, in one go, that is then at `path` as a whole or not at all.

    An object in a bucket is by itself; a rename there would be a copy and a deletion.
    """
    if filesystem.type_name in ("s3", "gcs"):
        yield path
        return
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        filesystem.move(temporary, path)
    except OSError:
        with suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def list_files(location: str) -> Iterator[ListedFile]:
    """Yield every file below a folder, in no particular order and without opening any.

    Folders named like a file (with an extension) are yielded too, with a problem. Hidden entries
    (`.DS_Store`, `._name.wav`) and what systems leave behind (`__MACOSX`) are not.

    Raises:
        OSError: the folder or one below it cannot be listed.
        ConfigError: no filesystem opens the location.
    """
    filesystem, root = filesystem_of(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield from _list_local(root)
    else:
        yield from _list_remote(filesystem, location, root)


def _list_local(root: str) -> Iterator[ListedFile]:
    """Walk local folders, following links, but into no folder that the walk is already inside.

    pyarrow's own recursive listing leaves out dangling links, does not end in a folder linked into
    itself, and fails as a whole on one name that is not UTF-8.
    """
    waiting: list[tuple[str, tuple[os.stat_result, ...]]] = [(root, ())]
    while waiting:
        folder, above = waiting.pop()
        inside = (*above, Path(folder).stat())
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_junk(entry.name):
                    continue
                status, problem = stat_file(entry.path)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    if not any(os.path.samestat(status, outer) for outer in inside):
                        waiting.append((entry.path, inside))
                    if "." not in entry.name:
                        continue
                size = status.st_size if status is not None and problem is None else None
                below = entry.path.removeprefix(root).lstrip("/")
                yield ListedFile(_as_utf8(below), _as_utf8(entry.path), size, problem)


def stat_file(path: str) -> tuple[os.stat_result | None, str | None]:
    """What a local path leads to, links followed, and why that is no file that can be opened."""
    try:
        status = os.stat(path)  # noqa: PTH116 - a million Path objects cost more than the calls
    except FileNotFoundError:
        return None, "a link to nothing" if os.path.islink(path) else "there is no such file"  # noqa: PTH114
    except (OSError, ValueError) as error:  # a link to itself, for one; a zero byte
        return None, getattr(error, "strerror", None) or str(error)
    if stat.S_ISDIR(status.st_mode):
        return status, "a folder, not a file"
    if not stat.S_ISREG(status.st_mode):
        return status, DEVICE
    try:
        path.encode()
    except UnicodeEncodeError:
        return status, "the path is not UTF-8: rename it"
    return status, None


def _as_utf8(path: str) -> str:
    r"""Spell bytes that are not UTF-8 as \xff, for such a path cannot stand in a table."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _list_remote(filesystem: fs.FileSystem, location: str, root: str) -> Iterator[ListedFile]:
    """List a bucket or any other remote folder in one call."""
    for entry in filesystem.get_file_info(fs.FileSelector(root, recursive=True)):
        inside = entry.path.removeprefix(root).strip("/")
        if any(_is_junk(name) for name in inside.split("/")):
            continue
        if entry.is_file:
            yield ListedFile(inside, location_inside(location, inside), entry.size, None)
        elif "." in entry.base_name:
            problem = "a folder, not a file"
            yield ListedFile(inside, location_inside(location, inside), None, problem)


def location_inside(folder: str, path: str) -> str:
    """The location of the relative `path` in a folder, whose URI query or chain it keeps."""
    if "://" not in folder:
        return os.path.normpath(os.path.join(folder, path))  # noqa: PTH118 - as `stat_file`
    before, after = _split_uri(folder)
    while path.startswith("../"):
        before, path = before.rstrip("/").rpartition("/")[0], path.removeprefix("../")
    if urlsplit(folder).scheme in _PERCENT_ENCODED:
        path = quote(path)
    return f"{before.rstrip('/')}/{path}{after}"


def folder_of(location: str) -> str:
    """The location of the folder that holds a file."""
    if "://" not in location:
        return str(Path(location).expanduser().absolute().parent)
    before, after = _split_uri(location)
    return before.rpartition("/")[0] + after


def _split_uri(location: str) -> tuple[str, str]:
    """Split a URI after its path, before pyarrow's `?region=...` or fsspec's `::file://...`."""
    mark = "?" if urlsplit(location).scheme in _PERCENT_ENCODED else "::"
    before, mark, after = location.partition(mark)
    return before, mark + after


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BY_SYSTEMS


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
