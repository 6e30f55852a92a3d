"""Runs `ser-ray pipeline` as a Ray job.

Submit it with `ray job submit --working-dir . -- python jobs/pipeline.py ...`.
"""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["pipeline", *sys.argv[1:]]))
