"""What every verb of the command line has, and the result it returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import tyro

PARSING = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verb's result, for a program and for a person."""

    data: dict[str, Any]
    text: str
    problem: str = ""
    """Reason why the verb failed although there is a result."""


@dataclass(frozen=True, kw_only=True)
class Verb:
    """What every verb takes."""

    address: str = ""
    """Ray cluster to join; RAY_ADDRESS, the surrounding job's, or this machine alone if empty."""
    json: bool = False
    """Print the result as JSON on standard output; progress stays on standard error."""
    dry_run: bool = False
    """Print the resolved configuration and stop."""

    def resolved(self, flags: Sequence[str]) -> Self:
        """This verb with every setting filled in that follows from the others.

        Args:
            flags: what the user gave after the verb's name.
        """
        return self

    def run(self) -> Outcome:
        """Do the work.

        Raises:
            SerRayError: it failed; the message is for the user.
        """
        raise NotImplementedError


V = TypeVar("V", bound=Verb)


def parse_over(flags: Sequence[str], defaults: V) -> V:
    """Parse a verb's flags again over other defaults: a flag wins even if it repeats a default."""
    # Without FlagCreatePairsOff, a switch that is on by default may still be given.
    parsing = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(type(defaults), args=flags, default=defaults, prog="ser-ray", config=parsing)
