"""The temporary folder, the signals and the address of a Ray that starts on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray

from ser_ray.cluster import local_ray
from ser_ray.cluster.connect import cluster
from ser_ray.cluster.local_ray import minimal_ray_on_loopback
from ser_ray.distributed.process_group import serve_store
from ser_ray.errors import ResourcesError


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

        def busy(**_: object) -> None:
            signal.raise_signal(signal.SIGTERM)  # before Ray has replaced the handler
            steps.append("started")

        steps: list[str] = []
        monkeypatch.setattr(ray, "init", busy)
        monkeypatch.setattr(ray, "shutdown", lambda: steps.append("stopped"))
        with pytest.raises(KeyboardInterrupt), cluster():
            pytest.fail("the block ran although a signal came while Ray started")
        assert steps == ["started", "stopped"], "Ray cannot stop a node that has started in part"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_private_switch_of_ray_still_makes_it_use_the_loopback() -> None:
    """If an upgrade of Ray moves the name that `minimal_ray_on_loopback` sets, this fails first."""
    usual = ray.util.get_node_ip_address()
    with minimal_ray_on_loopback():
        assert ray.util.get_node_ip_address() == "127.0.0.1"
    assert ray.util.get_node_ip_address() == usual


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_still_stops_a_verb_after_its_ray_has_ended() -> None:
    """Ray's C++ code removes the handler without Python's knowledge."""
    program = """
import signal
from ser_ray.cli.stop import Stopped, stopped_by_signals
from ser_ray.cluster.connect import cluster
with stopped_by_signals():
    with cluster("local"):
        pass
    try:
        signal.raise_signal(signal.SIGTERM)
    except Stopped:
        print("stopped")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


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
