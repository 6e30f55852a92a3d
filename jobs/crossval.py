"""Runs `ser-ray crossval` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/crossval.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["crossval", *sys.argv[1:]]))
