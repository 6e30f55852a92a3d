"""Runs a benchmark: the speed of one step of the program, or its recovery from faults.

`python jobs/bench.py prepare|encode|train|floor|tune|predict|plan|faults ...` runs
`bench_<name>.py`. The docstring of that file says what the benchmark compares and what its figures
do not show.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> None:
    """Replace this program by the benchmark, because its worker processes import the main file."""
    if len(sys.argv) < 2 or sys.argv[1] not in NAMES:
        sys.exit(f"{__doc__}\nusage: bench.py {{{','.join(NAMES)}}} [OPTIONS]")
    script = HERE / f"bench_{sys.argv[1]}.py"
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[2:]])


if __name__ == "__main__":
    main()
