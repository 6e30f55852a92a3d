"""The error of a clip that cannot become features."""

from typing import Literal

ClipStatus = Literal["no_audio", "unreadable", "too_short", "too_long", "silent", "beyond_end"]
Failure = Literal["clip", "file", "storage"]


class ClipError(Exception):
    """One clip cannot become features. It is a row of the outcomes and does not end the run."""

    def __init__(self, status: ClipStatus, reason: str, *, failed: Failure = "clip") -> None:
        super().__init__(status, reason)
        self.status: ClipStatus = status
        """The clip's outcome."""
        self.reason = reason
        """The reason, in words for the owner of the corpus."""
        self.failed: Failure = failed
        """What failed. `clip`: the content, so another attempt would fail in the same way. `file`:
        reading this one file, which may be temporary. `storage`: the disk or bucket, so that other
        clips may fail too."""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
