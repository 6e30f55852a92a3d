"""Runs `ser-ray predict` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/predict.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
