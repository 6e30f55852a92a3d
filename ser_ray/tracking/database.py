"""Prepares a tracking store that is a sqlite file on this machine.

MLflow creates a missing database even if it is only to read, and fails if two processes do so at
the same time. It records absolute paths of artifacts, and gives up after 20 seconds if the database
is locked. Therefore `open_database` creates a database only if a run is to be recorded, and moves
the finished file to its place in one step. It corrects the paths if the folder was moved or copied,
and waits while another program locks the database.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import unquote

from ser_ray.errors import TrackingError

SCHEME = "sqlite:///"
ARTIFACTS = "mlartifacts"
"""Folder beside the database that holds the artifacts of its runs."""
POLL_SECONDS = 1.0
"""How long each check waits for a locked database."""
LOCKED_SECONDS = 90.0
"""Longest wait for a locked database. Afterwards, MLflow makes its own attempt."""
LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns in which MLflow records the locations of artifacts."""

logger = logging.getLogger(__name__)


def database_of(uri: str) -> Path | None:
    """Return the file of a sqlite store, or None if the store is of another kind."""
    return Path(uri.removeprefix(SCHEME)) if uri.startswith(SCHEME) else None


def artifacts_of(database: Path) -> str:
    """Return the URI of the folder with the artifacts of all runs in a database."""
    return (database.parent / ARTIFACTS).absolute().as_uri()


def open_database(uri: str, *, create: bool) -> None:
    """Prepare the file of a sqlite store, and correct the recorded paths of its artifacts.

    Args:
        uri: a store. If it is not a sqlite file, nothing is done.
        create: whether to create a missing file.

    Raises:
        TrackingError: as `require_database`, or the recorded paths cannot be corrected.
        OSError, sqlite3.Error: the file is not a database or cannot be read.
    """
    database = database_of(uri)
    if database is None:
        return
    require_database(uri, create=create)
    if not database.exists():
        _create(database)
    await_database(uri)
    _correct_locations(database)


def require_database(uri: str, *, create: bool = False) -> None:
    """Check that the file of a sqlite store exists, or can be created if `create` is true.

    Raises:
        TrackingError: the file does not exist, or its path contains % or ?, which MLflow misreads.
    """
    database = database_of(uri)
    if database is None:
        return
    if "?" in uri or unquote(uri) != uri:
        raise TrackingError(
            f"{uri}: MLflow misreads the % or ? in this path: rename the folder, or name a store "
            f"elsewhere with --tracking-uri {SCHEME}/FOLDER/mlflow.db"
        )
    if not database.is_file():
        if database.exists():
            raise TrackingError(f"{uri} is not a file; name a database file with --tracking-uri")
        if not create:
            raise TrackingError(
                f"{uri}: there is no such MLflow store; run the command in the project's folder, "
                "or name the store with --tracking-uri or MLFLOW_TRACKING_URI"
            )


def await_database(uri: str) -> None:
    """Wait up to LOCKED_SECONDS while another program locks a sqlite store, and warn once."""
    database = database_of(uri)
    if database is None or not os.access(database, os.W_OK):
        return
    began = time.monotonic()
    has_warned = False
    while time.monotonic() - began < LOCKED_SECONDS:
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=POLL_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            return
        except sqlite3.Error as error:
            if "locked" not in str(error):
                return  # MLflow will find and report the same error
        if not has_warned:
            logger.warning("%s: waiting, because another program locks this database", database)
            has_warned = True


def _create(database: Path) -> None:
    """Create an empty database in a temporary folder, and move it to its place.

    If another process has created the database in the meantime, do nothing.
    """
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    with _lock(database.parent), TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as made:
        if database.exists():
            return
        partial, complete = Path(made, "partial.db"), Path(made, "complete.db")
        with _without_waiting_for_the_disk():
            MlflowClient(tracking_uri=f"{SCHEME}{partial}")
        with contextlib.closing(sqlite3.connect(partial)) as connection, connection:
            # MLflow's default location depends on the working directory.
            connection.execute(
                "UPDATE experiments SET artifact_location = ? || '/' || name",
                (artifacts_of(database),),
            )
        shutil.copyfile(partial, complete)  # MLflow might still write to `partial`
        complete.rename(database)


@contextlib.contextmanager
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Let new connections of sqlite write without waiting until the disk has stored the data.

    MLflow creates a database in some sixty transactions, which takes seconds if each one waits.
    """
    from sqlalchemy import Engine, event

    def configure(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", configure)
    try:
        yield
    finally:
        event.remove(Engine, "connect", configure)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let only one process at a time run the block, if the folder's file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _correct_locations(database: Path) -> None:
    """Correct the recorded locations of artifacts after the folder was moved or copied."""
    here = artifacts_of(database)
    with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_SECONDS)) as connection:
        recorded = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ?",
            (f"file:///%/{ARTIFACTS}/%",),
        ).fetchall()
        roots = {uri.rpartition(f"/{ARTIFACTS}/")[0] + f"/{ARTIFACTS}" for (uri,) in recorded}
        for old in sorted(roots - {here}):
            if _is_same_folder(old, here):
                continue
            try:
                with connection:
                    for table, column in LOCATIONS:
                        connection.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                            f"WHERE substr({column}, 1, ?) = ?",
                            (here, len(old) + 1, len(old) + 1, f"{old}/"),
                        )
            except sqlite3.OperationalError as error:
                raise TrackingError(
                    f"{database} was moved or copied from {_path(old).parent}, and its records "
                    f"cannot be corrected ({error}). If the database is locked, run the command "
                    "again later. If it is read-only, copy its folder to a place that you can "
                    "write to"
                ) from error
            logger.warning(
                "%s was moved or copied from %s; the files of its runs are now read from and "
                "written to %s",
                database,
                _path(old).parent,
                _path(here),
            )


def _is_same_folder(old: str, here: str) -> bool:
    """Return whether two URIs lead to the same folder, perhaps through a link or another mount."""
    old_folder, folder = _path(old).parent, _path(here).parent
    return old_folder.exists() and old_folder.samefile(folder)


def _path(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("file://")))
