"""A study's journal: one line for everything that happens to a trial, and its copy on the storage.

The file is on the driver's machine. Where the study's folder is elsewhere, a copy is kept there, so
that a driver on another machine, or in another directory, knows what this one knew.
"""

import logging
from threading import Lock
from typing import Any

from ser_ray.distributed.json_lines import LineFollower, append_line
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.storage.atomic import atomic_write

logger = logging.getLogger(__name__)


class StudyJournal:
    """The journal of the study in a folder; takes up what an earlier driver left.

    Args:
        folder: the study's; beside a local one there is no copy.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.path = folder, folder.journal()
        copy = f"{folder.path}/{self.path.name}"
        self._copy = copy if copy != str(self.path) else ""
        self._lines, self._stored = LineFollower(self.path), 0
        self._lock = Lock()
        if self._copy:
            self._fetch()

    def append(self, trial_id: str, **entry: Any) -> None:
        """Write down what happened to a trial."""
        with self._lock:
            append_line(self.path, {"trial": trial_id, **entry})

    def read(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        return list(self._lines.read())

    def store(self) -> None:
        """Bring the copy up to date; a storage that does not answer costs a warning."""
        if not self._copy or not self.path.exists():
            return
        with self._lock:
            content = self.path.read_bytes()
        if len(content) == self._stored:
            return
        try:
            with (
                atomic_write(self.folder.filesystem, self._copy) as target,
                self.folder.filesystem.open_output_stream(target) as stream,
            ):
                stream.write(content)
        except OSError as error:
            logger.warning("%s: the journal could not be copied there (%s)", self._copy, error)
        else:
            self._stored = len(content)

    def _fetch(self) -> None:
        """Take the copy, unless the local file goes on from it."""
        try:
            with self.folder.filesystem.open_input_stream(self._copy) as stream:
                copy = stream.read()
        except FileNotFoundError:
            return
        if not self.path.exists() or not self.path.read_bytes().startswith(copy):
            self.path.write_bytes(copy)
        self._stored = len(copy)
