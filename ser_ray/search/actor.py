"""One trial of a study: a training with one worker inside Ray Tune's actor.

The trial trains exactly as `ser-ray train` does and reports every epoch to Ray Tune. Every report
holds all epochs of the trial, so a later driver finds them in Ray Tune's snapshot. Every
`CHECKPOINT_SECONDS` a report carries a checkpoint, from which an interrupted trial resumes.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from ser_ray.distributed.run_folder import SELECTED
from ser_ray.errors import is_permanent
from ser_ray.search.slots import Slots
from ser_ray.search.space import recipe_of
from ser_ray.shards.read import ShardSet
from ser_ray.training.checkpoint import (
    PROGRESS,
    STATE,
    Snapshot,
    learning_rates_by_epoch,
    read_progress,
)
from ser_ray.training.config import TrainConfig
from ser_ray.training.model import Pretrained
from ser_ray.training.trainer import EpochReport, MakeSnapshot, fit

OBJECTIVE = "best_val_ua"
"""What a search maximizes: the best validation UA so far, because a single epoch at a high learning
rate says little. After a trial's last epoch it is the validation UA of the selected epoch."""
CHECKPOINT_SECONDS = 30.0

Finish = Callable[[Path, ShardSet, TrainConfig], None]
"""Called when a trial finishes, with the directory of its selected checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSetup:
    """What all trials of a study share."""

    recipe: TrainConfig
    """The recipe that the drawn values go into."""
    shards: ShardSet
    slots: Slots
    finish: Finish | None = None
    """None for a search, whose trials keep no weights."""


class Progress:
    """The epochs of one trial. Every report to Ray Tune holds all of them."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {
            "history": [],
            "learning_rates": [],
            "times_ms": [],
            "selected_confusion": [],
            "objective_by_epoch": [],
        }

    def add(self, epoch: EpochReport, recipe: TrainConfig) -> None:
        """Add an epoch.

        The lists are replaced, not changed: Ray may not have sent the last report yet.
        """
        before = self.values
        self.values = {
            "history": [*before["history"], epoch.row],
            "learning_rates": [*before["learning_rates"], epoch.learning_rates],
            "times_ms": [*before["times_ms"], epoch.timestamp_ms],
            "selected_confusion": (
                epoch.confusion if epoch.is_selected else before["selected_confusion"]
            ),
            "objective_by_epoch": [
                *before["objective_by_epoch"],
                next_objective(recipe, epoch.row, before["objective_by_epoch"]),
            ],
        }

    def restore(self, checkpoint: dict[str, Any], recipe: TrainConfig) -> None:
        """Continue from the progress that a checkpoint holds."""
        objective: list[float] = []
        for row in checkpoint["history"]:
            objective.append(next_objective(recipe, row, objective))
        self.values = {
            "history": checkpoint["history"],
            "learning_rates": learning_rates_by_epoch(checkpoint),
            "times_ms": checkpoint["times_ms"],
            "selected_confusion": checkpoint["selected_confusion"],
            "objective_by_epoch": objective,
        }

    def result(self) -> dict[str, Any]:
        """What a trial reports after an epoch."""
        objective = self.values["objective_by_epoch"]
        return {OBJECTIVE: objective[-1], "epoch": len(objective)} | self.values

    def failure(self, problem: BaseException) -> dict[str, Any]:
        """What a trial reports when it cannot continue; without `epoch`, ASHA ignores it."""
        return {OBJECTIVE: 0.0, "problem": f"{type(problem).__name__}: {problem}"} | self.values


def next_objective(recipe: TrainConfig, row: dict[str, float], before: list[float]) -> float:
    """The objective after an epoch, from its row and the objective of every epoch before it."""
    is_selected = recipe.keep == "last" and row["epoch"] == recipe.epochs
    return row["val/ua"] if is_selected else max([row["val/ua"], *before[-1:]])


def run_trial(values: dict[str, Any], setup: TrialSetup, pretrained: dict[str, Pretrained]) -> None:
    """Train one trial from its beginning or from its checkpoint; Ray Tune calls this in an actor.

    Args:
        values: what was drawn.
        setup: what all trials share.
        pretrained: initial weights for every value of `TrainConfig.weights` that may be drawn.
    """
    progress = Progress()
    try:
        recipe = recipe_of(setup.recipe, values)
        with tempfile.TemporaryDirectory() as scratch:
            reporter = Reporter(recipe, progress, Path(scratch), setup.finish is not None)
            _train(recipe, setup, pretrained[recipe.weights], reporter)
            if setup.finish is not None:
                setup.finish(reporter.selected, setup.shards, recipe)
    except Exception as problem:
        # A permanent error is the trial's result. Any other one fails the trial's process, and Ray
        # Tune tries again.
        if not is_permanent(problem):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tune.report(progress.failure(problem))


def _train(
    recipe: TrainConfig, setup: TrialSetup, pretrained: Pretrained, reporter: "Reporter"
) -> None:
    torch.set_num_threads(setup.slots.cpus)
    device = torch.device("cuda" if setup.slots.gpus else "cpu")
    checkpoint = tune.get_checkpoint()
    # Ray Tune's snapshot may name a checkpoint that was deleted after its trial had ended.
    if checkpoint is None or read_progress(checkpoint.filesystem, checkpoint.path) is None:
        fit(recipe, setup.shards, pretrained, reporter, device=device)
        return
    with checkpoint.as_directory() as directory:
        resume = Path(directory)
        reporter.restore(resume)
        fit(recipe, setup.shards, pretrained, reporter, resume=resume, device=device)


class Reporter:
    """Reports the loop's epochs to Ray Tune, every CHECKPOINT_SECONDS with a checkpoint.

    Args:
        recipe: the trial's recipe.
        progress: the trial's epochs; this adds each one.
        scratch: an empty directory.
        keep_selected: also keep the checkpoint of the selected epoch, in `selected`.
    """

    def __init__(
        self, recipe: TrainConfig, progress: Progress, scratch: Path, keep_selected: bool
    ) -> None:
        self.recipe, self.progress, self.keep_selected = recipe, progress, keep_selected
        self.latest, self.selected = scratch / "latest", scratch / SELECTED
        self._saved_at = time.monotonic()

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Report one epoch."""
        assert epoch is not None, "only a preemption notice asks for a report in mid-epoch"
        self.progress.add(epoch, self.recipe)
        # With keep="last" every epoch is the selected one so far; only the last one is written.
        is_final = self.recipe.keep == "best" or epoch.row["epoch"] == self.recipe.epochs
        if self.keep_selected and epoch.is_selected and is_final:
            _write(make_snapshot(), self.selected)
        if time.monotonic() - self._saved_at < CHECKPOINT_SECONDS:
            tune.report(self.progress.result())
            return
        _write(make_snapshot(), self.latest)
        if self.selected.exists():
            shutil.copytree(
                self.selected, self.latest / SELECTED, ignore=shutil.ignore_patterns(STATE)
            )
        checkpoint = tune.Checkpoint.from_directory(self.latest)
        tune.report(self.progress.result(), checkpoint=checkpoint)
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Path) -> None:
        """Continue after the epochs that a checkpoint holds."""
        self.progress.restore(json.loads((checkpoint / PROGRESS).read_text()), self.recipe)
        if (checkpoint / SELECTED).exists():
            shutil.copytree(checkpoint / SELECTED, self.selected)


def _write(snapshot: Snapshot, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    snapshot.write(directory)
