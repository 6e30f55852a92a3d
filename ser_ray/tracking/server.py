"""Runs the MLflow server of a cluster's head node, with a password and backups in a bucket.

    python -m ser_ray.tracking.server s3://bucket/mlflow

MLflow needs a SQL database. A sqlite file on the head's disk needs no database server, but is lost
with the head. Therefore this program checks every BACKUP_SECONDS whether the file has changed, and
if so, backs it up to the bucket. A new head continues from the newest backup. If a head is lost
without warning, the records since the last backup are lost. Artifacts go to the bucket through the
server, so clients need no access to the bucket.

The server listens only on the loopback address. Drivers of jobs run on the head, so they can reach
it. Users reach it through an ssh tunnel. The first start on a machine creates a password and writes
it to `~/.mlflow/credentials`, where MLflow's client reads it.
"""

import argparse
import configparser
import contextlib
import hashlib
import os
import secrets
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ser_ray.errors import SerRayError, TrackingError
from ser_ray.storage.lock import FolderLock
from ser_ray.storage.paths import absolute, filesystem_of, location_inside
from ser_ray.tracking.backups import Backups

BACKUP_SECONDS = 60.0
CREDENTIALS = Path("~/.mlflow/credentials")
LOCAL = Path("~/.ser-ray-mlflow")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the process is stopped; return the exit status."""
    parser = argparse.ArgumentParser(description="Serve MLflow, with backups in a bucket.")
    parser.add_argument("store", help="folder or URI for the database's backups and the artifacts")
    parser.add_argument("--port", type=int, default=5000, help="port on the loopback address")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        return serve(options.store, options.port)
    except SerRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def serve(store: str, port: int) -> int:
    """Run the server and back up its database; return MLflow's exit status.

    Raises:
        TrackingError: another server uses the store, the backups in the store cannot be read, or
            the last backup failed.
    """
    folder = local_folder(store)
    filesystem, root = filesystem_of(store)
    database = folder / "mlflow.db"
    with (
        FolderLock(
            store,
            TrackingError,
            activity="serves this store",
            advice="stop it, or give another store",
        ) as lock,
        Backups(filesystem, f"{root}/database", database) as backups,
    ):
        server = subprocess.Popen(
            [
                *(sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"),
                *("--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
                *("--backend-store-uri", f"sqlite:///{database}"),
                *("--artifacts-destination", location_inside(store, "artifacts")),
            ],
            # Do not start MLflow's eight job runners, which only evaluate language models.
            env=os.environ
            | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
            | _authentication(folder),
        )
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return server.wait(BACKUP_SECONDS)
                lock.require_held()
                try:
                    backups.store()
                except (OSError, sqlite3.Error) as error:
                    print(f"{store}: the backup failed ({error}); retrying later", file=sys.stderr)
        finally:
            server.terminate()
            server.wait()
            lock.require_held()
            try:
                backups.store()
            except (OSError, sqlite3.Error) as error:
                raise TrackingError(
                    f"{store}: the last backup failed ({error}); {database} has all runs, and the "
                    "next start on this machine backs them up"
                ) from error


def local_folder(store: str) -> Path:
    """Return the local folder for the database of a store. Each store has its own folder."""
    digest = hashlib.sha256(absolute(store).encode()).hexdigest()[:12]
    return (LOCAL / digest).expanduser()


def _authentication(folder: Path) -> dict[str, str]:
    """Return the environment that makes MLflow ask for this machine's password.

    If the machine has no password yet, a password is created.
    """
    credentials = CREDENTIALS.expanduser()
    if not credentials.exists():
        credentials.parent.mkdir(mode=0o700, exist_ok=True)
        content = (
            f"[mlflow]\nmlflow_tracking_username = ser-ray\n"
            f"mlflow_tracking_password = {secrets.token_urlsafe(24)}\n"
        )
        credentials.touch(0o600, exist_ok=False)
        credentials.write_text(content)
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
