"""`ser-ray crossval` for `ray job submit --working-dir . -- python jobs/crossval.py ...`."""

import sys

from ser_ray.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["crossval", *sys.argv[1:]]))
