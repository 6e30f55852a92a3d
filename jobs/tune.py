"""Runs `ser-ray tune` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/tune.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
