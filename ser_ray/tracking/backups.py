"""Backups of a sqlite database in a bucket, so that it outlives the machine that uses it.

Every backup is a complete copy named `GENERATION-NUMBER.db`. Each start of a server begins a new
generation, so the newest backup is the last by name. This does not depend on clocks, or on when the
upload of an earlier server arrives.

The file `backup` beside a machine's database names the backup that the database was restored from
or last stored as. If this is the newest backup, the machine uses its database. Otherwise another
machine has served the store since, so the database is moved aside and the newest backup is
restored.
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
    """A database on this machine and its backups. Only one process at a time may use them.

    Args:
        filesystem: storage of the backups.
        folder: path of the folder that holds only the backups.
        database: path of the database on this machine.
    """

    def __init__(self, filesystem: fs.FileSystem, folder: str, database: Path) -> None:
        self._filesystem, self._folder, self._database = filesystem, folder, database
        self._continued = database.with_name("backup")
        self._generation, self._number = 0, 0
        self._connection: sqlite3.Connection
        self._stored_version: int | None = None

    def __enter__(self) -> Self:
        """Restore the newest backup, unless this machine's database continues it.

        Raises:
            TrackingError: the backups cannot be read. An empty database must not replace them.
        """
        self._database.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
            newest = max(self._names(), default="")
            is_known = self._database.exists() and self._continued.exists()
            if newest and not (is_known and self._continued.read_text() == newest):
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
        """Store a backup if the database changed since the last one. Return whether it changed.

        Raises:
            OSError, sqlite3.Error: the backup could not be made or stored.
        """
        # sqlite changes this number when another connection has committed.
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version == self._stored_version:
            return False
        copy = self._database.with_suffix(".copy")
        with contextlib.closing(sqlite3.connect(copy)) as target:
            self._connection.backup(target)
        name = f"{self._generation:06d}-{self._number + 1:09d}.db"
        with atomic_write(self._filesystem, f"{self._folder}/{name}") as stored:
            fs.copy_files(str(copy), stored, destination_filesystem=self._filesystem)
        self._number += 1
        self._stored_version = version
        self._continued.write_text(name)
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
        # Sqlite's journal or log is moved too: it must not be applied to another database.
        for file in list(self._database.parent.glob(f"{self._database.name}*")):
            file.rename(aside / file.name)
        downloaded.rename(self._database)
        self._continued.write_text(name)
