"""Runs `ser-ray lr-range` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/lr_range.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["lr-range", *sys.argv[1:]]))
