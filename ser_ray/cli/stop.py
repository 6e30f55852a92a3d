"""Handles signals that stop a verb, and characters that a terminal cannot show.

SIGTERM and SIGHUP raise `Stopped`. `Stopped` is a KeyboardInterrupt, so the cleanup is the same as
after Ctrl-C: the MLflow run gets the status KILLED, and Ray stops.
"""

import codecs
import io
import os
import signal
import stat
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
RETRY_SECONDS = 0.1
"""Time after which a signal is sent again if the `Stopped` that it raised was lost."""
ASCII = {"–": "-", "±": "+-", "█": "#", "…": "..."}
"""Characters of the output, and their replacements if the terminal cannot show them."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number
        super().__init__(self.name)


class _Handler:
    """Raises `Stopped` for a signal, unless a KeyboardInterrupt is being handled."""

    def __init__(self) -> None:
        self.is_active = True
        self.received: list[tuple[int, weakref.ref[Stopped]]] = []

    def __call__(self, number: int, _: object) -> None:
        if _is_cleaning_up():
            return
        if number == signal.SIGHUP:
            _leave_terminal()
        # With a local variable, this frame and the error would keep each other alive.
        raise self._resent_if_lost(Stopped(number), number)

    def _resent_if_lost(self, error: Stopped, number: int) -> Stopped:
        """Return the error. If it is deleted before the verb ends, the signal is sent again."""
        timer = threading.Timer(RETRY_SECONDS, self._send, [number])
        timer.daemon = True
        deleted = weakref.ref(error, lambda _: timer.start() if self.is_active else None)
        self.received.append((number, deleted))
        return error

    def _send(self, number: int) -> None:
        if self.is_active:
            os.kill(os.getpid(), number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block when SIGTERM or SIGHUP arrives.

    A signal that is already ignored, such as SIGHUP under nohup, is still ignored. While `Stopped`
    is being handled, a second signal does not interrupt the cleanup. Python drops every error that
    is raised in a finalizer, and so do some libraries in their C code. If `Stopped` is lost in this
    way, the signal is sent again. Ray's C++ code replaces `Stopped` with a plain KeyboardInterrupt,
    which becomes `Stopped` again at the end of the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = _Handler()
    handled = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    hook = sys.unraisablehook
    # Do not print a `Stopped` that is lost in a finalizer, because its signal is sent again.
    sys.unraisablehook = lambda lost: None if lost.exc_type is Stopped else hook(lost)
    try:
        yield
    except KeyboardInterrupt as error:
        if not stop.received or isinstance(error, Stopped):
            raise
        raise Stopped(stop.received[-1][0]) from error
    finally:
        stop.is_active, sys.unraisablehook = False, hook
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _is_cleaning_up() -> bool:
    """Return whether a KeyboardInterrupt is being handled."""
    error = sys.exception()
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _leave_terminal() -> None:
    """Discard further output to the terminal, because writing to a closed terminal fails."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            discard_output(descriptor)


def discard_output(descriptor: int) -> None:
    """Discard all further output to a file descriptor."""
    with Path(os.devnull).open("wb") as null_device:
        os.dup2(null_device.fileno(), descriptor)


def make_output_safe() -> None:
    """Replace characters that the encoding of standard output or standard error lacks.

    The locale or PYTHONIOENCODING may allow only ASCII, and a file name may be invalid UTF-8. If a
    stream was closed before Python started, its output is discarded.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    codecs.register_error("readable", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    replacement = "".join(ASCII.get(char, char) for char in error.object[error.start : error.end])
    return replacement.encode("ascii", "backslashreplace").decode(), error.end
