"""Handles signals that stop a verb, and characters that a terminal cannot show.

SIGTERM and SIGHUP raise `Stopped`. It is a KeyboardInterrupt, so the same code cleans up as after
Ctrl-C: MLflow's run becomes KILLED, and Ray stops.
"""

import codecs
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGHUP)
ASCII = {"–": "-", "±": "+-", "█": "#", "…": "..."}
"""Characters of our output, and their replacements if the terminal cannot show them."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number
        super().__init__(self.name)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block when SIGTERM or SIGHUP arrives.

    An ignored signal, such as SIGHUP under nohup, is still ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _stop(number: int, _: object) -> None:
    for each in SIGNALS:  # a second signal must not interrupt the cleanup
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGHUP:
        _leave_terminal()
    raise Stopped(number)


def _leave_terminal() -> None:
    """Discard further output to the terminal, because writing to a closed terminal fails."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def make_output_safe() -> None:
    """Let standard output and error replace characters that their encoding lacks.

    A locale or PYTHONIOENCODING may allow only ASCII, and a file's name may be invalid UTF-8.
    """
    codecs.register_error("readable", _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="readable")


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start]
    if found in ASCII:
        return ASCII[found], error.start + 1
    shown, _ = codecs.backslashreplace_errors(
        UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, "")
    )
    return shown, error.start + 1
