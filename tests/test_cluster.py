"""Errors that a user meets when Ray does not start, or when a node cannot see the files.

Most tests replace Ray.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from ser_ray.cluster import local_ray, resources, shared_files
from ser_ray.cluster.connect import JOB_CONFIG, LOG_LEVEL, _quiet_backend, cluster, needs_ray
from ser_ray.cluster.local_ray import small_and_on_loopback
from ser_ray.cluster.resources import (
    cpus_per_worker,
    memory_of_this_machine,
    nodes_within_reach,
    require_workers,
    trains_on_gpus,
)
from ser_ray.cluster.shared_files import one_of_each_folder, require_kept
from ser_ray.distributed.process_group import serve_store
from ser_ray.errors import ResourcesError
from ser_ray.inference import batch
from ser_ray.shards import prepare
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.read import open_shards
from ser_ray.storage.paths import absolute
from tests.clips import voice, write_wav


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ConnectionError("refused"),
            r"no Ray cluster answers at .* start it with `ray start.* set RAY_AUTH_MODE=token",
        ),
        (
            RuntimeError("Version mismatch"),
            r"at 127.0.0.1:\d+, which --address names, cannot be joined: Version mismatch",
        ),
        (Exception("timed out"), r"did not start on this machine \(timed out\): it is too busy"),
    ],
)
def test_a_ray_that_does_not_start_is_a_resources_error(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ResourcesError, match=message), cluster(address):
            pytest.fail("the block ran without a connection")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1, which RAY_ADDRESS names"),
        ("no-such-name.invalid:6379", "no Ray cluster answers at no-such-name.invalid:6379, which"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1, which RAY_ADDRESS"),
        ("head", "RAY_ADDRESS is head: it must be HOST:PORT, such as 10.0.0.1:6379"),
        ("head:port", "RAY_ADDRESS is head:port: it must be HOST:PORT"),
    ],
)
def test_a_cluster_that_is_away_is_named_before_ray_is_asked(
    address: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray tries for minutes"))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ResourcesError, match=message), cluster():
        pytest.fail("the block ran without a connection")


@pytest.mark.parametrize(
    ("address", "environment", "workers", "expected"),
    [
        ("", {}, 1, False),
        ("", {}, 2, True),
        ("local", {}, 1, True),
        ("head:6379", {}, 1, True),
        ("", {"RAY_ADDRESS": "head:6379"}, 1, True),
        ("", {JOB_CONFIG: "{}"}, 1, True),
    ],
)
def test_one_worker_needs_ray_only_if_a_cluster_was_named(
    address: str,
    environment: dict[str, str],
    workers: int,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", JOB_CONFIG):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert needs_ray(address, workers) == expected


def test_a_connected_process_uses_its_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    assert needs_ray("")


def test_without_ray_the_nodes_are_this_machine_within_its_containers_limits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits = {"cpu.max": "150000 100000", "memory.max": "1000"}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setattr(resources, "_container_limit", lambda name: limits.get(name, ""))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert nodes_within_reach() == [{"CPU": 1, "GPU": 3}]
    assert trains_on_gpus("auto")
    assert not trains_on_gpus("cpu")
    assert cpus_per_worker(1) == 1
    assert memory_of_this_machine() == 1000
    limits.clear()
    assert cpus_per_worker(1) == 4
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert not trains_on_gpus("auto")
    with pytest.raises(ResourcesError, match=r"the cluster has 0: .* --device cpu"):
        require_workers(1, cpus=1, gpus=1)


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The folders of the sessions that a stand-in for Ray was given, in short temporary paths."""
    given: list[str] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(ray, "init", lambda **named: given.append(named["_temp_dir"]))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    yield given
    assert not any(Path(folder).exists() for folder in given), "a session leaves nothing"


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize("fault", ["long", "missing", "full", "read-only"])
def test_a_folder_that_cannot_hold_a_session_is_replaced(
    variable: str, fault: str, session: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as root:
        named = Path(root, "n" * (100 if fault == "long" else 1))
        if fault != "missing":
            named.mkdir()
        if fault == "full":
            empty = SimpleNamespace(free=0)
            usage = {str(named): empty}
            real = shutil.disk_usage
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage.get(path) or real(path))
        if fault == "read-only":  # for any user, and root too
            named.rmdir()
            named.write_text("")
        monkeypatch.setenv(variable, str(named))
        with cluster():
            assert session[0].startswith("/tmp/ray-")
            assert len(session[0]) + local_ray.SESSION_BYTES <= 107
        assert f"{variable}, {named}, cannot hold Ray's files (" in caplog.text
        assert os.environ.get(variable) == str(named)


