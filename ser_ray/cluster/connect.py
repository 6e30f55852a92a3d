"""Joins a Ray cluster, or starts Ray on this machine.

A single worker runs without Ray, unless the user names a cluster (`needs_ray`).
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
"""Environment variable with the runtime environment of a Ray job."""
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
"""Environment variable with the lowest severity of messages that Ray's C++ code writes."""
CONNECT_SECONDS = 5.0
"""Longest wait for the connection to a cluster. Ray itself retries a refused port for minutes."""

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


def place_of_training(address: str, workers: int) -> str:
    """Return where this many workers train, as text."""
    return place_of_ray(address) if needs_ray(address, workers) else "in this process, without Ray"


def place_of_ray(address: str) -> str:
    """Return which cluster `cluster` connects to, as text."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    is_local = address in ("", "local")
    return "on Ray, started on this machine" if is_local else f"on the Ray cluster at {address}"


@contextmanager
def cluster(address: str = "", *, has_actor_pool: bool = False) -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    Joins the cluster at `address`, or else the cluster of RAY_ADDRESS or of the Ray job. If none of
    these is set, or the address is `local`, Ray starts on this machine, listens only on the
    loopback, and stops after the block. A nested block uses the connection of the outer block.

    Args:
        address: address of the cluster.
        has_actor_pool: whether Ray Data uses a pool of actors in the block. Ray logs a harmless
            error about such pools, so errors of its C++ code are then hidden too.

    Raises:
        ResourcesError: no cluster answers at the address, the address is a job server, Ray does not
            start on this machine, or no folder can hold Ray's temporary files.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    source = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address
    logger.info("%-12s %s", "Ray", f"joining {address}" if address else "starting on this machine")
    with nullcontext() if address else session_folder() as folder:
        try:
            _init(address, source, folder, "fatal" if has_actor_pool else "error")
            yield
        finally:
            with keep_signal_handlers():
                ray.shutdown()


def _init(address: str, source: str, folder: str | None, log_level: str) -> None:
    """Join a cluster, or start Ray on this machine if the address is empty.

    Args:
        address: address of the cluster.
        source: option or variable that holds the address, for messages.
        folder: folder for the temporary files of Ray if Ray starts on this machine.
        log_level: least severity of the messages that Ray's C++ code writes to the terminal.
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
    except (ValueError, RuntimeError) as error:
        if not address:
            raise
        raise ResourcesError(
            f"the Ray cluster at {address}, which {source} names, cannot be joined: {error}"
        ) from error
    except OSError as error:
        if not address:
            raise _start_error(error) from error
        raise ResourcesError(
            f"no Ray cluster answers at {address}, which {source} names ({error}): start it with "
            "`ray start --head`; if it is running, it may require a token: set "
            "RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token; or leave "
            f"out {source} to use this machine only"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises a bare Exception if it starts for over 30 s
            raise
        raise _start_error(error) from error


@contextmanager
def _quiet_backend(log_level: str) -> Iterator[None]:
    """Keep less severe messages of Ray's C++ code off the terminal, if Ray starts in the block.

    The variable LOG_LEVEL hides them, but Ray reports on standard error that it has read the
    variable. Therefore standard error is discarded while Ray starts. Errors matter: if its GCS
    process is gone for a minute, Ray ends this process, and only this error says why.
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
        f"Ray did not start on this machine ({error}): it is too busy, or short of memory or disk "
        "space; run the same command again later, or name a cluster with --address"
    )


def _require_listener(address: str, source: str) -> None:
    """Check that a server listens at the address of a cluster. This takes at most CONNECT_SECONDS.

    Raises:
        ResourcesError: the address has the wrong form.
        OSError: no server listens, or the host name is unknown.
    """
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise ResourcesError(
            f"{address} is a job server, which only accepts jobs: set RAY_API_SERVER_ADDRESS to it "
            "for `ray job submit`; --address and RAY_ADDRESS have the form HOST:6379"
        )
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # the port is not a number
        host, port = None, None
    if not host or not port:
        raise ResourcesError(f"{source} is {address}: it must be HOST:PORT, such as 10.0.0.1:6379")
    socket.create_connection((host, port), CONNECT_SECONDS).close()
