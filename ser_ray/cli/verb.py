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
    """Ray cluster to join. If empty, that of RAY_ADDRESS or of the surrounding job, else one that
    is started on this machine."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""


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

    def run(self) -> Outcome:
        """Do the work.

        Raises:
            SerRayError: it failed; the message is for the user.
        """
        raise NotImplementedError
