"""One writer for one folder, of shards or of a training's checkpoints, on any filesystem.

The holder keeps a small file that says who it is and when it was last alive. On a local disk the
file is created exclusively; a bucket has no such call, so there, and where a dead holder's lock is
taken over, the claim is written, left to settle and read back. A holder is dead when its process is
gone from this machine or it has been silent for `STALE_SECONDS`.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from pyarrow import fs

from ser_ray.errors import SerRayError

LOCK_NAME = "lock.json"
BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
SETTLE_SECONDS = 1.0
"""Time for two claims of the same moment to both be written before either is believed."""


class Lock:
    """The right to write into an existing folder, held while the context lasts.

    Args:
        error: what is raised where another process holds the lock.
        advice: the rest of that message, after who it is: what it does, and the way out.
    """

    def __init__(
        self, filesystem: fs.FileSystem, folder: str, error: type[SerRayError], advice: str
    ) -> None:
        self._filesystem = filesystem
        self._error, self._advice = error, advice
        self._path = f"{folder}/{LOCK_NAME}"
        self._claim = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._is_lost = False
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            SerRayError: as `error`; another process holds it.
        """
        holder = self._read()
        if holder is not None and (_is_alive(holder) if holder else self._is_new()):
            raise self._in_use(holder)
        if holder is None and isinstance(self._filesystem, fs.LocalFileSystem):
            try:
                with Path(self._path).open("x") as file:
                    file.write(self._text())
            except FileExistsError:
                raise self._in_use(self._read() or {}) from None
        else:
            self._write()
            time.sleep(SETTLE_SECONDS)
            if not self._is_ours():
                raise self._in_use(self._read() or {})
        self._beat.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the lock back."""
        self._released.set()
        self._beat.join()
        if not self._is_lost:
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.delete_file(self._path)

    def check(self) -> None:
        """Raise `error` if another process took the lock, believing this one dead."""
        if self._is_lost:
            raise self._in_use(self._read() or {})

    def _keep_alive(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a bucket out of reach for a moment
                if not self._is_ours():
                    self._is_lost = True
                    return
                self._write()

    def _is_ours(self) -> bool:
        holder = self._read()
        return holder is not None and holder.get("token") == self._claim["token"]

    def _text(self) -> str:
        return json.dumps(self._claim | {"alive": time.time()})

    def _write(self) -> None:
        # A bucket's write is whole or not at all; a disk may be full.
        is_local = isinstance(self._filesystem, fs.LocalFileSystem)
        target = f"{self._path}.{self._claim['token']}" if is_local else self._path
        try:
            with self._filesystem.open_output_stream(target) as file:
                file.write(self._text().encode())
        except OSError:
            if is_local:
                Path(target).unlink(missing_ok=True)
            raise
        if is_local:
            Path(target).replace(self._path)

    def _is_new(self) -> bool:
        """Whether a claim that cannot be read may be one that is just being written."""
        changed = self._filesystem.get_file_info(self._path).mtime_ns
        return changed is None or time.time() - changed / 1e9 <= STALE_SECONDS

    def _read(self) -> dict[str, Any] | None:
        """Return the holder's claim; `{}` for one that is just being written; None for no lock."""
        try:
            with self._filesystem.open_input_file(self._path) as file:
                return json.loads(file.read())
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _in_use(self, holder: dict[str, Any]) -> SerRayError:
        who = "process {pid} on {host} since {since}".format(**holder) if holder else "another run"
        return self._error(f"{self._path}: {who} {self._advice}")


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the run that wrote a claim may still be working."""
    if time.time() - holder["alive"] > STALE_SECONDS:
        return False
    if holder["host"] != socket.gethostname():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
