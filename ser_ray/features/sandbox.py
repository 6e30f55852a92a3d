"""Decodes clips in a child process, because a clip may hang or kill the process that decodes it.

The caller survives such a clip and continues with the others. A sandbox takes a second to start,
and adds half a millisecond to each clip.

`python -m` runs this module as the child process. The child answers each request with a JSON
message. If the clip was decoded, a second message holds its samples.

`concurrent.futures` and `multiprocessing` do not fit: a pool cannot end a worker that hangs, and
both import the caller's main module in the new process. In a Ray worker that module is Ray's, and
elsewhere it may be a script without `if __name__ == "__main__"`. Both also unpickle the messages of
a process that a hostile clip may control. JSON and raw samples are safe to read.
"""

import json
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Self

import numpy as np

from ser_ray.errors import ResourcesError
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import Sound

SECONDS_PER_CLIP = 60.0
"""A clip that takes longer to decode is `unreadable`."""


class Sandbox:
    """Decodes clips in a child process, until a `with` block or this process ends."""

    def __init__(self, seconds_per_clip: float = SECONDS_PER_CLIP) -> None:
        self._seconds_per_clip = seconds_per_clip
        self._start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def decode(self, location: str, *, max_seconds: float) -> Sound:
        """Return the sound of a clip, as `ser_ray.features.decode` does.

        Raises:
            ClipError: like `decode`, and `unreadable` if a clip kills the process or takes too
                long.
        """
        request = json.dumps([location, max_seconds]).encode()
        try:
            self._pipe.send_bytes(request)
        except OSError:  # the process was killed after the previous clip, or could not start again
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
            raise ClipError("unreadable", "decoding it kills the process") from None
        return Sound(samples, answer["sample_rate"], answer["lost_seconds"])

    def _start(self) -> None:
        self._pipe, child_pipe = Pipe()
        self.process = subprocess.Popen(
            # With -P, the child does not import modules from the working folder.
            [sys.executable, "-P", "-m", __name__, str(child_pipe.fileno())],
            pass_fds=[child_pipe.fileno()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        child_pipe.close()
        try:
            self._pipe.recv_bytes()  # wait for "ready", so the first clip's time excludes the start
        except (EOFError, ConnectionResetError) as error:
            status = self.process.wait()
            self._stop()
            raise ResourcesError(
                f"the process that decodes recordings ended with status {status} while it started; "
                "its own message is above; the machine may be short of memory"
            ) from error

    def _stop(self) -> None:
        self._pipe.close()
        self.process.kill()
        self.process.wait()

    def _restart(self) -> None:
        self._stop()
        self._start()


def _answer_requests(pipe: Connection) -> None:
    """Answer requests to decode a clip, until the other end of the pipe is closed."""
    pipe.send_bytes(b"ready")
    while True:
        try:
            location, max_seconds = json.loads(pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return
        try:
            samples, sample_rate, lost = decode(location, max_seconds=max_seconds)
        except ClipError as error:
            pipe.send_bytes(json.dumps(vars(error)).encode())
        else:
            header = {"dtype": str(samples.dtype), "sample_rate": sample_rate, "lost_seconds": lost}
            pipe.send_bytes(json.dumps(header).encode())
            pipe.send_bytes(np.ascontiguousarray(samples).data)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the parent ends this process
    _answer_requests(Connection(int(sys.argv[1])))
