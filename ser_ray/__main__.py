"""`python -m ser_ray <verb>` is `ser-ray <verb>`."""

from ser_ray.cli.start import main

raise SystemExit(main())
