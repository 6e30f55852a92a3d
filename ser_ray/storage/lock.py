"""A lock on a folder: only the process that holds the lock may write into the folder.

The lock is a file in the folder, so it works on every filesystem that pyarrow opens, and between
machines that share nothing else. (`filelock` needs a local disk, and pyarrow has no conditional put
for buckets.) The holder rewrites the file every `BEAT_SECONDS` and increases the number in it.

A process that finds a lock of its own machine asks the operating system whether the holder is
running. If the lock is from another machine, it watches the file: the holder is alive if the file
changes, and gone if the file does not change for `STALE_SECONDS`. The clocks of two machines are
never compared.
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

from ser_ray.errors import SerRayError
from ser_ray.storage.atomic import write_file
from ser_ray.storage.paths import filesystem_of, location_inside

LOCK_NAME = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
POLL_SECONDS = 1.0
"""Time between two reads of a lock that another process may hold."""
SETTLE_SECONDS = 1.0
"""Wait before a claim is checked, so that processes with simultaneous claims have all written."""

logger = logging.getLogger(__name__)


class Lock:
    """The right to write into a folder, held within a `with` block.

    Args:
        location: the folder, which is created if it does not exist.
        error: the type of the error that is raised if the lock cannot be held.
        advice: the end of the error message, after the name of the process that holds the lock:
            what that process does, and what the user can do about it.
    """

    def __init__(self, location: str, error: type[SerRayError], advice: str) -> None:
        self._location = location_inside(location, LOCK_NAME)
        self._filesystem, self._folder = filesystem_of(location)
        self._path = f"{self._folder}/{LOCK_NAME}"
        self._error, self._advice = error, advice
        self._claim = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_namespace": _pid_namespace(),
            "process_started": psutil.Process().create_time(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._num_beats = 0
        self._last_beat = 0.0
        self._is_lost = False
        self._is_released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Acquire the lock.

        Raises:
            SerRayError: another process holds the lock, or the folder cannot be written. Its type
                is `error`.
        """
        try:
            self._filesystem.create_dir(self._folder, recursive=True)
            self._acquire()
        except OSError as error:
            raise self._error(
                f"{self._location}: cannot be written ({error}); choose another folder, or make "
                "this one writable"
            ) from error
        self._last_beat = time.time()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock, unless another process took it over.

        If that fails, a warning is logged, because an error here hides the error of the block.
        """
        self._is_released.set()
        self._thread.join()
        try:
            if self._is_ours():
                self._filesystem.delete_file(self._path)
        except OSError as error:
            logger.warning(
                "%s: cannot be removed (%s); it is ignored once it is %.0f seconds old",
                *(self._location, error, STALE_SECONDS),
            )

    def check(self) -> None:
        """Raise `error` if another process took over the lock because beats were missed.

        This reads the storage only if the last beat is overdue, so every step may call it.
        """
        if time.time() - self._last_beat > 2 * BEAT_SECONDS:  # for example after the machine slept
            with contextlib.suppress(OSError):
                self._beat()
        if self._is_lost:
            raise self._in_use(self._read())

    def _acquire(self) -> None:
        claim = self._read()
        if claim is not None:
            claim = self._wait_until_gone(claim)
        if claim is None and isinstance(self._filesystem, fs.LocalFileSystem):
            try:
                with Path(self._path).open("xb") as file:
                    file.write(self._content())
            except FileExistsError:
                raise self._in_use(self._read()) from None
            return
        # A file or an object cannot be replaced conditionally, so the last writer wins.
        self._write()
        time.sleep(SETTLE_SECONDS)
        if not self._is_ours():
            raise self._in_use(self._read())

    def _wait_until_gone(self, claim: dict[str, Any]) -> dict[str, Any] | None:
        """Return the claim if its holder is gone, or None if the holder released the lock.

        Raises:
            SerRayError: the holder is running.
        """
        is_running = _is_running(claim)
        if is_running:
            raise self._in_use(claim)
        if is_running is False:
            return claim
        logger.warning(
            "%s: left by %s; waiting up to %.0f seconds for a sign of life",
            *(self._location, _name(claim), STALE_SECONDS),
        )
        end = time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(POLL_SECONDS)
            latest = self._read()
            if latest is None:
                return None
            if latest != claim:
                raise self._in_use(latest)
        return claim

    def _keep_alive(self) -> None:
        while not self._is_released.wait(BEAT_SECONDS) and not self._is_lost:
            with contextlib.suppress(OSError):  # the storage may fail for a moment
                self._beat()

    def _beat(self) -> None:
        if not self._is_ours():
            self._is_lost = True
            return
        self._num_beats += 1
        self._write()
        self._last_beat = time.time()

    def _is_ours(self) -> bool:
        claim = self._read()
        return claim is not None and claim.get("token") == self._claim["token"]

    def _content(self) -> bytes:
        return json.dumps(self._claim | {"beat": self._num_beats}).encode()

    def _write(self) -> None:
        write_file(self._filesystem, self._path, self._content())

    def _read(self) -> dict[str, Any] | None:
        """Return the holder's claim, `{}` if it is half written, or None if there is no lock."""
        try:
            with self._filesystem.open_input_file(self._path) as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _in_use(self, claim: dict[str, Any] | None) -> SerRayError:
        return self._error(f"{self._location}: {_name(claim)} {self._advice}")


def _name(claim: dict[str, Any] | None) -> str:
    if claim is None:
        return "was deleted, perhaps because another process"
    return "process {pid} on {host} since {since}".format(**claim) if claim else "another process"


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
    """Return the PID namespace of this process; processes of one namespace see each other's ids."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - the result is not a path
    except OSError:  # not Linux
        return ""
