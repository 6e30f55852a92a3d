"""Joins a Ray cluster, or starts Ray on this machine.

A single worker runs without Ray, except in the cases that `needs_ray` lists.
"""

import logging
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from urllib.parse import urlsplit

from ser_ray.cluster.local_ray import keep_signal_handlers, minimal_ray_on_loopback, session_folder
from ser_ray.errors import ResourcesError

JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable that Ray sets in a job, with the configuration of the job as JSON."""
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
"""Environment variable with the lowest severity of messages that Ray's C++ code writes."""
CONNECT_SECONDS = 5.0
"""Longest wait for the connection to a cluster, and for its first answer. Ray itself retries for
minutes if a port is refused or does not answer."""
HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""First bytes from a client of HTTP/2, which gRPC uses (RFC 9113, 3.4): an empty SETTINGS frame."""
FRAME_HEADER, SETTINGS = 9, 4
"""Bytes in the header of a frame, and the type of the first frame of a server; the type is the
fourth byte."""

_is_started_here = False

logger = logging.getLogger(__name__)


def needs_ray(address: str, workers: int = 1) -> bool:
    """Return whether this many workers run on Ray. If not, the only worker runs in this process.

    Several workers always run on Ray. One worker runs on Ray if this process is connected to it or
    runs in a Ray job, or if `address` or RAY_ADDRESS is set. The address `local` starts Ray on this
    machine.
    """
    clusters = (address, os.environ.get("RAY_ADDRESS"), os.environ.get(JOB_CONFIG))
    return workers > 1 or any(clusters) or is_connected()


def is_connected() -> bool:
    """Return whether this process is connected to Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def is_started_here() -> bool:
    """Return whether this process is connected to a Ray that `cluster` started on this machine."""
    return _is_started_here


def place_of_training(address: str, workers: int) -> str:
    """Describe for messages where this many workers train."""
    return place_of_ray(address) if needs_ray(address, workers) else "in this process, without Ray"


def place_of_ray(address: str) -> str:
    """Describe for messages where Ray runs in a `cluster(address)` block."""
    address = _cluster_address(address)
    return f"on the Ray cluster at {address}" if address else "on Ray, started on this machine"


def _cluster_address(address: str) -> str:
    """Return the address of the cluster to join; empty if Ray starts on this machine."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    return "" if address == "local" else address


@contextmanager
def cluster(address: str = "", *, has_actor_pool: bool = False) -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    Joins the cluster at `address`, or else at RAY_ADDRESS, which Ray sets in a job. If both are
    empty, or the address is `local`, Ray starts on this machine, listens only on the loopback
    interface, and stops after the block. A nested block uses the connection of the outer block.

    Args:
        address: address of the cluster.
        has_actor_pool: whether Ray Data uses a pool of actors in the block. If so, the errors that
            Ray's C++ code logs are hidden, because it logs a harmless error about such pools.

    Raises:
        ResourcesError: no cluster at the address can be joined, the address has the wrong form, Ray
            does not start on this machine, or no folder can hold Ray's temporary files.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    source = "--address" if address else "RAY_ADDRESS"
    address = _cluster_address(address)
    logger.info("%-12s %s", "Ray", f"joining {address}" if address else "starting on this machine")
    global _is_started_here
    with nullcontext() if address else session_folder() as folder:
        try:
            _init(address, source, folder, "fatal" if has_actor_pool else "error")
            _is_started_here = not address
            yield
        finally:
            _is_started_here = False
            with keep_signal_handlers():
                ray.shutdown()


def _init(address: str, source: str, folder: str | None, log_level: str) -> None:
    """Join a cluster, or start Ray on this machine if the address is empty.

    Args:
        address: address of the cluster.
        source: the option or variable that gave the address; error messages name it.
        folder: folder for the temporary files of Ray if Ray starts on this machine.
        log_level: lowest severity of the messages that Ray's C++ code writes to the terminal.
    """
    import ray

    try:
        if address:
            _require_listener(address, source)
        with (
            keep_signal_handlers(),
            _quiet_backend(log_level),
            nullcontext() if address else minimal_ray_on_loopback(),
        ):
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                # ser_ray itself reports progress and errors; Ray's logs are in files.
                log_to_driver=False,
                _temp_dir=folder,
            )
    except (ValueError, RuntimeError, OSError) as error:
        if not address:
            raise _start_error(error) from error
        place = f"{address}, the value of {source}"
        if not isinstance(error, OSError):
            raise ResourcesError(
                f"the Ray cluster at {place}, cannot be joined: {error}"
            ) from error
        raise ResourcesError(
            f"no Ray cluster answers at {place} ({error}). If the cluster is not running, start it "
            "with `ray start --head`. If it requires a token, set RAY_AUTH_MODE=token, and put the "
            "token into RAY_AUTH_TOKEN or ~/.ray/auth_token. To use only this machine, leave out "
            f"{source}"
        ) from error
    except Exception as error:
        # Ray raises a plain Exception if it has not started after 30 s.
        if type(error) is not Exception:
            raise
        raise _start_error(error) from error


@contextmanager
def _quiet_backend(log_level: str) -> Iterator[None]:
    """Hide messages of Ray's C++ code below `log_level`, if Ray starts in the block.

    The variable LOG_LEVEL hides them, but Ray reports on standard error that it has read the
    variable. Therefore standard error is discarded while Ray starts. The level is normally `error`
    and not `fatal`: if Ray loses its GCS process for a minute, it ends this process, and only an
    error message of the C++ code gives the reason.
    """
    if LOG_LEVEL in os.environ:
        yield
        return
    terminal, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.environ[LOG_LEVEL] = log_level
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(null)
        del os.environ[LOG_LEVEL]


def _start_error(error: Exception) -> ResourcesError:
    return ResourcesError(
        f"Ray did not start on this machine ({error}). The machine may be too busy, or short of "
        "memory or disk space. Run the same command again later, or name a cluster with --address"
    )


def _require_listener(address: str, source: str) -> None:
    """Check that a gRPC server answers at the address of a cluster.

    The address `auto` is not checked. With RAY_USE_TLS, only the connection is checked.

    Raises:
        ResourcesError: the address has the wrong form.
        OSError: no server listens or answers, or the host name is unknown.
    """
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise ResourcesError(
            f"{address} is a job server, which only accepts jobs. To submit a job to it, set "
            "RAY_API_SERVER_ADDRESS to this address, and use `ray job submit`. --address and "
            "RAY_ADDRESS have the form HOST:PORT, such as 10.0.0.1:6379"
        )
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # the port is not a number
        host, port = None, None
    if not host or not port:
        raise ResourcesError(f"{source} is {address}: it must be HOST:PORT, such as 10.0.0.1:6379")
    with socket.create_connection((host, port), CONNECT_SECONDS) as connection:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        connection.sendall(HTTP2_GREETING)
        if connection.recv(FRAME_HEADER)[3:4] != bytes([SETTINGS]):
            raise ConnectionError("what answers is not Ray")
