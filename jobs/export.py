"""Runs `ser-ray export` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/export.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
