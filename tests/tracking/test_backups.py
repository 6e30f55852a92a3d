"""Backups of a database: what machines that come, go and come back find in it."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from pyarrow import fs

from ser_ray.errors import TrackingError
from ser_ray.storage.paths import filesystem_of
from ser_ray.tracking import backups as module
from ser_ray.tracking.backups import BACKUPS_KEPT, Backups
from tests.s3_server import s3_bucket


class Machine:
    """A head node's disk, with a server on it at times."""

    def __init__(self, disk: Path, filesystem: fs.FileSystem, folder: str) -> None:
        self.database = disk / "mlflow.db"
        self.filesystem, self.folder = filesystem, folder

    def backups(self) -> Backups:
        return Backups(self.filesystem, self.folder, self.database)

    def record(self, run: str) -> None:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("CREATE TABLE IF NOT EXISTS runs (name)")
            connection.execute("INSERT INTO runs VALUES (?)", (run,))
            connection.commit()

    def runs(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(self.database)) as connection:
            return [name for (name,) in connection.execute("SELECT name FROM runs")]

    def serve(self, *runs: str, is_lost: bool = False) -> list[str]:
        """Start a server, record runs one by one, and stop it; returns the runs found at first."""
        with self.backups() as backups:
            found = self.runs() if backups.store() and self.database.stat().st_size else []
            for run in runs:
                self.record(run)
                if not is_lost:
                    assert backups.store()
        return found


@pytest.fixture
def machines(tmp_path: Path) -> dict[str, Machine]:
    store = fs.LocalFileSystem(), str(tmp_path / "store")
    return {name: Machine(tmp_path / name, *store) for name in "abc"}


def test_an_old_machine_that_comes_back_has_the_runs_of_its_replacement(machines):
    assert machines["a"].serve("1", "2") == []
    assert machines["b"].serve("3") == ["1", "2"]
    assert machines["a"].serve("4") == ["1", "2", "3"]
    assert machines["b"].serve() == ["1", "2", "3", "4"]
    assert machines["c"].serve() == ["1", "2", "3", "4"]


def test_a_machine_that_nobody_replaced_keeps_what_it_had_not_backed_up(machines):
    machines["a"].serve("1")
    machines["a"].serve("2", is_lost=True)
    assert machines["a"].serve() == ["1", "2"]


def test_what_a_lost_machine_had_not_backed_up_is_moved_aside(machines, tmp_path):
    machines["a"].serve("1")
    machines["a"].serve("2", is_lost=True)
    machines["b"].serve("3")
    assert machines["a"].serve() == ["1", "3"]
    aside = Machine(tmp_path / "a" / "superseded", fs.LocalFileSystem(), "")
    assert aside.runs() == ["1", "2"]


def test_a_late_backup_of_a_replaced_machine_is_not_the_newest(machines):
    machines["a"].serve("1")
    with machines["a"].backups() as old:
        assert old.store()
        machines["b"].serve()  # records nothing, but its start begins a new generation
        machines["a"].record("late")
        assert old.store()
        machines["b"].serve("2")
    assert machines["c"].serve() == ["1", "2"]


def test_a_backup_is_complete_and_only_made_of_a_changed_database(tmp_path):
    with s3_bucket("kept") as uri:
        store = filesystem_of(uri.format("database"))
        machine = Machine(tmp_path / "a", *store)
        with machine.backups() as backups, contextlib.ExitStack() as stack:
            machine.record("0")
            assert backups.store()
            assert not backups.store()
            writer = stack.enter_context(contextlib.closing(sqlite3.connect(machine.database)))
            for run in range(1, BACKUPS_KEPT + 2):
                writer.execute("INSERT INTO runs VALUES (?)", (str(run),))
                assert not backups.store(), "it is not committed yet"
                writer.commit()  # still in the log beside the file
                assert backups.store()
        kept = store[0].get_file_info(fs.FileSelector(store[1]))
        assert len(kept) == BACKUPS_KEPT
        other = Machine(tmp_path / "b", *store)
        assert other.serve() == [str(run) for run in range(BACKUPS_KEPT + 2)]


def test_a_backup_that_failed_is_made_again_although_nothing_changed(machines, monkeypatch):
    machine = machines["a"]

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with machine.backups() as backups:
        machine.record("1")
        with monkeypatch.context() as patch:
            patch.setattr(module, "atomic_write", fail)
            with pytest.raises(OSError, match="no space left"):
                backups.store()
        assert backups.store()
    assert machines["b"].serve() == ["1"]


def test_an_unreadable_store_is_not_mistaken_for_an_empty_one(tmp_path):
    (tmp_path / "file").touch()
    require_unreadable(Machine(tmp_path / "a", fs.LocalFileSystem(), f"{tmp_path}/file/store"))


@pytest.mark.slow  # the AWS library retries for seconds
def test_an_unreachable_store_is_not_mistaken_for_an_empty_one(tmp_path):
    with s3_bucket("gone") as uri:
        store = filesystem_of(uri.format("database"))
    require_unreadable(Machine(tmp_path / "a", *store))


def require_unreadable(machine: Machine) -> None:
    with pytest.raises(TrackingError, match="cannot be read"), machine.backups():
        pass
    assert not machine.database.exists()
