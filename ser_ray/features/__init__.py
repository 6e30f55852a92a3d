"""From a clip to its features: `decode` reads the sound, `extract` makes the three kinds.

Used by the shards job and by prediction alike, so that both see exactly the same numbers. Knows
nothing of Ray.
"""

from typing import Literal

ClipStatus = Literal["no_audio", "unreadable", "too_short", "too_long", "silent"]
Failure = Literal["clip", "file", "storage"]


class ClipError(Exception):
    """One clip that cannot become features: a row of the outcomes, never the end of a run."""

    def __init__(self, status: ClipStatus, reason: str, *, failed: Failure = "clip") -> None:
        super().__init__(status, reason)
        self.status: ClipStatus = status
        """What became of the clip."""
        self.reason = reason
        """Why, in words for the corpus's owner."""
        self.failed: Failure = failed
        """The clip itself; or its file, which may be mended; or the way to it and all others."""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
