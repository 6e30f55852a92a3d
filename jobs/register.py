"""Runs `ser-ray register` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/register.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["register", *sys.argv[1:]]))
