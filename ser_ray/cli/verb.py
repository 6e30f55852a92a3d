"""The base class of the command line's verbs, and the result of a verb."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import fill
from typing import Any, ClassVar, Self

from ser_ray.progress import stderr_console


@dataclass(frozen=True, slots=True)
class VerbResult:
    """What a verb prints when it ends."""

    data: dict[str, Any]
    """The result as `--json` prints it."""
    text: str
    """The result as it is printed without `--json`."""
    next_step: str = ""
    """Lines that are printed below `text`, such as the next command and its purpose."""
    problem: str = ""
    """Why the verb failed although it has a result, such as files that could not be read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """Options of every verb."""

    address: str = ""
    """Address of the Ray cluster to join; `local` starts a cluster on this machine. The default is
    the address in the variable RAY_ADDRESS, which Ray sets in a job. Without this variable, the
    work is done on this machine, and Ray is started there if the work needs Ray."""
    json: bool = False
    """Print the result as JSON on standard output. Progress is still printed on standard error."""
    dry_run: bool = False
    """Print the resolved configuration, where a training would run, and a warning if its shards
    cannot be opened, but do not run anything."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb of the command line; its fields are its flags."""

    common: Common = field(default_factory=Common)
    resumes: ClassVar[bool] = False
    """Whether the same command resumes the work after an interruption."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in settings that depend on other settings.

        Args:
            flags: the words of the command line after the verb's name.
        """
        return self

    def place(self) -> str:
        """Return where this verb would train, in words; empty if it does not train."""
        return ""

    def check(self) -> None:
        """Check, for `--dry-run`, that what this verb only reads exists.

        If shards cannot be opened, a warning is logged.

        Raises:
            TrackingError: the tracking store does not exist.
        """

    def run(self) -> VerbResult:
        """Do the work.

        Raises:
            SerRayError: the verb failed, and the message gives the reason.
        """
        raise NotImplementedError


def say(name: str, text: str) -> None:
    """Print a name and a text on standard error. A terminal breaks lines only between words."""
    console, line = stderr_console(), f"{name:12} {text}"
    if console.is_terminal:
        line = fill(
            line,
            console.width,
            subsequent_indent=" " * 13,
            break_long_words=False,
            break_on_hyphens=False,
        )
    console.print(line)
