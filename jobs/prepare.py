"""Runs `ser-ray prepare` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/prepare.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
