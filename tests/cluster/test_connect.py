"""Joining a Ray cluster, and the errors if Ray does not start or answer. Most tests replace Ray."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

import pytest
import ray

from ser_ray.cluster import connect
from ser_ray.cluster.connect import JOB_CONFIG, LOG_LEVEL, _quiet_backend, cluster, needs_ray
from ser_ray.errors import ResourcesError

GRPC_ANSWER = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@contextmanager
def server_that_says(answer: bytes) -> Iterator[str]:
    """Yield the address of a server that sends `answer` to its first client."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection, suppress(ConnectionError):
                connection.sendall(answer)
                while connection.recv(1000):  # until the client closes the connection
                    pass

        Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (
            ConnectionError("refused"),
            r"no Ray cluster answers at .* start it with `ray start.* set RAY_AUTH_MODE=token",
        ),
        (
            RuntimeError("Version mismatch"),
            r"at 127.0.0.1:\d+, the value of --address, cannot be joined: Version mismatch",
        ),
        (
            Exception("timed out"),
            r"start on this machine \(timed out\)\. The machine may be",
        ),
    ],
)
def test_a_ray_that_does_not_start_is_a_resources_error(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise failure

    monkeypatch.setattr(ray, "init", init)
    with (
        server_that_says(GRPC_ANSWER) as address,
        pytest.raises(ResourcesError, match=message),
        cluster(address),
    ):
        pytest.fail("the block ran without a connection")


@pytest.mark.parametrize("failure", [RuntimeError, ValueError, OSError, Exception])
def test_a_ray_that_does_not_start_here_is_a_resources_error(
    failure: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise failure("no port")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    message = r"Ray did not start on this machine \(no port\)\. The machine may be"
    with pytest.raises(ResourcesError, match=message), cluster():
        pytest.fail("the block ran without Ray")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1, the value of RAY_ADDRESS"),
        ("no-such-name.invalid:6379", "no Ray cluster answers at no-such-name.invalid:6379, the"),
        ("ray://127.0.0.1:1", "no Ray cluster answers at ray://127.0.0.1:1, the value of"),
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
    ("answer", "reason"),
    [(b"", "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers is not Ray")],
)
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_server_that_hangs_or_is_another_program_is_refused_within_seconds(
    scheme: str, answer: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an SSH tunnel to a cluster that is gone, or a stopped process of Ray, hang."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray tries for minutes"))
    monkeypatch.setattr(connect, "CONNECT_SECONDS", 0.5)
    start = time.monotonic()
    with server_that_says(answer) as address:
        monkeypatch.setenv("RAY_ADDRESS", f"{scheme}{address}")
        message = rf"answers at {scheme}{address}, the value of RAY_ADDRESS \({reason}\)"
        with pytest.raises(ResourcesError, match=message), cluster():
            pytest.fail("the block ran without a connection")
    assert time.monotonic() - start < 5


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


def test_what_ray_writes_while_it_starts_does_not_reach_the_terminal(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with _quiet_backend("error"):
        os.write(2, b"Set ray log level")
        assert os.environ[LOG_LEVEL] == "error"
    os.write(2, b"a message of ours")
    assert capfd.readouterr().err == "a message of ours"
    assert LOG_LEVEL not in os.environ


@pytest.mark.ray
def test_ray_says_why_it_ends_a_process_whose_cluster_is_gone() -> None:
    program = """
import time
import psutil
from ser_ray.cluster.connect import cluster
with cluster():
    (gcs,) = (p for p in psutil.Process().children() if p.name() == "gcs_server")
    gcs.kill()
    time.sleep(300)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1
    assert "Failed to connect to GCS within 3 seconds" in ended.stderr


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
