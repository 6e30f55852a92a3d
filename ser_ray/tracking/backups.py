"""Backs up a sqlite database to a bucket, so that the records survive the loss of the machine.

Every backup is a complete copy named `GENERATION-NUMBER.db`. Each start of a server begins a new
generation, so the newest backup is the last one by name. The order does not depend on clocks. A
late upload of an earlier server does not become the newest backup.

The file `backup` beside the database contains the name of the last backup that was restored to the
database or made from it. If no backup is newer, the machine uses its database. Otherwise, for
example after another machine has served the store, the database is moved aside and the newest
backup is restored.
"""

import contextlib
import shutil
import sqlite3
from pathlib import Path
from typing import Self

from pyarrow import fs

from ser_ray.errors import TrackingError
from ser_ray.storage.atomic import atomic_write

BACKUPS_KEPT = 10


class Backups:
    """Restores and stores the backups of a database. Only one process at a time may use them.

    Args:
        filesystem: storage of the backups.
        folder: path of the folder that holds only the backups.
        database: path of the database on this machine.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str, database: Path) -> None:
        self._filesystem, self._folder, self._database = filesystem, folder, database
        self._backup_name = database.with_name("backup")
        self._generation, self._number = 0, 0
        self._connection: sqlite3.Connection
        self._stored_version: int | None = None

    def __enter__(self) -> Self:
        """Restore the newest backup, unless this machine's database continues from it.

        Raises:
            TrackingError: the backups cannot be read. An empty database must not be served
                instead, because its backups would later replace the others.
        """
        self._database.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
            newest = max(self._names(), default="")
            has_database = self._database.exists() and self._backup_name.exists()
            if newest and not (has_database and self._backup_name.read_text() == newest):
                self._restore(newest)
        except OSError as error:
            raise TrackingError(
                f"{self._folder}: the backups of the runs cannot be read ({error})"
            ) from error
        self._generation = int(newest.partition("-")[0] or 0) + 1
        self._connection = sqlite3.connect(self._database)
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def store(self) -> bool:
        """Store a backup if the database has changed since the last one; return whether it has.

        Raises:
            OSError, sqlite3.Error: the backup could not be made or stored.
        """
        # sqlite changes this number when another connection commits.
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version == self._stored_version:
            return False
        copy = self._database.with_suffix(".copy")
        with contextlib.closing(sqlite3.connect(copy)) as target:
            self._connection.backup(target)
        name = f"{self._generation:06d}-{self._number + 1:09d}.db"
        with (
            copy.open("rb") as file,
            atomic_write(self._filesystem, f"{self._folder}/{name}") as stream,
        ):
            shutil.copyfileobj(file, stream)
        self._number += 1
        self._stored_version = version
        self._backup_name.write_text(name)
        for old in sorted(self._names())[:-BACKUPS_KEPT]:
            self._filesystem.delete_file(f"{self._folder}/{old}")
        return True

    def _names(self) -> list[str]:
        listed = self._filesystem.get_file_info(fs.FileSelector(self._folder))
        return [entry.base_name for entry in listed if entry.base_name.endswith(".db")]

    def _restore(self, name: str) -> None:
        downloaded = self._database.with_suffix(".part")
        fs.copy_files(f"{self._folder}/{name}", str(downloaded), source_filesystem=self._filesystem)
        aside = self._database.with_name("superseded")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # The pattern includes sqlite's journal, which must not be applied to the restored database.
        for file in list(self._database.parent.glob(f"{self._database.name}*")):
            file.rename(aside / file.name)
        downloaded.rename(self._database)
        self._backup_name.write_text(name)
