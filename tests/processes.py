"""Processes, ports and servers of the tests on this machine."""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil


def family(ancestor: int) -> dict[int, str]:
    """Command lines of a process and of all that come from it, by process id."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True)
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()[1:]]
    members = {ancestor}
    while grown := {int(pid) for pid, parent, _ in rows if int(parent) in members} - members:
        members |= grown
    return {int(pid): command for pid, _, command in rows if int(pid) in members}


def end(ancestor: subprocess.Popen[bytes]) -> None:
    """Kill a process of our own and all that come from it, and wait until it is gone."""
    for member in family(ancestor.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    ancestor.wait()


def answers_at(address: str) -> bool:
    """Whether something listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


@contextlib.contextmanager
def held_port(address: str = "127.0.0.1") -> Iterator[int]:
    """A port of this machine that no other process is given, for a server of the test's own.

    Linux lets sockets that set SO_REUSEADDR, as servers do, share a port of which only one listens.
    So the port stays taken while its server is not running, and connections are refused.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((address, 0))
        yield holder.getsockname()[1]


@contextlib.contextmanager
def started(
    command: Sequence[str], log: Path, answers: Callable[[], Any], **how: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the block ends, which it enters when the program answers.

    Args:
        log: file that the program's output is appended to.
        answers: whether it does; an OSError means no.
        how: further arguments of `subprocess.Popen`.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, **how)

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return bool(answers())
        return False

    try:
        wait_for(f"an answer of {command[:4]}", is_ready)
        yield process
    finally:
        end(process)


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, even if its parent has not collected its status yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(what: str, is_so: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until something is so; fails with its name."""
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


@contextlib.contextmanager
def stalling(path: Path) -> Iterator[None]:
    """Let every process that opens a file wait, for 45 seconds at most: a lease of fcntl(2)."""
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # sent when a process opens the file
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        os.close(descriptor)
        signal.signal(signal.SIGIO, before)


def stalled_processes() -> list[int]:
    """Return the ids of the processes that wait for a file in `stalling`."""
    found = []
    for place in Path("/proc").glob("[0-9]*/task/*/wchan"):
        with contextlib.suppress(OSError):
            if "break_lease" in place.read_text():
                found.append(int(place.parts[2]))
    return found
