"""The entry point of `ser-ray`, which sets up Python: huge pages of memory, and rare collections.

A training step on CPUs passes over all weights, gradients and optimiser states several times. On a
virtual machine with pages of 4 KiB, the translation of addresses takes about half of this time (see
"Speed" in jobs/README.md). glibc requests transparent huge pages only if GLIBC_TUNABLES says so
when the process starts. All later processes, such as those of a local Ray, inherit the variable.
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
    # At its end, Python would look for cycles in all modules once more, for more than a second.
    gc.freeze()
    return status


def collect_rarely() -> None:
    """Make Python look for unreachable cycles of objects after more allocations than by default.

    Importing torch and MLflow makes a million objects that stay. With Python's default thresholds,
    a seventh of the time of these imports is spent looking at them again and again.
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
