"""The run folder, which holds the checkpoints, record and lock of a run.

    run.json                  the record: recipe, shards, MLflow run, and whether it has finished
    checkpoint-EEEEEE-SSSSSS  the training after E epochs and S steps of the next epoch
    selected                  the selected checkpoint, after the training has finished
    report.html               the run's page, to which `evaluate` adds the test part
    error.txt                 the traceback of the latest training that failed, if there is one

A run resumes from the newest complete checkpoint. The checkpoint that was selected at that time
must be complete too. Ray keeps its own list of checkpoints, but rewrites this list in place, so a
full disk or a lost machine can truncate the list. Therefore it is deleted when a training starts.
"""

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs
from safetensors.numpy import load

from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import CheckpointError, MismatchError, SerRayError, last_line
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.shards.read import ShardSet
from ser_ray.storage.atomic import write_file
from ser_ray.storage.json_text import read_object
from ser_ray.storage.lock import FolderLock
from ser_ray.storage.paths import filesystem_of, location_inside, read_file
from ser_ray.training.checkpoint import (
    CARD,
    MODEL,
    SELECTED,
    STATE,
    VALIDATION_PROBABILITIES,
    checkpoint_name,
    copy_encoder,
    learning_rates_by_epoch,
    read_card,
    read_progress,
)
from ser_ray.training.checkpoint_card import CARD_ERRORS, CheckpointCard, first_difference
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import TrainConfig

RECORD = "run.json"
TRACE = "error.txt"
RAY_LIST = "checkpoint_manager_snapshot.json"
"""Ray's list of checkpoints. Ray has no public option to ignore the list. A test of `train`
fails if Ray renames the file."""
DELETE_SECONDS = 5.0
"""How long to retry if a checkpoint cannot be deleted."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Epoch:
    """An epoch whose checkpoint has been stored."""

    row: dict[str, float]
    """The metrics of the epoch, by the names under which they are logged."""
    learning_rates: list[float]
    """Learning rate of every step."""
    timestamp_ms: int
    """When the epoch ended, in milliseconds since 1970."""
    system_metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    """System metrics of every node, by the node's address."""
    is_restored: bool = False
    """Whether the epoch was read from a checkpoint, because it ended before this start or its
    report was lost."""


