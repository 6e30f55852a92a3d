"""`ser-ray <verb>`: parse, run one verb, and turn errors into one line and an exit status."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import tyro

from ser_ray.cli.verbs import TYRO, VERBS
from ser_ray.errors import SerRayError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        verb = tyro.extras.subcommand_cli_from_dict(
            VERBS,
            args=given,
            prog="ser-ray",
            description="Speech emotion recognition at scale, on Ray and MLflow.",
            config=TYRO,
        )
        verb = verb.resolved(given[1:])
        if verb.dry_run:
            print(json.dumps({type(verb).__name__.lower(): dataclasses.asdict(verb)}, indent=2))
            return 0
        from ser_ray.cli import commands

        commands.run(verb)
    except SerRayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output is gone: nothing is left to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0
