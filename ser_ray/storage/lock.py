"""A lock on a folder: only the process that holds the lock may write into the folder.

The lock is a file in the folder, so it works on every filesystem that pyarrow opens, and between
machines that share nothing else. (`filelock` needs a local disk, and pyarrow has no conditional
writes to a bucket.) The holder sends heartbeats: every `HEARTBEAT_SECONDS`, it rewrites the file
with a higher number.

If the lock exists, a process that wants it asks the operating system whether the holder is running.
If the system does not know, for example because the holder is on another machine or in another
container, the process watches the file instead: the holder is alive if the file changes, and gone
if the file does not change for `STALE_SECONDS`. The clocks of two machines are never compared.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

import psutil
from pyarrow import fs

from ser_ray.errors import LockLostError, SerRayError
from ser_ray.storage.atomic import write_file
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import filesystem_of, location_inside

LOCK_NAME = "lock.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0
"""Seconds between two reads of a lock that another process may hold, or between two attempts to
release a lock."""
RELEASE_SECONDS = 15.0
"""Longest time in which the release of a lock in a bucket is tried again."""
SETTLE_SECONDS = 1.0
"""Seconds from writing a claim to reading it back. Other processes that also found no lock are
expected to write their claims within this time."""

logger = logging.getLogger(__name__)


class FolderLock:
    """The right to write into a folder, held within a `with` block.

    If another process holds the lock, the error reads like this:

        FOLDER/lock.json: process 12 on HOST is training under this name
        (since 2026-11-29 10:00:00); wait for it to end, or give another --name

    Args:
        location: the folder, which is created if it does not exist.
        error: the type of the error if the lock cannot be acquired.
        activity: what the holder does, such as `is training under this name`.
        advice: what the user can do, such as `wait for it to end, or give another --name`.
    """

    def __init__(
        self, location: str, error: type[SerRayError], *, activity: str, advice: str
    ) -> None:
        self._location = location_inside(location, LOCK_NAME)
        self._filesystem, self._folder = filesystem_of(location)
        self._path = f"{self._folder}/{LOCK_NAME}"
        self._error, self._activity, self._advice = error, activity, advice
        self._claim: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "process_started": psutil.Process().create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "beat": 0,  # number of heartbeats
        }
        self._last_heartbeat = 0.0
        self._is_lost = False
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Acquire the lock.

        Raises:
            SerRayError: another process holds the lock, or the folder cannot be written. The error
                has the type `error`.
        """
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
            self._acquire()
        except OSError as error:
            raise self._error(
                f"{self._location}: cannot be written ({error}); choose another folder, or make "
                "this one writable"
            ) from error
        self._last_heartbeat = time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, unless another process took it over.

        If a bucket does not answer, the method tries again for RELEASE_SECONDS. If the file cannot
        be deleted, it only logs a warning, because an exception here would hide the exception of
        the block.
        """
        self._is_released.set()
        self._thread.join()
        end = time.monotonic() + (RELEASE_SECONDS if "://" in self._location else 0)
        while problem := self._delete():
            if time.monotonic() >= end:
                logger.warning(
                    "%s: cannot be removed (%s); once this process has ended, another process can "
                    "take the lock over within %.0f seconds",
                    self._location,
                    problem,
                    STALE_SECONDS,
                )
                return
            time.sleep(POLL_SECONDS)

    def _delete(self) -> OSError | None:
        """Delete the file if it is still ours, and return the error that prevented this."""
        try:
            if self._is_ours():
                self._filesystem.delete_file(self._path)
        except OSError as error:
            return error
        return None

    def require_held(self) -> None:
        """Raise LockLostError if this process lost the lock.

        That happens if another process took the lock over after missed heartbeats, or if somebody
        deleted the file. The method accesses the storage only if a heartbeat is overdue, for
        example because the machine was asleep, or if the lock is lost. It is therefore cheap enough
        for every training step.
        """
        if time.time() - self._last_heartbeat > 2 * HEARTBEAT_SECONDS:
            with contextlib.suppress(OSError):
                self._send_heartbeat()
        if self._is_lost:
            raise LockLostError(self._describe(self._read()))

    def _acquire(self) -> None:
        claim = self._read()
        was_abandoned = claim is not None and self._was_abandoned(claim)
        if isinstance(self._filesystem, fs.LocalFileSystem) and not was_abandoned:
            try:
                with Path(self._path).open("xb") as file:
                    file.write(self._content())
            except FileExistsError:
                raise self._in_use_error(self._read()) from None
            return
        # Several processes may write the file at the same time. The last one gets the lock.
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise self._in_use_error(self._read())

    def _was_abandoned(self, claim: dict[str, Any]) -> bool:
        """Return whether the holder has ended without releasing the lock.

        If the operating system does not know whether the holder is running, this takes up to
        STALE_SECONDS.

        Raises:
            SerRayError: the holder is running, or another process took the lock over.
        """
        is_running = _is_running(claim)
        if is_running:
            raise self._in_use_error(claim)
        if is_running is False:
            return True
        logger.warning(
            "%s: is held by %s, which may have ended; waiting up to %.0f seconds for its heartbeat",
            self._location,
            _describe_holder(claim),
            STALE_SECONDS,
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            latest = self._read()
            if latest is None:
                return False
            if latest != claim:
                raise self._in_use_error(latest)
        return True

    def _keep_alive(self) -> None:
        while not self._is_released.wait(HEARTBEAT_SECONDS) and not self._is_lost:
            with contextlib.suppress(OSError):  # the storage may be unavailable for a moment
                self._send_heartbeat()

    def _send_heartbeat(self) -> None:
        if not self._is_ours():
            self._is_lost = True
            return
        self._claim["beat"] += 1
        self._write()
        self._last_heartbeat = time.time()

    def _is_ours(self) -> bool:
        claim = self._read()
        return claim is not None and claim.get("token") == self._claim["token"]

    def _content(self) -> bytes:
        return json.dumps(self._claim).encode()

    def _write(self) -> None:
        write_file(self._filesystem, self._path, self._content())

    def _read(self) -> dict[str, Any] | None:
        """Return the holder's claim: `{}` if it is incomplete, and None if there is no lock."""
        try:
            with self._filesystem.open_input_file(self._path) as file:
                return read_object(file.read())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _in_use_error(self, claim: dict[str, Any] | None) -> SerRayError:
        return self._error(self._describe(claim))

    def _describe(self, claim: dict[str, Any] | None) -> str:
        if claim is None:
            problem = f"the lock was deleted, perhaps because another process {self._activity}"
        else:
            since = f" (since {claim['since']})" if claim else ""
            problem = f"{_describe_holder(claim)} {self._activity}{since}"
        return f"{self._location}: {problem}; {self._advice}"


def _describe_holder(claim: dict[str, Any]) -> str:
    return f"process {claim['pid']} on {claim['host']}" if claim else "another process"


def _is_running(claim: dict[str, Any]) -> bool | None:
    """Return whether the process that wrote a claim is running; None if unknown."""
    if (claim.get("host"), claim.get("pid_namespace")) != (socket.gethostname(), _pid_namespace()):
        return None
    try:
        started = psutil.Process(claim["pid"]).create_time()
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None
    # A difference means that the id was reused, or that the machine's clock was corrected.
    return True if abs(started - claim["process_started"]) < 1 else None


def _pid_namespace() -> str:
    """Return this process's PID namespace. Process ids can be compared only within a namespace."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the result is not a path
    except OSError:  # not Linux
        return ""
