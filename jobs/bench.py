"""Measures the speed of each part of the program, and how it survives faults.

`python jobs/bench.py prepare|encode|train|tune|predict|plan|faults ...` runs a benchmark. The
docstring of its file, `bench_<part>.py`, says what it compares and what its figures do not show.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
PARTS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> None:
    """Replace this process by the part's program, because worker processes import the main file."""
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        sys.exit(f"{__doc__}\nusage: bench.py {{{','.join(PARTS)}}} [OPTIONS]")
    script = HERE / f"bench_{sys.argv[1]}.py"
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[2:]])


if __name__ == "__main__":
    main()
