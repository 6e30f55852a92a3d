"""The cluster's MLflow server: closed without its password, and not lost with its machine."""

import configparser
import contextlib
import os
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
from mlflow import MlflowClient

from ser_ray.errors import TrackingError
from ser_ray.tracking.server import local_folder
from ser_ray.tracking.tracker import Tracker
from tests.mlflow_server import is_ready
from tests.processes import held_port, started

JOBS = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"


def credentials_of(home: Path) -> tuple[str, str]:
    """User and password that the server wrote into a home directory."""
    credentials = configparser.ConfigParser()
    with (home / ".mlflow" / "credentials").open() as file:
        credentials.read_file(file)
    mlflow = credentials["mlflow"]
    return mlflow["mlflow_tracking_username"], mlflow["mlflow_tracking_password"]


@contextlib.contextmanager
def running(store: Path, home: Path) -> Iterator[str]:
    """Serve a store on a machine with this home directory; stopped as a machine is shut down."""
    home.mkdir(exist_ok=True)
    with held_port() as port:
        uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "ser_ray.tracking.server", str(store), "--port", str(port)]
        with started(
            command,
            home / "log",
            lambda: is_ready(uri, credentials_of(home)),
            env={k: v for k, v in os.environ.items() if k != JOBS} | {"HOME": str(home)},
        ) as server:
            processes = psutil.Process(server.pid).children(recursive=True)
            assert not [one for one in processes if "mlflow.server.jobs" in " ".join(one.cmdline())]
            yield uri
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0, (home / "log").read_text()
            with pytest.raises(
                requests.ConnectionError
            ):  # MLflow ended with the program that started it
                requests.get(uri, timeout=60)


def use_credentials(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, password = credentials_of(home)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


@pytest.mark.slow
def test_nothing_is_read_or_written_without_the_password_and_the_next_head_has_all_runs(
    tmp_path, monkeypatch
):
    store = tmp_path / "store"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # of a busy machine

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

        use_credentials(tmp_path / "head", monkeypatch)
        credentials = tmp_path / "head" / ".mlflow" / "credentials"
        assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
        tracker = start(uri)
        tracker.log_metrics({"val/ua": 0.5}, 1, 1000)
        assert tracker.flush()
        tracker.log_files({"notes.txt": "kept"})
        tracker.finish("FINISHED")
    password = os.environ["MLFLOW_TRACKING_PASSWORD"]
    assert password not in (tmp_path / "head" / "log").read_text()
    assert list((store / "artifacts").rglob("notes.txt"))

    with running(store, tmp_path / "next") as uri:  # another machine, which has only the store
        use_credentials(tmp_path / "next", monkeypatch)
        assert os.environ["MLFLOW_TRACKING_PASSWORD"] != password
        found = MlflowClient(uri).get_run(tracker.run_id)
        assert (found.info.status, found.data.metrics) == ("FINISHED", {"val/ua": 0.5})


def test_every_store_has_a_separate_database_on_a_machine(in_tmp):
    folders = {local_folder(store) for store in ("s3://a/mlflow", "s3://b/mlflow", "here")}
    assert len(folders) == 3
    assert local_folder("here") == local_folder(str(in_tmp / "here"))
