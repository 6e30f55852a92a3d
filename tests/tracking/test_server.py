"""The cluster's MLflow server: closed without its password, and not lost with its machine."""

import configparser
import contextlib
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from ser_ray.errors import TrackingError
from ser_ray.storage.paths import filesystem_of
from ser_ray.tracking.server import back_up, restore
from ser_ray.tracking.tracker import Tracker
from tests.s3_server import s3_bucket


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(store: Path, home: Path) -> Iterator[str]:
    """Serve a store on a machine with this home directory; stopped as a machine is shut down."""
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    home.mkdir()
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "ser_ray.tracking.server", str(store), "--port", str(port)],
            env=os.environ | {"HOME": str(home)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(900):
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{uri}/health", timeout=60).ok:
                    break
            assert server.poll() is None, (home / "log").read_text()
            time.sleep(0.1)
        yield uri
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        with pytest.raises(requests.ConnectionError):  # the server went with its keeper
            requests.get(f"{uri}/health", timeout=60)


def use_credentials(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = home / ".mlflow" / "credentials"
    credentials = configparser.ConfigParser()
    credentials.read(path)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, credentials["mlflow"][name.lower()])
    return path


@pytest.mark.slow
def test_nothing_is_read_or_written_without_the_password_and_runs_outlive_the_head(
    tmp_path, monkeypatch
):
    store = tmp_path / "store"
    monkeypatch.setenv("HOME", str(tmp_path))

    def start(uri: str) -> Tracker:
        return Tracker.start(uri, "locked", name="a run", params={"lr": 1.0}, tags={"by": "me"})

    with running(store, tmp_path / "head") as uri:
        artifact = f"{uri}/api/2.0/mlflow-artifacts/artifacts/a/notes.txt"
        for method, url, content in (
            ("POST", f"{uri}/api/2.0/mlflow/experiments/search", {"max_results": 9}),
            ("POST", f"{uri}/api/2.0/mlflow/runs/create", {"experiment_id": "0"}),
            ("POST", f"{uri}/api/2.0/mlflow/runs/log-batch", {"run_id": "0" * 32}),
            ("PUT", artifact, {"not": "wanted"}),
            ("GET", artifact, None),
        ):
            for auth in (None, ("ser-ray", "wrong")):
                asked = requests.request(method, url, json=content, auth=auth, timeout=60)
                assert asked.status_code == 401, (method, url, auth)
        assert not list(store.rglob("notes.txt"))
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD"):
            start(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "password1234")  # MLflow's old default
        with pytest.raises(TrackingError, match="MLFLOW_TRACKING_PASSWORD"):
            start(uri)

        credentials = use_credentials(tmp_path / "head", monkeypatch)
        assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
        tracker = start(uri)
        tracker.log_metrics({"val_ua": 0.5}, 1, 1000)
        assert tracker.flush()
        tracker.log_files({"notes.txt": "kept"})
        tracker.finish("FINISHED")
    password = os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert password not in (tmp_path / "head" / "log").read_text()
    assert list((store / "artifacts").rglob("notes.txt"))

    with running(store, tmp_path / "next") as uri:  # another machine: nothing but the store
        use_credentials(tmp_path / "next", monkeypatch)
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] != password
        auth = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"])
        found = requests.get(
            f"{uri}/api/2.0/mlflow/runs/get",
            params={"run_id": tracker.run_id},
            auth=auth,
            timeout=60,
        ).json()["run"]
    assert found["info"]["status"] == "FINISHED"
    assert [metric["value"] for metric in found["data"]["metrics"]] == [0.5]


def test_the_copy_in_a_bucket_is_whole_and_only_made_of_a_changed_database(tmp_path):
    database = tmp_path / "mlflow.db"
    with s3_bucket("kept") as uri, contextlib.closing(sqlite3.connect(database)) as writer:
        filesystem, copy = filesystem_of(uri.format("mlflow.db"))
        restore(filesystem, copy, tmp_path / "new.db")
        assert not (tmp_path / "new.db").exists()  # the first head of a new bucket

        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("CREATE TABLE runs (name)")
        writer.execute("INSERT INTO runs VALUES ('first')")
        writer.commit()
        assert back_up(database, filesystem, copy)
        assert not back_up(database, filesystem, copy)
        writer.execute("INSERT INTO runs VALUES ('second')")
        writer.commit()  # still in the log beside the file
        assert back_up(database, filesystem, copy)

        writer.execute("INSERT INTO runs VALUES ('third')")
        writer.commit()
        with pytest.raises(OSError, match="bucket"):
            back_up(database, filesystem, "no-such-bucket/mlflow.db")
        assert back_up(database, filesystem, copy), "nothing changed since, but it was not stored"

        restore(filesystem, copy, tmp_path / "next.db")
        with contextlib.closing(sqlite3.connect(tmp_path / "next.db")) as reader:
            assert reader.execute("SELECT name FROM runs").fetchall() == [
                ("first",), ("second",), ("third",),
            ]  # fmt: skip


def test_a_store_out_of_reach_is_not_taken_for_an_empty_one(tmp_path):
    with s3_bucket("gone") as uri:
        filesystem, copy = filesystem_of(uri.format("mlflow.db"))
    with pytest.raises(TrackingError, match="cannot be read"):
        restore(filesystem, copy, tmp_path / "mlflow.db")
    assert not (tmp_path / "mlflow.db").exists()
