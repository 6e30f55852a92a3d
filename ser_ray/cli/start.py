"""Starts `ser-ray` with huge pages of memory and with fewer garbage collections.

A training step on CPUs passes over all weights, gradients and optimiser states several times. On a
virtual machine with pages of 4 KiB, translating addresses takes about half of this time (see
"Speed" in jobs/README.md). glibc requests transparent huge pages only if GLIBC_TUNABLES says so
when the process starts. Where huge pages help, `main` sets this variable and starts Python again.
Child processes, such as those of a local Ray, inherit the variable.
"""

import gc
import os
import sys
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
KERNEL_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
"""`always [madvise] never`, for example: the brackets mark the kernel's mode."""


def main() -> int:
    """Run `ser-ray` with the words of the command line, and return its exit status."""
    if needs_restart():
        os.environ[TUNABLES] = HUGE_PAGES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    collect_rarely()
    from ser_ray.cli.main import main  # slow to import, so only after the restart

    status = main()
    # Otherwise Python would collect garbage once more at exit, which takes more than a second.
    gc.freeze()
    return status


def collect_rarely() -> None:
    """Make Python collect garbage less often than by default.

    Importing torch and MLflow creates a million objects that stay. With Python's default
    thresholds, scanning them again and again takes a seventh of the time of these imports.
    """
    gc.set_threshold(100_000, 50)


def needs_restart() -> bool:
    """Return whether the kernel gives huge pages only on request, and GLIBC_TUNABLES is not set.

    A value of GLIBC_TUNABLES that the user has set is not changed.
    """
    if TUNABLES in os.environ or not sys.executable:
        return False
    try:
        return "[madvise]" in KERNEL_MODE.read_text()
    except OSError:  # another operating system, or a kernel without huge pages
        return False
