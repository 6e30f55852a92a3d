"""What runs on this machine, asked of `ps`, and waiting for it."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any


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


def wait_for(what: str, is_so: Callable[[], Any], seconds: float = 300) -> None:
    """Wait until something is so; fails with its name."""
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)
