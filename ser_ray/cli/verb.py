"""The base class of the command line's verbs, and the result of a verb."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ser_ray.corpus.words import MISSING_WORDS
from ser_ray.progress import stderr_console


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a verb, for programs and for people."""

    data: dict[str, Any]
    """The result for programs (`--json`)."""
    text: str
    """The result for people."""
    after: str = ""
    """Lines for people below the result, such as the next command and its purpose."""
    problem: str = ""
    """Why the verb failed although there is a result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """Options of every verb."""

    address: str = ""
    """Ray cluster to join; `local` starts a cluster on this machine. The default is the cluster of
    RAY_ADDRESS or of the Ray job. Without these, this machine does the work, and starts Ray only if
    several processes work."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and the place of a training, then stop."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb; its flags are its fields."""

    common: Common = field(default_factory=Common)

    def resolved(self, flags: Sequence[str]) -> Self:
        """Fill in settings that depend on other settings.

        Args:
            flags: the command line after the verb's name.
        """
        return self

    def place(self) -> str:
        """Return where a training of this verb runs; empty if there is no training."""
        return ""

    def run(self) -> Outcome:
        """Do the work.

        Raises:
            SerRayError: the verb failed; the message is for the user.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TableVerb(Verb):
    """Flags of every verb that may read a table."""

    missing: tuple[str, ...] = MISSING_WORDS
    """Words in a table that mean a missing value, in upper or lower case. `--missing` without words
    turns this off."""
    columns: tuple[str, ...] = ()
    """Names of columns in a table, as in label=emotion speaker=spk."""


def say(name: str, text: str) -> None:
    """Print a line on standard error: a name and a text."""
    stderr_console().print(f"{name:12} {text}", markup=False)
