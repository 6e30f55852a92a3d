"""Starting Ray on this machine: its folder for temporary files, its address and its signals."""

import errno
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ser_ray.errors import ResourcesError
from ser_ray.storage.paths import absolute

SESSION_BYTES = len("/ray/session_2026-11-29_15-05-10_123456_1234567/sockets/plasma_store")
"""Bytes that Ray adds to the path of its temporary folder to name a socket."""
LONGEST_ROOT = 107 - SESSION_BYTES - len("/ray-12345678")
"""Longest path, in bytes, in which Ray's folder can be made: Linux allows a socket's path 107."""
FREE_BYTES = 100_000_000
"""Space that the logs of a session may need."""

logger = logging.getLogger(__name__)


@contextmanager
def session_folder() -> Iterator[None]:
    """Keep the files of a Ray that is started in the block in a folder of its own, then delete it.

    Ray ends without a reason if the path is too long for its sockets, which the TMPDIR of a batch
    system often is, or if the disk is full.

    Raises:
        ResourcesError: no folder for temporary files can be used.
    """
    before = os.environ.get("RAY_TMPDIR")
    problems = []
    for name, root in (
        ("RAY_TMPDIR", before),
        ("TMPDIR", os.environ.get("TMPDIR")),
        ("the default", "/tmp"),
    ):
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
            f"{LONGEST_ROOT} bytes that has {FREE_BYTES // 1_000_000} MB of free space"
        )
    if problems:
        logger.warning("%s: %s is used", "; ".join(problems), folder)
    os.environ["RAY_TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def _folder_in(root: str) -> str:
    """Make a folder for a session of Ray.

    Raises:
        OSError: the path is too long, missing or not writable, or its disk is full.
    """
    root = absolute(root)
    if len(os.fsencode(root)) > LONGEST_ROOT:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    if shutil.disk_usage(root).free < FREE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return tempfile.mkdtemp(prefix="ray-", dir=root)


@contextmanager
def signals_kept() -> Iterator[None]:
    """Keep this process's handlers of signals while Ray starts in the block.

    Ray replaces the handler of SIGTERM. Its processes inherit that SIGHUP is blocked, so a closed
    terminal does not end them while this process still needs them to stop in order.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    except SystemExit as stop:
        if stop.code == signal.SIGTERM and callable(handler):  # Ray's handler raised it
            handler(signal.SIGTERM, None)
        raise
    finally:
        if callable(handler):
            signal.signal(signal.SIGTERM, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def on_loopback() -> Iterator[None]:
    """Let a Ray that is started in the block use the loopback as this machine's address.

    Ray has no public setting for this: it reads RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER only when it is
    imported, and replaces `ray.init(_node_ip_address="127.0.0.1")` with the machine's address.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
