"""Runs `ser-ray train` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/train.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
