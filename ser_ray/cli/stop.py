"""Signals that stop a verb, and output that every terminal can show.

SIGTERM and SIGHUP raise `Stopped`, which is a KeyboardInterrupt: whatever cleans up after Ctrl-C
cleans up after them, MLflow's run becomes KILLED, and Ray stops.
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
"""Characters of our output, and their replacements where the terminal cannot show them."""


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        self.name, self.status = signal.Signals(number).name, 128 + number
        super().__init__(self.name)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in the block at SIGTERM and SIGHUP.

    A signal that is ignored stays ignored, as SIGHUP under nohup.
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
    for each in SIGNALS:  # a second signal must not interrupt the cleaning up
        signal.signal(each, signal.SIG_IGN)
    if number == signal.SIGHUP:
        _leave_terminal()
    raise Stopped(number)


def _leave_terminal() -> None:
    """Discard further output to the terminal, which is closed: writing to it would fail."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def make_output_safe() -> None:
    """Let standard output and error replace characters that their encoding does not have.

    A locale or PYTHONIOENCODING may allow ASCII only, and a file's name may be no text at all.
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