OnEpoch = Callable[[Epoch], None]
"""Called with an epoch whose checkpoint has been stored."""


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint that was written completely."""

    name: str
    progress: dict[str, Any]
    """Epochs, steps and scores up to this checkpoint (`ser_ray.training.checkpoint.Snapshot`)."""

    @property
    def selected(self) -> str:
        """Name of the checkpoint that was selected when this one was written.

        Empty if no epoch had ended by then.
        """
        row = self.progress["selected"]
        return checkpoint_name(int(row["epoch"])) if row else ""

    def epochs(self) -> Generator[Epoch]:
        """Yield the epochs that ended before the checkpoint was written."""
        rates = learning_rates_by_epoch(self.progress)
        rows, times = self.progress["history"], self.progress["times_ms"]
        for row, learning_rates, timestamp_ms in zip(rows, rates, times, strict=True):
            yield Epoch(row, learning_rates, timestamp_ms, is_restored=True)


class RunFolder:
    """The folder of a run.

    Args:
        storage: folder or URI that holds all run folders.
        name: name of the run, of its folder and of its MLflow run.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.name = name
        self.location = location_inside(storage, name)
        """Path or URI of the folder."""
        self.report = location_inside(self.location, REPORT)
        """Path or URI of the run's page."""
        self.filesystem, self.root = filesystem_of(storage)
        self.path = f"{self.root.rstrip('/')}/{name}"
        self._lock: FolderLock | None = None

    def lock(self) -> FolderLock:
        """Return the lock that a process holds while it trains in this folder."""
        self._lock = FolderLock(
            self.location,
            CheckpointError,
            activity="is training under this name",
            advice="wait for it to end, or give another --name",
        )
        return self._lock

    def check_lock(self) -> None:
        """Raise LockLostError if this process had the lock of the folder, but has lost it."""
        if self._lock is not None:
            self._lock.require_held()

    def is_used(self) -> bool:
        """Return whether the folder has files, or a file has its name."""
        if self.filesystem.get_file_info(self.path).is_file:
            return True
        return bool(self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True)))

    def read(self, name: str) -> bytes:
        """Read a small file in the folder."""
        return read_file(location_inside(self.location, name))

    def write(self, name: str, text: str) -> None:
        """Write a small file in the folder, completely or not at all."""
        write_file(self.filesystem, f"{self.path}/{name}", text.encode())

    def record(self) -> dict[str, Any]:
        """Read the run's record, which is empty before the first start.

        Raises:
            CheckpointError: the file is damaged.
        """
        try:
            return read_object(self.read(RECORD))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise CheckpointError(
                f"{location_inside(self.location, RECORD)} is not a run's record ({error}): delete "
                "the folder, or give another --name, to start afresh"
            ) from error

    def update_record(self, **values: Any) -> None:
        """Set entries of the record; other entries do not change."""
        self.filesystem.create_dir(self.path, recursive=True)
        self.write(RECORD, json.dumps(self.record() | values, indent=2))

    def require_same(self, identity: dict[str, Any]) -> None:
        """Check that the folder's run has these settings (`identity` in `start_run`).

        Raises:
            MismatchError: another verb made the run, or the run has other settings; the message
                names the first difference.
        """
        identity = json.loads(json.dumps(identity))
        theirs = self.record().get("identity", identity)
        if theirs.keys() != identity.keys():
            raise MismatchError(
                f"{self.location}: the earlier run of this name was made by another verb; give "
                "another --name"
            )
        if difference := first_difference(theirs, identity):
            raise MismatchError(
                f"{self.location}: the earlier run of this name has other settings or shards "
                f"({difference}); give another --name to start afresh, or use those of the earlier "
                "run"
            )

    def newest(self) -> StoredCheckpoint | None:
        """Return the newest checkpoint from which the training can resume; None if there is none.

        A checkpoint is skipped with a warning if it or its selected checkpoint is incomplete.
        """
        for name in sorted(self._checkpoints(), reverse=True):
            progress = read_progress(self.filesystem, f"{self.path}/{name}")
            if progress is not None:
                stored = StoredCheckpoint(name, progress)
                selected = f"{self.path}/{stored.selected}"
                if not stored.selected or read_progress(self.filesystem, selected) is not None:
                    return stored
            logger.warning("%s/%s is incomplete and is skipped", self.location, name)
        return None

    def restore(self, on_epoch: OnEpoch) -> StoredCheckpoint | None:
        """Return the checkpoint to resume from, after passing its epochs to `on_epoch`.

        All other checkpoints are deleted, except the one that was selected when it was written.

        Raises:
            LockLostError: another process has taken over the folder.
        """
        newest = self.newest()
        self.tidy(newest)
        for epoch in newest.epochs() if newest is not None else ():
            on_epoch(epoch)
        return newest

    def tidy(self, newest: StoredCheckpoint | None) -> None:
        """Delete Ray's list, and all checkpoints except `newest` and its selected checkpoint.

        Raises:
            LockLostError: another process has taken over the folder.
        """
        self.check_lock()
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.delete_file(f"{self.path}/{RAY_LIST}")
        kept = {newest.name, newest.selected} if newest is not None else set()
        for name in self._checkpoints():
            if name not in kept:
                self.delete(name)

    def selected_card(self) -> CheckpointCard:
        """Read the card of the selected checkpoint of a finished run.

        Raises:
            CheckpointError: the checkpoint was deleted, or the card is damaged.
        """
        try:
            return CheckpointCard.from_json(self.read(f"{SELECTED}/{CARD}").decode())
        except (OSError, *CARD_ERRORS) as error:
            raise CheckpointError(
                f"{location_inside(self.location, SELECTED)}: the model of this finished run "
                f"cannot be read ({error}); restore it, or give another --name to train again"
            ) from error

    def keep_selected(
        self,
        newest: StoredCheckpoint,
        origin: Mapping[str, str | Sequence[str]],
        into: Path,
        *,
        encoder: bool = True,
    ) -> CheckpointCard:
        """Copy the selected checkpoint into `selected`, and into an empty local folder.

        Args:
            newest: the last checkpoint of the training.
            origin: the training's MLflow run, report and shards, which are written beside the
                checkpoint.
            into: the local folder.
            encoder: whether to copy the encoder's weights too, if the model has an encoder.

        Raises:
            LockLostError: another process has taken over the folder.
        """
        self.check_lock()
        source = f"{self.path}/{newest.selected}"
        for name in (CARD, MODEL):  # the other files are only needed to resume
            fs.copy_files(
                f"{source}/{name}",
                str(into / name),
                source_filesystem=self.filesystem,
                use_threads=False,
            )
        (into / RECORD).write_text(json.dumps(origin))
        if encoder:
            copy_encoder(into)
        target = f"{self.path}/{SELECTED}"
        self.filesystem.create_dir(target, recursive=True)
        fs.copy_files(str(into), target, destination_filesystem=self.filesystem, use_threads=False)
        return read_card(into)

    def validation_probabilities(self, newest: StoredCheckpoint) -> np.ndarray:
        """Read the validation probabilities of the selected epoch [clips, labels]."""
        return load(self.read(f"{newest.selected}/{STATE}"))[VALIDATION_PROBABILITIES]

    @contextlib.contextmanager
    def local(self, checkpoint: StoredCheckpoint | None) -> Iterator[Path | None]:
        """Yield a checkpoint as a local directory. A download is deleted at the end."""
        if checkpoint is None:
            yield None
        elif isinstance(self.filesystem, fs.LocalFileSystem):
            yield Path(self.path, checkpoint.name)
        else:
            with tempfile.TemporaryDirectory() as directory:
                source = f"{self.path}/{checkpoint.name}"
                fs.copy_files(source, directory, source_filesystem=self.filesystem)
                yield Path(directory)

    def failure(self, trace: str) -> SerRayError:
        """Return the error for a failed training, and write the traceback into the folder.

        Args:
            trace: traceback of Python or Ray. Its last line becomes the reason in the message.
        """
        try:
            self.write(TRACE, trace)
            place = f"the trace is in {location_inside(self.location, TRACE)}"
        except OSError as error:  # the storage may have made the training fail
            place = f"no trace could be written: {error}"
        return SerRayError(
            f"the training failed: {last_line(trace) or 'no reason given'} ({place}); the same "
            "command tries again from the newest checkpoint, if there is one"
        )

    def delete(self, name: str) -> None:
        """Delete a checkpoint if it exists, and retry for DELETE_SECONDS.

        A worker may write to the checkpoint for some seconds after the loss of its controller.
        Files that remain use disk space, but do no other harm.
        """
        deadline = time.monotonic() + DELETE_SECONDS
        while True:
            try:
                self.filesystem.delete_dir(f"{self.path}/{name}")
                return
            except FileNotFoundError:
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    logger.warning("%s/%s could not be deleted: %s", self.location, name, error)
                    return
            time.sleep(0.1)

    def _checkpoints(self) -> list[str]:
        selector = fs.FileSelector(self.path, allow_not_found=True)
        return [
            entry.base_name
            for entry in self.filesystem.get_file_info(selector)
            if entry.type == fs.FileType.Directory and entry.base_name.startswith("checkpoint-")
        ]


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One training: what is trained, on which clips, and where it is stored."""

    folder: RunFolder
    recipe: TrainConfig
    shards: ShardSet
    pretrained: Pretrained
    """The weights to start from."""
    run: RunConfig
