"""The tracker with a real MLflow server that is away at the start, for a while, or for good."""

import base64
import csv
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pyarrow as pa
import pytest
from mlflow import MlflowClient

from ser_ray.errors import TrackingError
from ser_ray.tracking import tracker as tracking
from ser_ray.tracking.run_metadata import provenance
from ser_ray.tracking.store import connect
from ser_ray.tracking.tracker import Tracker, now_ms, run_to_resume
from tests.mlflow_server import MlflowServer
from tests.mlflow_store import new_store

pytestmark = pytest.mark.slow


def start(uri: str, run_id: str = "") -> Tracker:
    tags = {"t": "v"}
    return Tracker.start(uri, "away", name="run", params={"a": {"b": 1}}, tags=tags, run_id=run_id)


def metrics(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    history = MlflowClient(uri).get_metric_history(run_id, name)
    return sorted((metric.step, metric.value) for metric in history)


def log(tracker: Tracker, epoch: int) -> None:
    row = {"epoch": epoch, "val/ua": epoch / 10}
    tracker.log_epoch(row, [epoch, epoch + 0.5], timestamp_ms=1000 * epoch)
    tracker.flush()


def test_a_server_that_is_down_at_the_start_is_an_error(mlflow_server: MlflowServer) -> None:
    mlflow_server.stop()
    with pytest.raises(TrackingError, match="this MLflow server cannot be used"):
        start(mlflow_server.uri)


@pytest.mark.parametrize(
    "uri",
    ["{folder}", "foo://bar", "postgresql://host/db", "mysql://host/db", "sqlite:////proc/no/db",
     "sqlite:///{folder}/no-database"],
)  # fmt: skip
def test_a_uri_that_no_store_can_have_is_named(uri: str, tmp_path: Path) -> None:
    (tmp_path / "no-database").write_text("a text of more than a hundred letters" * 100)
    uri = uri.format(folder=tmp_path)
    with pytest.raises(TrackingError, match=re.escape(uri)):
        start(uri)


def test_mlflow_prints_no_links_between_the_lines_of_a_training(
    mlflow_server: MlflowServer, capsys: pytest.CaptureFixture[str]
) -> None:
    start(mlflow_server.uri).finish("FINISHED")
    assert capsys.readouterr().out == ""


def test_each_kind_of_file_is_stored_in_its_format(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    tracker = start(mlflow_server.uri)
    rows = [
        {"clip": "a,b", "p": 0.5, "problem": None},
        {"clip": 'said "no"', "p": 1, "problem": "x"},
    ]
    table = pa.Table.from_pylist(rows)
    numbers = {"c": [1, math.nan]}
    tracker.log_files({"a/page.html": "<p>é</p>", "a/b.json": numbers, "tables/rows.csv": table})
    folder = Path(
        MlflowClient(mlflow_server.uri).download_artifacts(tracker.run_id, "", str(tmp_path))
    )
    assert (folder / "a" / "page.html").read_text() == "<p>é</p>"
    assert json.loads((folder / "a" / "b.json").read_text()) == {"c": [1, None]}
    with (folder / "tables" / "rows.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"clip": "a,b", "p": "0.5", "problem": ""},
            {"clip": 'said "no"', "p": "1", "problem": "x"},
        ]


def test_no_epoch_is_lost_while_the_server_is_down_during_a_training(
    mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    tracker = start(mlflow_server.uri)
    log(tracker, 1)
    mlflow_server.stop()
    for epoch in (2, 3):
        log(tracker, epoch)
    with pytest.raises(TrackingError, match="nothing is lost"):
        tracker.finish("FINISHED")
    mlflow_server.start()
    assert tracker.flush()
    assert metrics(mlflow_server.uri, tracker.run_id, "val/ua") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert [step for step, _ in metrics(mlflow_server.uri, tracker.run_id, "train/lr")] == list(
        range(6)
    )


def test_the_next_start_continues_the_run(mlflow_server: MlflowServer) -> None:
    tracker = start(mlflow_server.uri)
    log(tracker, 1)
    again = start(mlflow_server.uri, run_id=tracker.run_id)
    for epoch in (1, 2):
        log(again, epoch)
    assert again.run_id == tracker.run_id
    assert metrics(mlflow_server.uri, tracker.run_id, "val/ua") == [(1, 0.1), (2, 0.2)]
    run = MlflowClient(mlflow_server.uri).get_run(tracker.run_id)
    assert run.data.params == {"a.b": "1"}
    assert run.info.status == "RUNNING"


def test_an_epoch_that_is_logged_twice_is_stored_once_under_these_names_and_steps(
    tmp_path: Path,
) -> None:
    uri = new_store(tmp_path)
    tracker = start(uri)
    for _ in range(2):
        tracker.log_epoch(
            {"epoch": 3.0, "val/ua": 0.5, "train/loss": 1.25},
            [0.1, 0.2],
            7000,
            {"node-a": {"gpu_0_memory": 9.0}, "node-b": {"cpu": 50.0}},
        )
        tracker.deliver()
    client = MlflowClient(uri)
    names = client.get_run(tracker.run_id).data.metrics
    points = {
        name: [
            (m.step, m.value, m.timestamp) for m in client.get_metric_history(tracker.run_id, name)
        ]
        for name in names
    }
    assert points == {
        "val/ua": [(3, 0.5, 7000)],
        "train/loss": [(3, 1.25, 7000)],
        "system/node-a/gpu_0_memory": [(3, 9.0, 7000)],
        "system/node-b/cpu": [(3, 50.0, 7000)],
        "train/lr": [(4, 0.1, 7000), (5, 0.2, 7000)],
    }


class Closed(BaseHTTPRequestHandler):
    """MLflow behind a proxy that asks for a password in front of every path."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = base64.b64encode(b"ann:secret").decode()
        is_known = self.headers.get("Authorization") == f"Basic {token}"
        self.send_response(200 if is_known else 401)
        self.end_headers()
        self.wfile.write(b"{}" if is_known else b"who are you?")

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture
def closed_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_check_of_a_server_sends_the_credentials_of_the_client(
    closed_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(TrackingError, match=r"401.*MLFLOW_TRACKING_PASSWORD"):
        connect(closed_server)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    connect(closed_server)


NAMES_OF_USERS = ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME")


def test_a_user_without_an_account_is_named_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in NAMES_OF_USERS:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert provenance()["mlflow.user"] == str(os.getuid())


def test_a_user_without_an_account_and_a_home_can_train_and_record(tmp_path: Path) -> None:
    program = f"""if True:
        import pwd
        def unknown(uid):
            raise KeyError(f"getpwuid(): uid not found: {{uid}}")
        pwd.getpwuid = unknown
        import torch
        from ser_ray.tracking.tracker import Tracker
        from ser_ray.training.recipe import TrainConfig
        from ser_ray.training.optim import build_optimiser
        build_optimiser(torch.nn.Linear(1, 1), TrainConfig())
        Tracker.start("sqlite:///{tmp_path}/m.db", "e", name="r", params={{}}, tags={{}})
    """
    environment = {name: os.environ[name] for name in os.environ if name not in NAMES_OF_USERS}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


def test_a_run_that_the_store_does_not_have_is_an_error(mlflow_server: MlflowServer) -> None:
    with pytest.raises(TrackingError, match="refused the run 0123456789abcdef"):
        start(mlflow_server.uri, run_id="0123456789abcdef")


def test_a_store_that_does_not_answer_is_not_asked_again_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start(new_store(tmp_path))
    calls = []

    def refuse(*_: object, **__: object) -> None:
        calls.append(1)
        raise OSError("gone")

    monkeypatch.setattr(tracker._client, "log_batch", refuse)
    tracker.log_metrics({"loss": 1.0}, 1, now_ms())
    assert [tracker.flush() for _ in range(20)] == [False] * 20
    assert len(calls) == 1


def test_an_error_says_whether_a_run_was_read_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("gone")

    tracker = start(new_store(tmp_path))
    for name in ("get_run", "log_batch"):
        monkeypatch.setattr(tracker._client, name, refuse)
    for read in (tracker.read, lambda: tracker.describe(Run="a run")):
        with pytest.raises(TrackingError, match=r"cannot be read \(gone\); run the same command"):
            read()
    with pytest.raises(TrackingError, match=r"could not be written \(gone\); nothing is lost"):
        tracker.log_params({"a": 1})


@pytest.mark.parametrize("is_server", [True, False])
def test_a_run_that_is_deleted_while_it_trains_is_named_and_goes_on_once_it_is_restored(
    request: pytest.FixtureRequest,
    in_tmp: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_server: bool,
) -> None:
    monkeypatch.setattr(tracking, "RETRY_SECONDS", 0.0)
    uri = new_store(in_tmp)
    if is_server:
        uri = request.getfixturevalue("mlflow_server").uri
    tracker, client = start(uri), MlflowClient(uri)
    log(tracker, 1)
    client.delete_run(tracker.run_id)
    log(tracker, 2)
    command = caplog.text.split("`")[1]
    assert command == (
        f"env MLFLOW_TRACKING_URI={uri} mlflow runs restore --run-id {tracker.run_id}"
    )
    deleted = f"run {tracker.run_id} was deleted in MLflow: restore it"
    with pytest.raises(TrackingError, match=deleted):
        tracker.finish("FINISHED")
    with pytest.raises(TrackingError, match=deleted):
        start(uri, run_id=tracker.run_id)
    client.restore_run(tracker.run_id)
    assert start(uri, run_id=tracker.run_id).run_id == tracker.run_id
    log(tracker, 3)
    assert metrics(uri, tracker.run_id, "val/ua") == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_a_run_is_resumed_in_a_store_that_was_moved_and_begun_anew_in_another(
    in_tmp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = start(new_store(in_tmp / "old"))
    record = {"run_id": old.run_id, "tracking_uri": old.uri}
    (in_tmp / "old").rename(in_tmp / "new")
    assert run_to_resume(f"sqlite:///{in_tmp}/new/mlflow.db", record) == old.run_id
    assert run_to_resume("sqlite:////new", {}) == ""
    assert "a new run" not in caplog.text
    assert run_to_resume(f"sqlite:///{in_tmp}/other/mlflow.db", record) == ""
    assert f"{old.run_id} is not in this store but in {old.uri}; a new run" in caplog.text
    assert not (in_tmp / "other").exists()


def test_nested_runs_are_found_by_their_tag(in_tmp):
    uri = new_store(in_tmp)

    def start(**tags: str) -> Tracker:
        return Tracker.start(uri, "tests", name="run", params={}, tags=tags)

    parent = start()
    nested = {
        name: start(**{"mlflow.parentRunId": parent.run_id, "trial.id": name}).run_id
        for name in ("a", "b")
    }
    start(**{"mlflow.parentRunId": parent.run_id})
    start(**{"mlflow.parentRunId": nested["a"], "trial.id": "c"})
    found = parent.nested_runs("trial.id")
    assert {name: run.info.run_id for name, run in found.items()} == nested
