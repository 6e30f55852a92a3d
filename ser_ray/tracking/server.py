"""The MLflow server of a cluster's head node: behind a password, its database kept in a bucket.

    python -m ser_ray.tracking.server s3://bucket/mlflow

MLflow wants a SQL database, and a head node's disk goes when the node goes. So the database is a
sqlite file that is copied to the store whenever it has changed, and a new head starts from that
copy: a lost head loses what the last `BACKUP_SECONDS` recorded, and no other machine has to be paid
for. Artifacts go to the store through the server: its clients need no right to the bucket.

The server listens on the loopback alone: jobs reach it because their drivers run on the head,
people through an ssh tunnel. Its password is made at the first start on a machine and written where
MLflow's own client looks for it, `~/.mlflow/credentials`.
"""

import argparse
import configparser
import contextlib
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from pyarrow import fs

from ser_ray.errors import SerRayError, TrackingError
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.lock import Lock
from ser_ray.storage.paths import filesystem_of, location_inside

BACKUP_SECONDS = 60.0
CREDENTIALS = Path("~/.mlflow/credentials")
DATABASE = "mlflow.db"
IN_USE = "serves this store; stop it, or give another store"


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the process is told to stop; returns the exit status."""
    parser = argparse.ArgumentParser(description="Serve MLflow; its database lives in a bucket.")
    parser.add_argument("store", help="folder or URI for the database's copy and the artifacts")
    parser.add_argument("--port", type=int, default=5000, help="port on the loopback")
    parser.add_argument(
        "--folder", type=Path, default=Path("~/.ser-ray-mlflow"), help="where the database is used"
    )
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return serve(options.store, options.port, options.folder.expanduser())
    except SerRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(store: str, port: int, folder: Path) -> int:
    """Run the server and keep its database's copy; returns MLflow's exit status.

    Raises:
        TrackingError: another server uses the store, or the copy there cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    filesystem, root = filesystem_of(store)
    database, copy = folder / DATABASE, f"{root}/{DATABASE}"
    with Lock(store, TrackingError, IN_USE) as lock:
        restore(filesystem, copy, database)
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
                *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{database}"),
                *("--artifacts-destination", location_inside(store, "artifacts")),
            ],
            env=os.environ | _authentication(folder),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return server.wait(BACKUP_SECONDS)
                lock.check()
                try:
                    back_up(database, filesystem, copy)
                except (OSError, sqlite3.Error) as error:
                    print(f"{copy}: not written ({error}); trying again", file=sys.stderr)
        finally:
            server.terminate()
            server.wait()
            lock.check()
            back_up(database, filesystem, copy)


def restore(filesystem: fs.FileSystem, copy: str, database: Path) -> None:
    """Start from the store's copy where this machine has no database yet.

    Raises:
        TrackingError: there is a copy and it cannot be read; an empty database would replace it.
    """
    if database.exists():
        return
    part = database.with_suffix(".part")
    try:
        if filesystem.get_file_info(copy).type == fs.FileType.NotFound:
            return
        fs.copy_files(copy, str(part), source_filesystem=filesystem)
    except OSError as error:
        raise TrackingError(
            f"{copy}: the runs of earlier heads cannot be read ({error})"
        ) from error
    part.rename(database)


def back_up(database: Path, filesystem: fs.FileSystem, copy: str) -> bool:
    """Copy the database to the store, whole, if it changed since; says whether it did."""
    snapshot = database.with_suffix(".snapshot")
    if not database.exists() or _changed_at(database) <= _changed_at(snapshot):
        return False
    changed_at = _changed_at(database)
    try:
        with (
            contextlib.closing(sqlite3.connect(database)) as source,
            contextlib.closing(sqlite3.connect(snapshot)) as target,
        ):
            source.backup(target)
        with atomic_write(filesystem, copy) as target:
            fs.copy_files(str(snapshot), target, destination_filesystem=filesystem)
    except (OSError, sqlite3.Error):
        snapshot.unlink(missing_ok=True)  # its age says that the copy is as new
        raise
    os.utime(snapshot, ns=(changed_at, changed_at))
    return True


def _changed_at(database: Path) -> int:
    """When a database was last written to, in nanoseconds: the file, or sqlite's log beside it."""
    files = (database, database.with_name(f"{database.name}-wal"))
    return max((file.stat().st_mtime_ns for file in files if file.exists()), default=0)


def _authentication(folder: Path) -> dict[str, str]:
    """Make this machine's password, once; return MLflow's settings for it."""
    credentials = CREDENTIALS.expanduser()
    if not credentials.exists():
        credentials.parent.mkdir(mode=0o700, exist_ok=True)
        content = (
            f"[mlflow]\nmlflow_tracking_username = ser-ray\n"
            f"mlflow_tracking_password = {secrets.token_urlsafe(24)}\n"
        )
        descriptor = os.open(credentials, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
    known = configparser.ConfigParser()
    known.read(credentials)
    settings = folder / "auth.ini"
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{folder / 'auth.db'}\n"
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": known["mlflow"]["mlflow_tracking_username"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["mlflow"]["mlflow_tracking_password"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }


if __name__ == "__main__":
    sys.exit(main())
