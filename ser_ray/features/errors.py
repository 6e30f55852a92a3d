"""The error for clips that cannot become features."""

from typing import Literal

ClipStatus = Literal["no_audio", "unreadable", "too_short", "too_long", "silent", "beyond_end"]
Failure = Literal["clip", "file", "storage"]


class ClipError(Exception):
    """A clip cannot become features. `prepare` and `predict` record the reason and continue, but
    `prepare` stops if the storage failed."""

    def __init__(self, status: ClipStatus, reason: str, *, failed: Failure = "clip") -> None:
        super().__init__(status, reason)
        self.status: ClipStatus = status
        """The clip's outcome."""
        self.reason = reason
        """The reason for the outcome, for the owner of the corpus."""
        self.failed: Failure = failed
        """What failed: decoding the content (`clip`), reading this file (`file`), or the storage.
        Bad content fails in every run; in another run, the file or the storage may be readable. If
        the storage failed, other clips may fail too."""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}"
