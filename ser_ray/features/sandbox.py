"""Decoding clips that may never end or take their process down with them.

A first attempt decodes in its own process and ends that where a clip keeps it for too long; the
next one decodes in a sandbox, which finds the clip and goes on without it. A sandbox takes a second
to start and half a millisecond more for every clip.

Run as a module this is a sandbox's other end: it answers each request with a message of JSON and,
for a clip that was decoded, one with the samples.
"""

import contextlib
import faulthandler
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Self

import numpy as np

from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError

SECONDS_PER_CLIP = 60.0
"""A clip that is not decoded by then is given up."""


@contextlib.contextmanager
def time_limited(
    seconds_per_clip: float = SECONDS_PER_CLIP,
) -> Iterator[Callable[..., tuple[np.ndarray, int]]]:
    """Yield a `decode` that ends this process where a clip keeps it for one to two time limits.

    A library that hangs cannot be interrupted, and need not let another thread of Python run.
    """
    began = -math.inf

    def read(location: str, *, max_seconds: float) -> tuple[np.ndarray, int]:
        nonlocal began
        if (now := time.monotonic()) - began > seconds_per_clip:  # not for each: it costs a thread
            began = now
            faulthandler.dump_traceback_later(
                2 * seconds_per_clip, exit=True, file=sys.__stderr__ or sys.stderr
            )
        return decode(location, max_seconds=max_seconds)

    try:
        yield read
    finally:
        faulthandler.cancel_dump_traceback_later()


class Sandbox:
    """Decodes as `decode` does, while its context lasts."""

    def __init__(self, seconds_per_clip: float = SECONDS_PER_CLIP) -> None:
        self._seconds_per_clip = seconds_per_clip

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def decode(self, location: str, *, max_seconds: float) -> tuple[np.ndarray, int]:
        """Return what `decode` returns, `[num_samples]` and their rate.

        Raises:
            ClipError: what `decode` raises; and `unreadable` for a clip that kills the process or
                keeps it for too long.
        """
        request = json.dumps([location, max_seconds]).encode()
        try:
            self._pipe.send_bytes(request)
        except BrokenPipeError:  # it was killed since the last clip
            self._restart()
            self._pipe.send_bytes(request)
        if not self._pipe.poll(self._seconds_per_clip):
            self._restart()
            raise ClipError("unreadable", f"not decoded after {self._seconds_per_clip:g} s")
        try:
            answer = json.loads(self._pipe.recv_bytes())
            if "status" in answer:
                raise ClipError(**answer)
            samples = np.frombuffer(self._pipe.recv_bytes(), answer["dtype"])
        except (EOFError, ConnectionResetError):
            self._restart()
            raise ClipError("unreadable", "decoding it kills the process that does it") from None
        return samples, answer["sample_rate"]

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        theirs.close()
        self._pipe.recv_bytes()  # that it is ready, so that no clip is charged with its start

    def _stop(self) -> None:
        self._pipe.close()
        self.process.kill()
        self.process.wait()

    def _restart(self) -> None:
        self._stop()
        self._start()


def _answer_requests(pipe: Connection) -> None:
    """Be the other end, until the first one goes away."""
    pipe.send_bytes(b"ready")
    while True:
        try:
            location, max_seconds = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            samples, sample_rate = decode(location, max_seconds=max_seconds)
        except ClipError as error:
            pipe.send_bytes(json.dumps(vars(error)).encode())
        else:
            facts = {"dtype": str(samples.dtype), "sample_rate": sample_rate}
            pipe.send_bytes(json.dumps(facts).encode())
            pipe.send_bytes(samples.data)


if __name__ == "__main__":
    _answer_requests(Connection(int(sys.argv[1])))
