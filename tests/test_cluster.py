"""Errors that a user meets when Ray does not start, or when a node cannot see the files.

Most tests replace Ray.
"""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from ser_ray import cluster as cluster_module
from ser_ray.cluster import JOB_CONFIG, cluster, one_of_each_folder, require_kept
from ser_ray.errors import ResourcesError
from ser_ray.inference import batch
from ser_ray.shards import prepare
from ser_ray.shards.config import PrepareConfig
from tests.clips import voice, write_wav


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ConnectionError("refused"),
            r"no Ray cluster answers at .* start it with `ray start.* set RAY_AUTH_MODE=token",
        ),
        (RuntimeError("Version mismatch"), r"at 127.0.0.1:1 cannot be joined: Version mismatch"),
        (Exception("timed out"), r"did not start on this machine \(timed out\): it is too busy"),
    ],
)
def test_a_ray_that_does_not_start_is_a_resources_error(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ResourcesError, match=message), cluster("127.0.0.1:1"):
        pytest.fail("the block ran without a connection")


def test_a_programming_error_is_not_reported_as_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(**_: object) -> None:
        raise TypeError("no such option")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(TypeError, match="no such option"), cluster():
        pytest.fail("the block ran without a connection")


@pytest.mark.parametrize("name", ["--address", "RAY_ADDRESS"])
def test_the_address_of_a_job_server_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://localhost:8265"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if name == "RAY_ADDRESS":
        monkeypatch.setenv(name, address)
    refused = pytest.raises(ResourcesError, match=r"is a job server.* RAY_API_SERVER_ADDRESS")
    with refused, cluster(address if name == "--address" else ""):
        pytest.fail("the block ran without a connection")


def test_one_file_of_every_folder_is_checked_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [f"/{folder}/{name}.wav" for name in "ab" for folder in range(9)]
    assert one_of_each_folder([]) == []
    assert one_of_each_folder([*files, "s3://bucket/a.wav"]) == files[:9]
    monkeypatch.setattr(cluster_module, "FOLDERS_ASKED", 4)
    assert one_of_each_folder(files) == [files[0], files[3], files[6]]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that other machines do not see, so that `require_shared` refuses what is in it."""
    own = tmp_path / "own"

    def refuse(*locations: str) -> None:
        for location in locations:
            if Path(location).is_relative_to(own):
                raise ResourcesError(f"{location}: is on this machine")

    for module in (prepare, batch):
        monkeypatch.setattr(module, "require_shared", refuse)
    monkeypatch.setattr(batch, "require_kept", lambda location: None)
    monkeypatch.setattr(prepare, "cluster", contextlib.nullcontext)
    return own


def some_clips(*folders: Path) -> list[str]:
    for folder in folders:
        folder.mkdir()
    sound = voice(0.6, 16_000)
    return [str(write_wav(folder / "a.wav", sound, 16_000)) for folder in folders]


def test_clips_that_only_this_machine_has_are_refused_even_if_their_table_is_shared(
    refused: Path, tmp_path: Path
) -> None:
    table, shards = tmp_path / "table.csv", tmp_path / "shards"
    clips = some_clips(tmp_path / "shared", refused)
    rows = [f"{clip},joy,{speaker}" for speaker, clip in enumerate(clips)]
    table.write_text("\n".join(["path,label,speaker", *rows]))
    with pytest.raises(ResourcesError, match=clips[1]):
        prepare.prepare(PrepareConfig(corpus=str(table), shards=str(shards)))
    assert not list(shards.rglob("*.parquet"))


def test_files_to_score_that_only_this_machine_has_are_refused_even_if_the_first_is_shared(
    refused: Path, tmp_path: Path
) -> None:
    clips = some_clips(tmp_path / "shared", refused)
    predictor: Any = SimpleNamespace(fingerprint="a model", labels=("calm",))
    with pytest.raises(ResourcesError, match=clips[1]):
        batch.predict_many(clips, predictor, str(tmp_path / "found.csv"))


def test_the_private_switch_of_ray_still_makes_it_use_the_loopback() -> None:
    """If an upgrade of Ray moves the name that `_on_loopback` sets, this fails first."""
    usual = ray.util.get_node_ip_address()
    with cluster_module._on_loopback():
        assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.util.get_node_ip_address() == usual


@pytest.mark.ray
@pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:ray\..*"
)  # Ray warns of settings that it makes itself
def test_a_ray_that_is_started_here_listens_on_the_loopback_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    us = psutil.Process()
    before = {process.pid for process in us.children(recursive=True)} | {us.pid}
    with cluster():
        ray.get(ray.remote(lambda: 1).remote())
        listening = [
            (process.name(), socket.laddr.ip)
            for process in us.children(recursive=True)
            if process.pid not in before
            for socket in process.net_connections("inet")
            if socket.status == psutil.CONN_LISTEN
        ]
    assert {"gcs_server", "raylet"} <= {name for name, _ in listening}
    loopback = ("127.0.0.1", "::ffff:127.0.0.1", "::1")
    assert [item for item in listening if item[1] not in loopback] == []


def test_a_store_inside_the_code_copy_of_a_job_is_refused(in_tmp, monkeypatch):
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    for inside in ("sqlite:///out/mlflow.db", f"sqlite:///{in_tmp}/mlflow.db", "out"):
        with pytest.raises(ResourcesError, match="is inside the copy of the code"):
            require_kept(inside)
    for kept in (f"sqlite:///{in_tmp.parent}/mlflow.db", "http://host:5000", "s3://bucket/runs"):
        require_kept(kept)
