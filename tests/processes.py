"""What runs on this machine, asked of `ps`."""

import contextlib
import os
import signal
import subprocess


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
