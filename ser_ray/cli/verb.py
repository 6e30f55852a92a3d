"""The base of every verb of the command line, and the result that a verb returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verb's result, for a program and for a person."""

    data: dict[str, Any]
    text: str
    after: str = ""
    """What may come next: a command, with its purpose. Only a person is shown it."""
    problem: str = ""
    """Reason why the verb failed although there is a result."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Common:
    """Options of every verb."""

    address: str = ""
    """Ray cluster to join; `local` starts one on this machine. If empty, that of RAY_ADDRESS or of
    the surrounding job; without those, this machine does the work, and starts Ray only for work of
    several processes."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and where a training would run, then stop."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A verb; its flags are its fields."""

    common: Common = field(default_factory=Common)

    def resolved(self, flags: Sequence[str]) -> Self:
        """Return this verb with the settings filled in that follow from the others.

        Args:
            flags: the command line after the verb's name.
        """
        return self

    def place(self) -> str:
        """Say where a training of this verb would run; empty if it has none."""
        return ""

    def run(self) -> Outcome:
        """Do the work.

        Raises:
            SerRayError: it failed; the message is for the user.
        """
        raise NotImplementedError
