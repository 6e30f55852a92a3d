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


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block when SIGTERM or SIGHUP arrives.

    A signal that is already ignored, such as SIGHUP under nohup, is still ignored. While `Stopped`
    is being handled, a second signal does not interrupt the cleanup. Python drops every error that
    is raised in a finalizer, and so do some libraries in their C code. If `Stopped` is lost in this
    way, the signal is sent again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raised: list[weakref.ref[Stopped]] = []

    def stop(number: int, _: object) -> None:
        if raised and raised[0]() is not None:
            return
        if number == signal.SIGHUP:
            _leave_terminal()
        raise resent_if_lost(Stopped(number), number)

    def resent_if_lost(error: Stopped, number: int) -> Stopped:
        """Send the signal again if the error is deleted before the block ends."""
        timer = threading.Timer(RETRY_SECONDS, send, [number])
        timer.daemon = True
        raised[:] = [weakref.ref(error, lambda _: timer.start() if is_active else None)]
        return error

    def send(number: int) -> None:
        if signal.getsignal(number) is stop:
            os.kill(os.getpid(), number)

    handled = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in handled:
        signal.signal(number, stop)
    hook, is_active = sys.unraisablehook, True
    # Do not print a `Stopped` that is lost in a finalizer, because its signal is sent again.
    sys.unraisablehook = lambda lost: None if lost.exc_type is Stopped else hook(lost)
    try:
        yield
    finally:
        is_active, sys.unraisablehook = False, hook
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _leave_terminal() -> None:
    """Discard further output to the terminal, because writing to a closed terminal fails."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, descriptor)
            os.close(null_device)


def make_output_safe() -> None:
    """Replace characters that the encoding of standard output or standard error lacks.

    The locale or PYTHONIOENCODING may allow only ASCII, and a file name may be invalid UTF-8.
    """
    codecs.register_error("readable", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    shown = "".join(ASCII.get(char, char) for char in error.object[error.start : error.end])
    return shown.encode("ascii", "backslashreplace").decode(), error.end
