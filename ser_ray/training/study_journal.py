"""A study's journal: one line for everything that happens to a trial, and its copy on the storage.

The file is on the driver's machine. Where the study's folder is elsewhere, a copy is kept there, so
that a driver on another machine, or in another directory, knows what this one knew.
"""

import json
import logging
from threading import Lock
from typing import Any

from ser_ray.storage import written_whole
from ser_ray.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


class StudyJournal:
    """The journal of the study in a folder; takes up what an earlier driver left.

    Args:
        folder: the study's; beside a local one there is no copy.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.path, self._filesystem = folder.journal(), folder.filesystem
        copy = f"{folder.path}/{self.path.name}"
        self._copy = copy if copy != str(self.path) else ""
        self._offset = self._stored = 0
        self._lock = Lock()
        if self._copy:
            self._fetch()

    def append(self, trial_id: str, **entry: Any) -> None:
        """Write down what happened to a trial."""
        line = json.dumps({"trial": trial_id, **entry})
        with self._lock, self.path.open("a") as file:
            # The first line break ends what a full disk or a kill may have left of a line.
            file.write(f"\n{line}\n")

    def read(self) -> list[dict[str, Any]]:
        """The entries since the last call."""
        entries: list[dict[str, Any]] = []
        if not self.path.exists():
            return entries
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._offset += len(line)
                try:
                    entries.append(json.loads(line))
                except ValueError:
                    continue  # a blank line, or one that was cut short
        return entries

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
                written_whole(self._filesystem, self._copy) as target,
                self._filesystem.open_output_stream(target) as stream,
            ):
                stream.write(content)
        except OSError as error:
            logger.warning("%s: the journal could not be copied there (%s)", self._copy, error)
        else:
            self._stored = len(content)

    def _fetch(self) -> None:
        """Take the copy, unless the local file goes on from it."""
        try:
            with self._filesystem.open_input_stream(self._copy) as stream:
                copy = stream.read()
        except FileNotFoundError:
            return
        if not self.path.exists() or not self.path.read_bytes().startswith(copy):
            self.path.write_bytes(copy)
        self._stored = len(copy)