def test_a_short_folder_holds_the_session(
    session: list[str], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as root:
        monkeypatch.setenv("TMPDIR", root)
        with cluster():
            assert Path(session[0]).parent == Path(root)
            assert Path(session[0]).is_dir()
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_a_machine_without_any_usable_folder_is_told_which_variable_helps(
    session: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with (
        pytest.raises(ResourcesError, match=r"\(No space left on device\): set RAY_TMPDIR to"),
        cluster(),
    ):
        pytest.fail("the block ran without a folder")


def test_a_signal_handler_outlives_the_start_of_ray(
    session: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ours(*_: object) -> None:
        raise KeyboardInterrupt

    def init(**_: object) -> None:
        """What Ray does: its processes inherit the signals that are blocked now."""
        assert signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, ours)
    try:
        with cluster():
            assert signal.getsignal(signal.SIGTERM) is ours
            assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

        def interrupted(**_: object) -> None:
            init()
            signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(ray, "init", interrupted)
        with pytest.raises(KeyboardInterrupt), cluster():
            pytest.fail("the block ran although a signal came while Ray started")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_ray_writes_while_it_starts_does_not_reach_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _quiet_backend():
        os.write(2, b"Set ray log level")
        assert os.environ[LOG_LEVEL] == "fatal"
    os.write(2, b"a message of ours")
    assert capfd.readouterr().err == "a message of ours"
    assert LOG_LEVEL not in os.environ


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
    assert one_of_each_folder(["/packed/a.parquet#audio=000000007"]) == ["/packed/a.parquet"]
    monkeypatch.setattr(shared_files, "FOLDERS_ASKED", 4)
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
    """If an upgrade of Ray moves the name that `small_and_on_loopback` sets, this fails first."""
    usual = ray.util.get_node_ip_address()
    with small_and_on_loopback():
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
        # The process group of a training is the one listener that Ray does not start itself.
        store = ray.remote(lambda: serve_store()).remote()
        assert ray.get(store)[0] == "127.0.0.1"
        commands = [
            " ".join(process.cmdline())
            for process in us.children(recursive=True)
            if process.pid not in before
        ]
        listening = [
            (process.name(), socket.laddr.ip)
            for process in us.children(recursive=True)
            if process.pid not in before
            for socket in process.net_connections("inet")
            if socket.status == psutil.CONN_LISTEN
        ]
    assert {"gcs_server", "raylet"} < {name for name, _ in listening}
    assert any(name.startswith("ray::") for name, _ in listening)
    unused = ("dashboard/dashboard.py", "autoscaler/_private/monitor.py", "log_monitor.py")
    assert [command for command in commands if any(name in command for name in unused)] == []
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


def test_in_a_job_a_relative_path_is_refused_before_shards_are_missed(in_tmp, monkeypatch):
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://code.zip"}}))
    with pytest.raises(ResourcesError, match="shards: is inside the copy of the code"):
        open_shards(absolute("shards"))
    with pytest.raises(ResourcesError, match="shards: is inside the copy of the code"):
        prepare.prepare(PrepareConfig(corpus="/nowhere", shards="shards"))
    assert list(in_tmp.iterdir()) == []
