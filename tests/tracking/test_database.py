"""A store in a sqlite file: made once, read where it is now, and waited for."""

import contextlib
import json
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from sqlalchemy import Connection, Engine, event

from ser_ray.errors import TrackingError
from ser_ray.tracking import database, store
from ser_ray.tracking.registry import best_training_of, fetch_checkpoint, recipe_of_run
from ser_ray.tracking.store import connect, resolve_uri
from ser_ray.tracking.tracker import Tracker
from tests.mlflow_store import new_store

RUN_ID = "0" * 32


def copied(folder: Path, target: Path) -> str:
    """Copy a store; returns the URI of the copy."""
    shutil.copytree(folder, target)
    return f"sqlite:///{target}/mlflow.db"


def start(uri: str, experiment: str = "one") -> Tracker:
    return Tracker.start(uri, experiment, name="run", params={"lr": 0.1}, tags={})


def run_of_another_process(uri: str) -> str:
    """Make a run with the file a.txt; MLflow's tracker would keep its place for this process."""
    client = connect(uri)
    root = database.artifacts_of(Path(uri.removeprefix("sqlite:///")))
    run = client.create_run(client.create_experiment("one", artifact_location=f"{root}/one"))
    artifacts = Path(unquote(run.info.artifact_uri.removeprefix("file://")))
    artifacts.mkdir(parents=True)
    (artifacts / "a.txt").write_text("here")
    return str(run.info.run_id)


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["moved there", "h#1", "Ünï ç", "quo'te\"s", "100 +&=;", "a,b:c"])
def test_a_store_that_was_copied_reads_and_writes_the_copy(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = tmp_path / "old", tmp_path / name
    first = run_of_another_process(new_store(old))
    uri, before = copied(old, new), files_in(old)
    (old / "mlartifacts" / "one" / first / "artifacts" / "a.txt").write_text("there")
    again = Tracker.of_run(uri, first)
    again.log_files({"b.txt": "new"})
    second = start(uri)
    client = MlflowClient(uri)
    assert files_in(old) == before
    loaded = Path(client.download_artifacts(first, "", str(new)))
    assert (loaded / "a.txt").read_text() == "here"
    assert (loaded / "b.txt").read_text() == "new"
    assert (new / "mlartifacts" / "one" / second.run_id / "artifacts" / "settings.json").exists()
    assert caplog.text.count(f"was moved or copied from {old}") == 1


def test_a_store_that_is_reached_through_a_link_keeps_its_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = start(new_store(tmp_path / "real"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    caplog.clear()
    Tracker.of_run(f"sqlite:///{tmp_path}/link/mlflow.db", run.run_id)
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["what?", "100%25", "a%41b"])
def test_a_path_that_mlflow_misreads_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(TrackingError, match=r"misreads the % or \? in this path: rename"):
        connect(f"sqlite:///{tmp_path}/{name}/mlflow.db", create=True)
    assert list(tmp_path.iterdir()) == []


def read_origin(uri: str) -> object:
    return Tracker.of_run(uri, RUN_ID)


def read_model(uri: str) -> object:
    return fetch_checkpoint(f"runs:/{RUN_ID}/model", uri, Path("model"))


@pytest.mark.parametrize(
    "read",
    [
        read_origin,
        read_model,
        lambda uri: recipe_of_run(RUN_ID, uri),
        lambda uri: best_training_of(RUN_ID, uri),
    ],
)
def test_a_store_that_is_not_there_is_said_and_not_made_by_reading(in_tmp: Path, read: Any) -> None:
    with pytest.raises(TrackingError, match=r"typo/mlflow\.db: there is no such MLflow store"):
        read("sqlite:///typo/mlflow.db")
    assert list(in_tmp.iterdir()) == []


@pytest.mark.parametrize("uri", ["sqlite:///x.db", "./mlruns", "file:mlruns", "file:./mlruns", ""])
def test_a_relative_store_means_one_place(uri: str, in_tmp: Path) -> None:
    assert str(in_tmp) in resolve_uri(uri)
    assert resolve_uri(resolve_uri(uri)) == resolve_uri(uri)


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("localhost:5000", "http://localhost:5000"),
        ("mlflow.my-lab.org:80/here", "http://mlflow.my-lab.org:80/here"),
        ("https://host:5000", "https://host:5000"),
        ("databricks", "databricks"),
    ],
)
def test_the_scheme_of_a_server_may_be_left_out(uri: str, resolved: str) -> None:
    assert resolve_uri(uri) == resolved


@pytest.mark.parametrize(
    "uri",
    ["http://localhost:5OOO", "http://localhost:500000", "http://a..b:5000", "http://[::1:5000",
     "localhost:500000"],
)  # fmt: skip
def test_a_malformed_address_is_named_with_the_option_and_the_variable(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (uri, ""):
        with pytest.raises(TrackingError, match="check --tracking-uri, or the variable") as error:
            resolve_uri(given)
        assert uri in str(error.value)
        assert "\n" not in str(error.value)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)


