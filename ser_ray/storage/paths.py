"""Locations: local paths, and URIs that pyarrow or fsspec can open (`s3://`, `gs://`, `memory://`).

Every location that may be a path or a URI is opened with `filesystem_of`.
"""

import getpass
import hashlib
import os
import re
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from pyarrow import fs

from ser_ray.errors import ConfigError, LocationError, first_line

NOT_UTF8 = "the path is not UTF-8; rename the file or folder"
NULL_CHARACTER = "a path cannot contain a null character"
TEMPORARY_BYTES = 100_000_000
"""Free disk space for temporary files: two copies of a ResNet18 of 45 MB."""
_BUCKET_SCHEMES = ("s3", "gs", "gcs")
# Schemes that pyarrow opens. It decodes percent-encoded paths, and fsspec, which opens all other
# schemes, does not.
_PERCENT_ENCODED = (*_BUCKET_SCHEMES, "file", "abfs", "abfss", "hdfs", "viewfs")
_PASSWORD = re.compile(r"://[^/?#@:]*:(?!\d+[/?#])[^@]+@")
"""Matches `://user:password@`, but not the port in `://host:9000/`. A password may have slashes, as
S3's secret keys may."""


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem of a location and the path inside it.

    A local path becomes absolute, because Ray workers have other working directories.

    Raises:
        LocationError: no filesystem can open the URI, or the home folder `~` is not known.
        ConfigError: the location contains a password, or is not UTF-8.
    """
    if as_utf8(location) != location:
        raise ConfigError(f"{as_utf8(location)}: {NOT_UTF8}")
    if "://" not in location:
        return fs.LocalFileSystem(), absolute(location)
    refuse_password(location)
    scheme = _scheme_of(location)
    try:
        if scheme in _BUCKET_SCHEMES:
            parts = urlsplit(location.replace("#", "%23"))  # `#` is part of a key
            bucket = parts.netloc.rpartition("@")[2]
            path = f"{bucket}/{unquote(parts.path).strip('/')}".rstrip("/")
            return _bucket_filesystem(scheme, parts.netloc, parts.query), path
        return fs.FileSystem.from_uri(location)
    except (OSError, ValueError, NotImplementedError) as error:
        is_invalid = scheme in _BUCKET_SCHEMES and isinstance(error, ValueError)
        if is_invalid or isinstance(error, OSError):
            raise LocationError(f"{location}: cannot be opened ({first_line(error)})") from error
        return _fsspec_filesystem(location)


def read_file(location: str) -> bytes:
    """Return the content of a file.

    Raises:
        OSError: the file cannot be read.
        ConfigError: as `filesystem_of`.
    """
    filesystem, path = filesystem_of(location)
    with filesystem.open_input_file(path) as file:
        return bytes(file.read())


def is_storage_failure(error: OSError, location: str) -> bool:
    """Return whether pyarrow raised an error because the storage failed, not because of damage.

    For damaged content, pyarrow raises an OSError without a number. For a bucket, such an error may
    also be temporary, so it counts as a failure of the storage.
    """
    return bool(error.errno) or "://" in location


def as_utf8(path: str) -> str:
    r"""Replace bytes that are not UTF-8 by text like `\xff`, because tables store only UTF-8."""
    try:
        return os.fsencode(path).decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which a path cannot contain
        return path.encode(errors="backslashreplace").decode()


def printable(text: str) -> str:
    r"""Escape characters that cannot be printed; a line break in a file name becomes `\n`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse_password(location: str) -> None:
    """Raise a ConfigError if a location has a password, because files and MLflow show locations."""
    for part in location.split("::"):  # fsspec's chains: simplecache::ftp://...
        if _PASSWORD.search(part):
            raise ConfigError(
                f"{part.partition('://')[0]}://...: a location must not have a password or secret "
                "key in it; set it in the environment instead (AWS_SECRET_ACCESS_KEY for s3)"
            )


@lru_cache(maxsize=32)
def _bucket_filesystem(scheme: str, authority: str, query: str) -> fs.FileSystem:
    """Return the client of a bucket. The result is cached, because making a client takes 13 ms."""
    return fs.FileSystem.from_uri(f"{scheme}://{authority}?{query}")[0]


def _fsspec_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(location)
    except (ValueError, ImportError, OSError) as error:
        raise LocationError(
            f"{location}: no filesystem opens this location ({first_line(error)})"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def name_account() -> None:
    """Set a user name and a home folder if the user has no account, as in many containers.

    Without them, torch's optimisers and MLflow cannot be imported.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        os.environ["LOGNAME"] = str(os.getuid())
    if os.path.expanduser("~") == "~":  # noqa: PTH111 - `Path.home` raises an error
        os.environ["HOME"] = tempfile.gettempdir()


def require_temporary_space() -> None:
    """Check, before slow work begins, that a copy of a model fits into the temporary folder.

    Raises:
        ConfigError: the disk of the folder is nearly full, or no folder can be written.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise ConfigError(f"{error.strerror}: set TMPDIR to a folder that can be written") from None
    if (free := shutil.disk_usage(folder).free) < TEMPORARY_BYTES:
        raise ConfigError(
            f"the folder of temporary files, {folder}, has {free // 1_000_000} MB of free space, "
            f"and {TEMPORARY_BYTES // 1_000_000} MB are needed: set TMPDIR to another folder"
        )


def absolute(location: str) -> str:
    """Make a local path absolute, and return a URI unchanged.

    Raises:
        LocationError: the path begins with `~`, but the home folder is not known.
    """
    if "://" in location:
        return location
    try:
        return str(Path(location).expanduser().absolute())
    except RuntimeError as error:
        raise LocationError(
            f"{location}: the home folder ~ is not known ({error}); give the full path"
        ) from error


def location_inside(folder: str, path: str) -> str:
    """Join a folder and a relative path. The query or fsspec chain of a URI stays at the end."""
    if "://" not in folder:
        return os.path.normpath(os.path.join(folder, path))  # noqa: PTH118 - called for each file
    before, inside, after = _split_uri(folder)
    while path.startswith("../"):
        inside, path = _parent(inside), path.removeprefix("../")
    if _scheme_of(folder) in _PERCENT_ENCODED:
        path = quote(path)
    if inside:  # else the folder is the root of the filesystem
        inside = f"{inside.rstrip('/')}/"
    return f"{before}{inside}{path}{after}"


def short_digest(text: str) -> str:
    """Return 8 hex digits for the name of a file or folder whose content depends on the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def folder_of(location: str) -> str:
    """Return the folder of a file."""
    if "://" not in location:
        return str(Path(absolute(location)).parent)
    before, inside, after = _split_uri(location)
    return before + _parent(inside) + after


def _parent(inside: str) -> str:
    """Return the folder of a path inside a filesystem; empty for a path without a folder."""
    root = "/" if inside.startswith("/") else ""
    return inside.rstrip("/").rpartition("/")[0] or root


def _split_uri(location: str) -> tuple[str, str, str]:
    """Split a URI into the path inside its filesystem, and what is before and after the path.

    A query (`?region=...`) or the rest of an fsspec chain (`::file://...`) is after the path. A
    cache of fsspec, as in `simplecache::memory://clips`, has no path of its own and is before it.

    Returns:
        The texts before the path, of the path, and after it.
    """
    scheme, mark, rest = location.partition("://")
    end = "?" if _scheme_of(location) in _PERCENT_ENCODED else "::"
    inside, end, after = rest.partition(end)
    return scheme + mark, inside, end + after


def _scheme_of(uri: str) -> str:
    return uri.partition("://")[0].lower()
