"""Prepares the start of Ray on this machine: its temporary folder, its address and its signals."""

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ser_ray.errors import ResourcesError
from ser_ray.storage.paths import absolute

SESSION_BYTES = len("/session_2026-11-29_15-05-10_123456_1234567/sockets/plasma_store")
"""Ray's longest path of a socket is this many bytes longer than that of its temporary folder."""
MAX_ROOT_BYTES = 107 - SESSION_BYTES - len("/ray-12345678")
"""Longest path, in bytes, of the folder that contains Ray's temporary folder. The path of a socket
may have 107 bytes on Linux."""
FREE_BYTES = 100_000_000
"""Free disk space that Ray's logs may need."""
DELETE_SECONDS, POLL_SECONDS = 10.0, 0.1
"""Longest time to delete the files of a session, and the time between two attempts."""
UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's `Node` that start the dashboard, the autoscaler and the process that sends the
workers' logs to the driver."""

logger = logging.getLogger(__name__)


@contextmanager
def session_folder() -> Iterator[str]:
    """Yield a temporary folder for a Ray that starts in the `with` block; delete it at the end.

    Ray exits without giving a reason if the disk is full or the path is too long for Ray's sockets,
    so both are checked first. On batch systems, the path in TMPDIR is often too long.

    Raises:
        ResourcesError: none of RAY_TMPDIR, TMPDIR and /tmp can be used.
    """
    roots = {name: os.environ[name] for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)}
    problems = []
    for name, root in (roots | {"the default": "/tmp"}).items():
        try:
            folder = _folder_in(root)
            break
        except OSError as error:
            problems.append(f"{name}, {root}, cannot hold Ray's files ({error.strerror})")
    else:
        raise ResourcesError(
            f"{'; '.join(problems)}: set RAY_TMPDIR to a folder that has "
            f"{FREE_BYTES // 1_000_000} MB of free space and a path of at most {MAX_ROOT_BYTES} "
            "bytes"
        )
    if problems:
        logger.warning("%s: %s is used", "; ".join(problems), folder)
    try:
        yield folder
    finally:
        _delete(folder)


def _delete(folder: str) -> None:
    """Delete the folder of a session; retry while the session's last processes write into it."""
    ends = time.monotonic() + DELETE_SECONDS
    while Path(folder).exists() and time.monotonic() < ends:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(POLL_SECONDS)


def _folder_in(root: str) -> str:
    """Make a folder for Ray's temporary files.

    Raises:
        OSError: the path is too long, missing or not writable, or the disk has too little space.
    """
    root = absolute(root)
    if len(os.fsencode(root)) > MAX_ROOT_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if shutil.disk_usage(root).free < FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return tempfile.mkdtemp(prefix="ray-", dir=root)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Keep this process's signal handlers even if Ray starts or ends in the `with` block.

    Ray may replace the handler of SIGTERM when Ray starts, and Ray's C++ code removes the handler
    when Ray ends. The handler is restored after the block. A signal that arrives in the block is
    handled after the block, because Ray cannot stop a partly started node. SIGHUP is blocked while
    Ray starts, and Ray's processes inherit this. Therefore they survive when the terminal closes,
    and this process can still use them while it stops.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGTERM, signal.SIGHUP
    handlers = {number: own for number in numbers if callable(own := signal.getsignal(number))}
    received: list[int] = []
    for number in handlers:
        signal.signal(number, lambda number, _: received.append(number))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit as stop:
        # SIGTERM arrived after Ray had replaced the handler, and Ray's handler exits.
        if stop.code == signal.SIGTERM and signal.SIGTERM in handlers:
            received.append(signal.SIGTERM)
        raise
    finally:
        for number, own in handlers.items():
            signal.signal(number, own)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for received_number in received[:1]:
            handlers[signal.Signals(received_number)](received_number, None)


@contextmanager
def minimal_ray_on_loopback() -> Iterator[None]:
    """Let a Ray that starts in the `with` block use only the loopback interface, and few processes.

    In the block, the methods in UNUSED do nothing. Otherwise Ray starts the dashboard's server and
    waits for it, even with `include_dashboard=False`. The node's agent runs without its HTTP
    server, as in an installation without `ray[default]`. Ray has no public settings for these
    processes or for the address. Ray reads RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER, which would set the
    address, only when Ray is imported. If the address 127.0.0.1 is given to `ray.init`, Ray uses
    the machine's address instead.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    replacements: list[tuple[Any, str, Any]] = [
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not needed")),
        # Ray's own handler exits, also while Ray starts.
        (utils, "set_sigterm_handler", lambda handler: None),
        *((Node, name, lambda node, **_: None) for name in UNUSED),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
