"""`ser-ray <verb>`: parses the command line, runs a verb, and reports errors in one line.

A verb is a dataclass. Each of its fields becomes a flag or an argument, and the field's docstring
is the help text. If a field is a dataclass of settings, each field of that dataclass becomes a flag
instead. Nothing slow is imported before a verb runs.
"""

import dataclasses
import errno
import logging
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from ser_ray.cli.data import Download, Prepare
from ser_ray.cli.model import DemoUi, Evaluate, Export, Predict, Register
from ser_ray.cli.parsing import parse_verb
from ser_ray.cli.pipeline import Pipeline
from ser_ray.cli.stop import Stopped, discard_output, make_output_safe, stopped_by_signals
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
"""Error numbers with a cause outside this program, such as a full or read-only disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    The status is 0 for success, 2 for an error that the user or the machine caused, 130 for Ctrl-C,
    143 for SIGTERM, 129 for SIGHUP, and 1 if the reader of the output closed the pipe. Ctrl-C is
    the usual way to stop demo-ui, so the status is then 0.
    """
    make_output_safe()
    logger, handler = logging.getLogger("ser_ray"), LineHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    words = list(sys.argv[1:] if arguments is None else arguments)
    verb: Verb | None = None
    try:
        with stopped_by_signals():
            if words == ["--version"]:
                print(f"ser-ray {__version__}", flush=True)
                return 0
            try:
                verb = parse_verb(VERBS, words)
            finally:
                sys.stdout.flush()  # the text of --help
            return _run(verb)
    except SerRayError as error:
        return _end(f"error: {error}", 2)
    except Stopped as stop:
        return _end(f"stopped by {stop.name}{_advice(verb)}", stop.status)
    except KeyboardInterrupt:
        return _end(f"interrupted{_advice(verb)}", 130)
    except BrokenPipeError:
        _discard_unwritten()
        return 1
    except OSError as error:
        # pyarrow raises such errors if a bucket cannot be read or written.
        is_from_bucket = type(error) is OSError and error.errno is None
        if error.errno not in MACHINE_ERRORS and not is_from_bucket:
            raise
        _discard_unwritten()
        file = f"{error.filename}: " if error.filename else ""
        return _end(f"error: {file}{error.strerror or ' '.join(str(error).split())}", 2)
    finally:
        logger.removeHandler(handler)


def _run(verb: Verb) -> int:
    if verb.common.dry_run:
        verb.check()
        resolved: dict[str, object] = {type(verb).__name__.lower(): dataclasses.asdict(verb)}
        if place := verb.place():
            resolved["trains"] = place
        print(to_json(resolved), flush=True)
        return 0
    with redirect_stdout(sys.stderr):  # some libraries print on standard output
        result = verb.run()
    text = "\n".join(lines for lines in (result.text, result.next_step) if lines)
    print(to_json(result.data) if verb.common.json else text, flush=True)
    if result.problem:
        raise SerRayError(result.problem)
    return 0


def _discard_unwritten() -> None:
    """Discard output that cannot be written. Otherwise Python would write it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output(sys.stdout.fileno())


def _advice(verb: Verb | None) -> str:
    """Return how to resume the work of an interrupted verb; empty if it cannot be resumed."""
    return "; to resume, run the same command again" if verb and verb.resumes else ""


def _end(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status


class LineHandler(logging.Handler):
    """Prints the package's log messages, above the progress bar or table if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        stderr_console().print(f"{level}{record.getMessage()}")
