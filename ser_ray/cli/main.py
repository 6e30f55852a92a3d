"""`ser-ray <verb>`: parses the command line, runs a verb, and reports errors in one line.

Every verb is a dataclass. It contains the configuration dataclasses that `ser_ray.api` takes. A
field is a flag, and the field's docstring is the flag's help. Nothing slow is imported before a
verb runs. `jobs/*.py` run these verbs for `ray job submit`.
"""

import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from ser_ray.cli.data import Download, Prepare
from ser_ray.cli.model import DemoUi, Evaluate, Export, Predict, Register
from ser_ray.cli.parsing import parse_verb
from ser_ray.cli.pipeline import Pipeline
from ser_ray.cli.stop import Stopped, make_output_safe, stopped_by_signals
from ser_ray.cli.train import Crossval, LrRange, Train, Tune
from ser_ray.cli.verb import Verb
from ser_ray.errors import SerRayError
from ser_ray.progress import stderr_console
from ser_ray.storage.json_text import to_json
from ser_ray.version import __version__

VERBS: dict[str, type[Verb]] = {
    "pipeline": Pipeline,
    "download": Download,
    "prepare": Prepare,
    "train": Train,
    "lr-range": LrRange,
    "tune": Tune,
    "crossval": Crossval,
    "evaluate": Evaluate,
    "predict": Predict,
    "demo-ui": DemoUi,
    "export": Export,
    "register": Register,
}


MACHINE_ERRORS = {
    errno.EACCES, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EPERM, errno.EROFS,
    errno.ESTALE,
}  # fmt: skip
"""Errors of the operating system that the machine causes, such as a full or read-only disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    The status is 0 for success, 2 for an error of the user or the machine, 130 for Ctrl-C, 143 for
    SIGTERM and 129 for SIGHUP.
    """
    make_output_safe()
    logger, handler = logging.getLogger("ser_ray"), Lines()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with stopped_by_signals():
            return _run(list(sys.argv[1:] if arguments is None else arguments))
    except SerRayError as error:
        return _end(f"error: {error}", 2)
    except Stopped as stop:
        return _end(f"stopped by {stop.name}; the same command resumes from here", stop.status)
    except KeyboardInterrupt:
        return _end("interrupted; the same command resumes from here", 130)
    except BrokenPipeError:
        # The reader closed the pipe. Without this, Python prints a warning when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in MACHINE_ERRORS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        return _end(f"error: {place}{error.strerror or error}", 2)
    finally:
        logger.removeHandler(handler)


def _run(given: list[str]) -> int:
    if given == ["--version"]:
        print(f"ser-ray {__version__}")
        return 0
    verb = parse_verb(VERBS, given)
    if verb.common.dry_run:
        place = verb.place()
        shown = {type(verb).__name__.lower(): dataclasses.asdict(verb)}
        print(to_json(shown | ({"trains": place} if place else {})))
        return 0
    with redirect_stdout(sys.stderr):  # libraries print links and progress there
        outcome = verb.run()
    text = "\n".join(part for part in (outcome.text, outcome.after) if part)
    print(to_json(outcome.data) if verb.common.json else text)
    if outcome.problem:
        raise SerRayError(outcome.problem)
    return 0


def _end(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


class Lines(logging.Handler):
    """Prints the package's log messages as lines, above the bar or table if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stderr_console().print(f"{level}{record.getMessage()}", markup=False)
