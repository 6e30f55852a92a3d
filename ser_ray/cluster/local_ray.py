"""Prepares the start of Ray on this machine: its temporary folder, its address and its signals."""

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ser_ray.errors import ResourcesError
from ser_ray.storage.paths import absolute

SESSION_BYTES = len("/session_2026-11-29_15-05-10_123456_1234567/sockets/plasma_store")
"""Bytes that Ray adds to the path of its temporary folder for the longest path of a socket."""
MAX_ROOT_BYTES = 107 - SESSION_BYTES - len("/ray-12345678")
"""Longest path of the parent of Ray's folder. Linux allows 107 bytes for the path of a socket."""
FREE_BYTES = 100_000_000
"""Free disk space that Ray's logs may need."""
UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Methods of Ray's `Node` that start the dashboard, the autoscaler and the process that sends the
workers' logs to the driver."""

logger = logging.getLogger(__name__)


@contextmanager
def session_folder() -> Iterator[str]:
    """Yield a temporary folder for a Ray that starts in the `with` block; delete it at the end.

    If the disk is full, or the path is too long for Ray's sockets, Ray exits without giving a
    reason. On batch systems, TMPDIR is often too long.

    Raises:
        ResourcesError: neither RAY_TMPDIR, TMPDIR nor /tmp can be used.
    """
    roots = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "TMPDIR")}
    problems = []
    for name, root in (roots | {"the default": "/tmp"}).items():
        if not root:
            continue
        try:
            folder = _folder_in(root)
            break
        except OSError as error:
            problems.append(f"{name}, {root}, cannot hold Ray's files ({error.strerror})")
    else:
        raise ResourcesError(
            f"{'; '.join(problems)}: set RAY_TMPDIR to a folder with a path of at most "
            f"{MAX_ROOT_BYTES} bytes that has {FREE_BYTES // 1_000_000} MB of free space"
        )
    if problems:
        logger.warning("%s: %s is used", "; ".join(problems), folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _folder_in(root: str) -> str:
    """Make a folder for Ray's temporary files.

    Raises:
        OSError: the path is too long, missing or not writable, or its disk is full.
    """
    root = absolute(root)
    if len(os.fsencode(root)) > MAX_ROOT_BYTES:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if shutil.disk_usage(root).free < FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return tempfile.mkdtemp(prefix="ray-", dir=root)


@contextmanager
def keep_signal_handlers() -> Iterator[None]:
    """Keep this process's signal handlers although Ray starts or ends in the `with` block.

    Ray replaces the handler of SIGTERM when it starts, and its C++ code removes it when it ends. It
    is restored after the block. SIGHUP is blocked while Ray starts, and Ray's processes inherit
    this. Therefore they survive when the terminal closes, and this process can still use them while
    it stops.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit as stop:
        # SIGTERM arrived after Ray had replaced the handler, and Ray's handler exits.
        if stop.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def minimal_ray_on_loopback() -> Iterator[None]:
    """Let a Ray that starts in the `with` block use only the loopback, and few processes.

    In the block, the methods in UNUSED do nothing. Otherwise Ray starts the dashboard's server and
    waits for it, even with `include_dashboard=False`. The node's agent runs without its HTTP
    server, as in an installation without `ray[default]`. Ray has no public settings for these
    processes or for the address. It reads RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER only when it is
    imported, and replaces `ray.init(_node_ip_address="127.0.0.1")` with the machine's address.
    """
    from ray._private import ray_constants, utils
    from ray._private.node import Node

    replacements: list[tuple[Any, str, Any]] = [
        (ray_constants, "ENABLE_RAY_CLUSTER", False),
        (utils, "get_dashboard_dependency_error", lambda: ImportError("not needed")),
    ]
    replacements += [(Node, name, lambda node, **_: None) for name in UNUSED]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
