"""What goes wrong with one clip on its way to features."""

from typing import Literal

ClipStatus = Literal["no_audio", "unreadable", "too_short", "too_long", "silent"]
Failure = Literal["clip", "file", "storage"]


class ClipError(Exception):
    """One clip that cannot become features. It costs one row of the outcomes and no run."""

    def __init__(self, status: ClipStatus, reason: str, *, failed: Failure = "clip") -> None:
        super().__init__(status, reason)
        self.status: ClipStatus = status
        """What became of the clip."""
        self.reason = reason
        """Why, in words for the owner of the corpus."""
        self.failed: Failure = failed
        """`clip`: its content, and reading it again changes nothing. `file`: this one file could
        not be read, which may be repaired. `storage`: the disk or bucket failed, and may for all
        other clips too."""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
