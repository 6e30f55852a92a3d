"""Paths and URIs: the one place where a location becomes a filesystem.

A location is a local path or any URI that pyarrow or fsspec opens (`s3://`, `gs://`, `file://`,
`memory://`). Everything the program reads or writes goes through `filesystem_of`, every folder of
clips through `list_files`.
"""

import os
import re
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from ser_ray.errors import ConfigError, LocationError

_BUCKET_SCHEMES = ("s3", "gs", "gcs")
_PERCENT_ENCODED = (*_BUCKET_SCHEMES, "file", "abfs", "abfss", "hdfs", "viewfs")  # pyarrow's own
_PASSWORD = re.compile(r"://[^/?#@:]*:(?!\d+[/?#])[^@]+@")
"""`://user:password@`; keys of S3 may hold slashes, and `://host:9000/` is a port."""


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a location and the path inside it.

    Local paths are made absolute, so that a Ray worker in another directory opens the same file.

    Raises:
        LocationError: no filesystem opens the URI.
        ConfigError: it holds a password.
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
        raise LocationError(f"{location}: cannot be opened ({_first_line(error)})") from error


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
        raise LocationError(
            f"{location}: no filesystem opens this location ({_first_line(error)})"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def absolute(location: str) -> str:
    """Make a local path absolute; a URI is as it is."""
    return location if "://" in location else str(Path(location).expanduser().absolute())


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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
