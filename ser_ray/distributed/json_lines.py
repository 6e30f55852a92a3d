"""A file of JSON lines that one process appends to and another follows."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Write an entry at the end of the file."""
    line = json.dumps(entry)
    with path.open("a") as file:
        # The first line break ends what a full disk or a kill may have left of a line.
        file.write(f"\n{line}\n")


class LineFollower:
    """Reads a file that grows; there need not be one yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The entries since the last call."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in iter(file.readline, b""):
                if not line.endswith(b"\n"):
                    break  # it is being written
                self._offset += len(line)
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a blank line, or one that was cut short
                yield entry
