"""Runs one trial of a study: a training with one worker in an actor of Ray Tune.

The trial trains exactly as `ser-ray train` does, and reports every epoch to Ray Tune. Every report
holds all epochs of the trial, so a later driver finds them in Ray Tune's snapshot. A report
includes a checkpoint if the last one, or the start of the process, is at least `CHECKPOINT_SECONDS`
ago. An interrupted trial resumes from its last checkpoint, or starts again if there is none. A
trial that an earlier study has already trained takes over its results.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyarrow import fs
from ray import tune

from ser_ray.errors import is_permanent
from ser_ray.search.space import recipe_with
from ser_ray.shards.read import ShardSet
from ser_ray.training.checkpoint import SELECTED, STATE, local_checkpoint, read_progress
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.trainer import EpochReport

OBJECTIVE = "best_val_ua"
"""The metric that a search maximises: the last of `objectives`, or 0 after a permanent error."""
CHECKPOINT_SECONDS = 30.0
"""Shortest time between two checkpoints of a trial."""


class TrainedTrial(NamedTuple):
    """A training of an earlier study."""

    recipe: TrainConfig
    report: dict[str, Any]
    """The trial's last report, without OBJECTIVE."""
    checkpoint: str
    """Folder of its selected checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSetup:
    """The recipe, data and weights that all trials of a study share."""

    recipe: TrainConfig
    """The recipe in which each trial replaces some fields by its own values."""
    shards: ShardSet
    pretrained: Mapping[str, Pretrained]
    """Initial weights, for every value of `TrainConfig.weights` that a trial may have."""
    finish: Callable[[Path, ShardSet, TrainConfig], None] | None = None
    """Called when a trial finishes, with the folder of its selected checkpoint, the shards, and its
    recipe. None in a search, because its trials do not store their weights."""
    trained: Sequence[TrainedTrial] = ()
    """Trainings of an earlier study. A trial with the same recipe is not trained again."""


def objectives(rows: Sequence[Mapping[str, float]], recipe: TrainConfig) -> list[float]:
    """Return the best validation UA up to each epoch, because UA fluctuates between epochs.

    After the recipe's last epoch, the value is the validation UA of the selected epoch.
    """
    values = list(accumulate((row["val/ua"] for row in rows), max))
    if recipe.keep == "last" and len(rows) == recipe.epochs:
        values[-1] = rows[-1]["val/ua"]
    return values


def run_trial(values: dict[str, Any], setup: TrialSetup, resources: dict[str, float]) -> None:
    """Train a trial from its beginning or its checkpoint. Ray Tune calls this function in an actor.

    Args:
        values: fields of the recipe that this trial replaces, by name.
        setup: recipe, data and weights of all trials.
        resources: CPUs and GPUs of a trial, as in `ser_ray.search.slots.Slots`.
    """
    reported: dict[str, Any] = {}
    try:
        recipe = recipe_with(setup.recipe, values)
        with tempfile.TemporaryDirectory() as scratch:
            reporter = Reporter(recipe, reported, Path(scratch), setup.finish is not None)
            _train(recipe, setup, resources, reporter)
            if setup.finish is not None:
                setup.finish(reporter.selected, setup.shards, recipe)
    except Exception as problem:
        # A permanent error is the trial's result. After another error, Ray Tune tries again, up to
        # `RunConfig.max_failures` times.
        if not is_permanent(problem):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reported.pop("epoch", None)  # ASHA ignores a report without an epoch
        tune.report(reported | {OBJECTIVE: 0.0, "problem": f"{type(problem).__name__}: {problem}"})


def _train(
    recipe: TrainConfig, setup: TrialSetup, resources: dict[str, float], reporter: "Reporter"
) -> None:
    torch.set_num_threads(int(resources["CPU"]))
    device = torch.device("cuda" if "GPU" in resources else "cpu")
    for trained in setup.trained:
        if trained.recipe == recipe:
            with local_checkpoint(trained.checkpoint) as directory:
                shutil.copytree(directory, reporter.selected)
            objective = objectives(trained.report["history"], recipe)[-1]
            reporter.reported |= trained.report | {OBJECTIVE: objective}
            tune.report(dict(reporter.reported))
            return
    pretrained = setup.pretrained[recipe.weights]
    checkpoint = tune.get_checkpoint()
    # Ray Tune's snapshot may name a checkpoint that was deleted after its trial had ended.
    if checkpoint is None or read_progress(checkpoint.filesystem, checkpoint.path) is None:
        fit(recipe, setup.shards, pretrained, reporter, device=device)
        return
    with checkpoint.as_directory() as directory:
        resume = Path(directory)
        if (resume / SELECTED).exists():
            shutil.copytree(resume / SELECTED, reporter.selected)
        fit(recipe, setup.shards, pretrained, reporter, resume=resume, device=device)


class Reporter:
    """Reports each epoch to Ray Tune, with a checkpoint at most every CHECKPOINT_SECONDS.

    Args:
        recipe: the trial's recipe.
        reported: is filled with the content of the last report.
        scratch: an empty folder.
        keep_selected: whether to keep the checkpoint of the selected epoch, in `selected`.
    """

    def __init__(
        self, recipe: TrainConfig, reported: dict[str, Any], scratch: Path, keep_selected: bool
    ) -> None:
        self.recipe, self.reported, self.keep_selected = recipe, reported, keep_selected
        self.latest, self.selected = scratch / "latest", scratch / SELECTED
        self.started_ms = time.time_ns() // 1_000_000
        self._saved_at = time.monotonic()

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Report one epoch."""
        assert epoch is not None, "only a preemption notice asks for a report within an epoch"
        progress = asdict(epoch.progress)  # a copy, because Ray may send it during the next epoch
        objective = objectives(progress["history"], self.recipe)[-1]
        self.reported |= progress | {OBJECTIVE: objective, "started_ms": self.started_ms}
        # With keep="last", every epoch is selected until the next one, so only the last is stored.
        is_final = self.recipe.keep == "best" or progress["epoch"] == self.recipe.epochs
        if self.keep_selected and epoch.is_selected and is_final:
            make_snapshot().store(fs.LocalFileSystem(), str(self.selected))
        if time.monotonic() - self._saved_at < CHECKPOINT_SECONDS:
            tune.report(dict(self.reported))
            return
        make_snapshot().store(fs.LocalFileSystem(), str(self.latest))
        if self.selected.exists():
            shutil.copytree(
                self.selected, self.latest / SELECTED, ignore=shutil.ignore_patterns(STATE)
            )
        tune.report(dict(self.reported), checkpoint=tune.Checkpoint.from_directory(self.latest))
        self._saved_at = time.monotonic()
