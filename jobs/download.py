"""Runs `ser-ray download` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/download.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["download", *sys.argv[1:]]))