def test_a_server_without_scheme_and_port_is_named_as_a_slip() -> None:
    with pytest.raises(TrackingError, match="address of a server begins with http://"):
        connect(resolve_uri("mlflow.my-lab.org"))


@pytest.mark.parametrize(
    "uri",
    [
        "http://127.0.0.1:1",
        "http://no-such-name.invalid:5000",
        "http://10.255.255.1:5000",  # no answer
    ],
)
def test_a_server_that_is_away_is_named_with_the_variable(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if uri.startswith("http://10."):

        def unanswered(address: object, timeout: float, **_: object) -> None:
            assert timeout <= 10
            raise TimeoutError("timed out")

        monkeypatch.setattr("urllib3.util.connection.create_connection", unanswered)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(TrackingError, match=f"MLFLOW_TRACKING_URI names {uri}: this MLflow"):
        store.require_server("")


def test_a_server_that_never_answers_is_asked_once_and_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(TrackingError, match=r"server cannot be used \(.*Read timed out"):
            store.require_server("")
        silent.setblocking(False)
        requests = []
        with contextlib.suppress(BlockingIOError):
            while True:
                requests.append(silent.accept()[0])
        assert len(requests) == 1
        for connection in requests:
            connection.close()


def test_another_store_does_not_become_the_default_of_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    connect(new_store(tmp_path / "other"))
    assert resolve_uri("") == "http://127.0.0.1:1"


def test_a_database_that_another_program_holds_is_waited_for_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(new_store(tmp_path / "held"))
    holder = sqlite3.connect(tmp_path / "held" / "mlflow.db", isolation_level=None)
    monkeypatch.setattr(database, "POLL_SECONDS", 0.01)
    warnings: list[str] = []

    def release(text: str, *_: object) -> None:
        warnings.append(text)
        holder.execute("ROLLBACK")

    monkeypatch.setattr(database.logger, "warning", release)
    holder.execute("BEGIN EXCLUSIVE")
    run.log_metrics({"loss": 0.5}, 1, 1000)
    run.deliver()
    assert MlflowClient(run.uri).get_run(run.run_id).data.metrics == {"loss": 0.5}
    holder.close()
    assert len(warnings) == 1


def test_an_artifact_store_that_cannot_be_written_is_found_at_the_start(tmp_path: Path) -> None:
    uri = new_store(tmp_path / "closed")
    (tmp_path / "closed" / "mlartifacts").write_text("a file where the folder belongs")
    with pytest.raises(TrackingError, match=r"closed/mlartifacts/one.*cannot store artifacts here"):
        start(uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("one")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"


def test_the_advice_for_a_deleted_experiment_restores_it(in_tmp: Path) -> None:
    uri = new_store(in_tmp / "deleted")
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("one"))
    with pytest.raises(TrackingError, match="is deleted: restore it with") as found:
        start(uri)
    command = str(found.value).split("`")[1]
    *words, number = command.split()
    assert words == [
        "env",
        f"MLFLOW_TRACKING_URI={uri}",
        "mlflow",
        "experiments",
        "restore",
        "--experiment-id",
    ]
    client.restore_experiment(number)
    start(uri)


FIRST_RUN = """
import sys
from ser_ray.tracking.tracker import Tracker
from tests.mlflow_store import new_store
sys.stdin.read()  # all processes start together
uri = f"sqlite:///{sys.argv[1]}/new/mlflow.db"
run = Tracker.start(uri, "one", name="run", params={}, tags={})
run.finish("FINISHED")
"""


@pytest.mark.slow
def test_the_first_runs_of_several_processes_in_an_empty_folder_are_all_recorded(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", FIRST_RUN, str(tmp_path)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stderr=pipe, text=True) for _ in range(3)]
    said = [process.communicate("", timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    client = MlflowClient(f"sqlite:///{tmp_path}/new/mlflow.db")
    experiment = client.get_experiment_by_name("one")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"mlflow.db", "mlartifacts"}
    settings = tmp_path.glob("new/mlartifacts/one/*/artifacts/settings.json")
    assert [json.loads(file.read_text()) for file in settings] == [{}] * 3


def test_only_the_creation_of_a_database_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    seen: list[int] = []

    def record(connection: Connection) -> None:
        seen.append(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())

    event.listen(Engine, "begin", record)
    try:
        connect(f"sqlite:///{tmp_path}/mlflow.db", create=True)
    finally:
        event.remove(Engine, "begin", record)
    assert seen[0] == 0
    assert seen[-1] == 2, "a stored run survives a failure of the machine"


@pytest.mark.parametrize(
    "damage",
    ["UPDATE alembic_version SET version_num = '451aebb31d03'", "DROP TABLE alembic_version"],
)
def test_a_database_of_another_version_or_half_upgraded_names_the_command_that_mends_it(
    tmp_path: Path, damage: str
) -> None:
    uri = new_store(tmp_path / "store")
    connection = sqlite3.connect(tmp_path / "store" / "mlflow.db")
    connection.execute(damage)
    connection.commit()
    connection.close()
    with pytest.raises(TrackingError, match=rf"was interrupted: .* `mlflow db upgrade {uri}`"):
        connect(uri)
