"""A run's folder on the storage: its record, its checkpoints, its lock and its journal.

    run.json                what the run is, which MLflow run it has, whether it is finished
    checkpoint-EEEE-SSSSSS  the training after E epochs and S steps of the next
    selected                  the selected checkpoint, once the training is finished

What a run goes on from is read from the checkpoints themselves: the newest that was written to its
end and whose selected epoch is there too. Ray's own list of them is rewritten in place, so a full
disk or a lost machine can leave half of it; it is dropped whenever a driver starts.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from ser_ray.errors import CheckpointError, ConfigError, MismatchError
from ser_ray.storage.atomic import write_file
from ser_ray.storage.lock import Lock
from ser_ray.storage.paths import filesystem_of, location_inside
from ser_ray.training.checkpoint import (
    CARD,
    MODEL,
    CheckpointCard,
    checkpoint_name,
    name_difference,
    read_card,
    read_progress,
)
from ser_ray.training.config import TrainConfig

RECORD = "run.json"
SELECTED = "selected"
GROUPS = "groups"
"""In a study's folder: those of its trials of several workers, until they have ended."""
RAY_LIST = "checkpoint_manager_snapshot.json"
DYING_SECONDS = 5.0
"""How long a worker may outlive the controller that owned it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint that was written to its end."""

    name: str
    progress: dict[str, Any]
    """How far the training was and how it went (`ser_ray.training.checkpoint.Snapshot`)."""

    @property
    def selected(self) -> str:
        """Name of the checkpoint to keep as it was known then; empty before any epoch."""
        row = self.progress["selected"]
        return checkpoint_name(int(row["epoch"])) if row else ""


class RunFolder:
    """A run's folder.

    Args:
        storage: folder or URI that holds the folders of many runs.
        name: the run's.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = storage, name
        self.filesystem, self.root = filesystem_of(storage)
        self.path = f"{self.root.rstrip('/')}/{name}"

    @property
    def location(self) -> str:
        """Where it is, as a user would type it."""
        return location_inside(self.storage, self.name)

    def lock(self) -> Lock:
        """The right to train under this name."""
        advice = "is training under this name; wait for it to end, or give another --name"
        return Lock(self.location, CheckpointError, advice)

    def record(self) -> dict[str, Any]:
        """The run's record; empty before its first start.

        Raises:
            CheckpointError: it is not one.
        """
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{RECORD}") as stream:
                record: dict[str, Any] = json.loads(stream.read())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(
                f"{location_inside(self.location, RECORD)} is not a run's record ({error}): delete "
                "the folder, or give another --name, to start afresh"
            ) from error
        return record

    def update_record(self, **values: Any) -> None:
        """Change entries of the record."""
        content = json.dumps(self.record() | values, indent=2).encode()
        self.filesystem.create_dir(self.path, recursive=True)
        write_file(self.filesystem, f"{self.path}/{RECORD}", content)

    def require_same(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with a run that was another recipe or had other shards.

        Raises:
            MismatchError: names what differs.
        """
        identity, record = json.loads(json.dumps(identity)), self.record()
        if not record:
            self.journal().unlink(missing_ok=True)  # of a run whose folder is gone
        difference = name_difference(_as_now(record.get("identity", identity)), identity)
        if difference:
            raise MismatchError(
                f"{self.location}: this name was given to a run whose {difference}; give another "
                "--name to start afresh, or restore what it was trained with"
            )

    def journal(self) -> Path:
        """The driver's own file of epoch lines: beside a local run, else in the output folder."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            folder = Path(self.path)
        else:  # the same name may be in use on another storage
            digest = hashlib.sha256(self.location.encode()).hexdigest()[:8]
            folder = Path("ser-ray-out/journals", f"{self.name}-{digest}")
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "epochs.jsonl").absolute()

    def newest(self) -> Stored | None:
        """The newest checkpoint from which the training can go on; None to begin.

        One that was cut short, or whose selected epoch was, is passed over with a warning.
        """
        for name in sorted(self._checkpoints(), reverse=True):
            progress = read_progress(self.filesystem, f"{self.path}/{name}")
            stored = Stored(name, progress) if progress is not None else None
            if stored is not None and self._is_whole(stored.selected):
                return stored
            logger.warning("%s/%s is not whole: going on without it", self.location, name)
        return None

    def tidy(self, newest: Stored | None) -> None:
        """Delete Ray's list, and all checkpoints but `newest` and its selected one."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{RAY_LIST}")
        kept = {newest.name, newest.selected} if newest is not None else set()
        for name in self._checkpoints():
            if name not in kept:
                self.delete(name)

    def selected_card(self) -> CheckpointCard:
        """Card of the selected checkpoint of a finished run."""
        with self.filesystem.open_input_stream(f"{self.path}/{SELECTED}/{CARD}") as stream:
            return CheckpointCard.from_json(stream.read().decode())

    def keep_selected(self, newest: Stored, origin: dict[str, str], into: Path) -> CheckpointCard:
        """Copy the selected checkpoint to its fixed name, and into an empty local folder.

        Args:
            origin: which MLflow run it came from, written beside it.
        """
        source = f"{self.path}/{newest.selected}"
        for name in (CARD, MODEL):  # what going on needs is not needed any more
            with (
                self.filesystem.open_input_stream(f"{source}/{name}") as stored,
                (into / name).open("wb") as local,
            ):
                shutil.copyfileobj(stored, local)
        (into / RECORD).write_text(json.dumps(origin))
        target = f"{self.path}/{SELECTED}"
        self.filesystem.create_dir(target, recursive=True)
        fs.copy_files(str(into), target, destination_filesystem=self.filesystem, use_threads=False)
        return read_card(into)

    def delete(self, name: str) -> None:
        """Delete a checkpoint, if it is there; a lost controller's worker may be writing into it.

        Such a worker ends soon; what it leaves all the same is no obstacle, only disk space.
        """
        until = time.monotonic() + DYING_SECONDS
        while True:
            try:
                self.filesystem.delete_dir(f"{self.path}/{name}")
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > until:
                    logger.warning("%s/%s could not be deleted: %s", self.location, name, error)
                    return
                time.sleep(0.1)
            else:
                return

    def _checkpoints(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return [
            entry.base_name
            for entry in self.filesystem.get_file_info(selector)
            if entry.type == fs.FileType.Directory and entry.base_name.startswith("checkpoint-")
        ]

    def _is_whole(self, name: str) -> bool:
        return not name or read_progress(self.filesystem, f"{self.path}/{name}") is not None


def _as_now(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity whose recipe, of an older program perhaps, says all that today's say."""
    recipes = {name: identity[name] for name in ("config", "recipe") if name in identity}
    with contextlib.suppress(ConfigError):  # of a newer one: what differs is named
        recipes = {name: TrainConfig.from_dict(it).to_dict() for name, it in recipes.items()}
    return identity | recipes
