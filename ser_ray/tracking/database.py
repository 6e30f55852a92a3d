"""Handles a tracking store in a sqlite file on this machine.

MLflow creates a missing database at any path that it reads, and fails if two processes create it at
the same time. It records artifacts by absolute paths, and gives up after 20 seconds if the database
is locked. Therefore `open_database` creates a database only to record a run, and as a complete
file. It corrects the paths if the folder was moved or copied, and waits while another program holds
the database.
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
LOOK_SECONDS = 1.0
"""How long one attempt waits for a database that another program holds."""
LOCKED_SECONDS = 90.0
"""Longest wait for a database that another program holds. Then MLflow tries to use it anyway."""
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
    """Make sure that the file of a sqlite store exists and has the right paths of its artifacts.

    Args:
        uri: a store. If it is not a sqlite file, nothing is done.
        create: whether to create a missing file.

    Raises:
        TrackingError: the file does not exist, cannot be created or corrected, or has a path that
            MLflow misreads.
        OSError, sqlite3.Error: the file is not a database or cannot be read.
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
            raise TrackingError(f"{uri}: is not a file: name a database file with --tracking-uri")
        if not create:
            raise TrackingError(
                f"{uri}: there is no such MLflow store: give the command in the folder of the "
                "project, or name the store with --tracking-uri or MLFLOW_TRACKING_URI"
            )
        _make(database)
    await_database(uri)
    _follow_move(database)


def await_database(uri: str) -> None:
    """Wait until no other program holds a sqlite store, at most LOCKED_SECONDS, and warn once."""
    database = database_of(uri)
    if database is None or not os.access(database, os.W_OK):
        return
    began = time.monotonic()
    has_warned = False
    while time.monotonic() - began < LOCKED_SECONDS:
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=LOOK_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            return
        except sqlite3.Error as error:
            if "locked" not in str(error):
                return  # MLflow finds the same error and names it
        if not has_warned:
            logger.warning("%s: another program holds this database; waiting for it", database)
            has_warned = True


def _make(database: Path) -> None:
    """Create an empty database as a complete file, unless another process has created one."""
    from mlflow import MlflowClient

    database.parent.mkdir(parents=True, exist_ok=True)
    with _lock(database.parent), TemporaryDirectory(dir=database.parent, prefix=".mlflow-") as made:
        if database.exists():
            return
        partial, complete = Path(made, "partial.db"), Path(made, "complete.db")
        MlflowClient(tracking_uri=f"{SCHEME}{partial}")
        with contextlib.closing(sqlite3.connect(partial)) as connection, connection:
            # MLflow's default location depends on the working directory.
            connection.execute(
                "UPDATE experiments SET artifact_location = ? || '/' || name",
                (artifacts_of(database),),
            )
        shutil.copyfile(partial, complete)  # MLflow keeps its connection to the other file
        complete.rename(database)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time create a database in a folder, if the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _follow_move(database: Path) -> None:
    """Correct the recorded locations of artifacts after the folder was moved or copied."""
    here = artifacts_of(database)
    with contextlib.closing(sqlite3.connect(database, timeout=LOCKED_SECONDS)) as connection:
        recorded = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE ?",
            (f"file:///%/{ARTIFACTS}/%",),
        ).fetchall()
        roots = {place.rpartition(f"/{ARTIFACTS}/")[0] + f"/{ARTIFACTS}" for (place,) in recorded}
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
                    f"{database}: was moved or copied from {_path(old).parent}, and its records "
                    f"cannot be corrected here ({error}): copy it into a folder that you can write"
                ) from error
            logger.warning(
                "%s: was moved or copied from %s; the files of its runs are now read from and "
                "written to %s",
                *(database, _path(old).parent, _path(here)),
            )


def _is_same_folder(old: str, here: str) -> bool:
    """Whether two paths lead to the same folder, for example through a link or a second mount."""
    before, now = _path(old).parent, _path(here).parent
    return before.exists() and before.samefile(now)


def _path(uri: str) -> Path:
    return Path(unquote(uri.removeprefix("file://")))
