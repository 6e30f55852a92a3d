"""Runs `ser-ray evaluate` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/evaluate.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
