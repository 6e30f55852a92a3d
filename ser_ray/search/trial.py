"""What a trial is given and what it reports to Ray Tune."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ser_ray.errors import ConfigError, DivergedError
from ser_ray.shards.read import ShardSet
from ser_ray.training.config import TrainConfig

OBJECTIVE = "best_val_ua"
"""What a search raises: the best validation UA so far, for one epoch at a high learning rate says
little; when a trial is done, that of the epoch it keeps."""


PROBLEMS = (ConfigError, DivergedError, torch.OutOfMemoryError)
"""What the recipe itself causes. It is the trial's result, because a new process would meet it too.
Every other error fails the trial's process, and Ray Tune retries the trial."""


Finish = Callable[[Path, ShardSet, TrainConfig], None]
"""Called in a trial that is done with the directory of its selected checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """Places for trials, all of one size."""

    count: int
    workers: int
    """Workers of a trial."""
    cpus: int
    """Of a worker."""
    gpus: float
    """Of a worker; 0 is training on CPUs."""

    def bundle(self) -> dict[str, float]:
        """Ray's resources of one worker."""
        return {"CPU": float(self.cpus)} | ({"GPU": self.gpus} if self.gpus else {})


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSetup:
    """What all trials of a study share."""

    recipe: TrainConfig
    """The recipe that the drawn values go into."""
    shards: ShardSet
    slots: Slots
    storage: str
    """Location of the study's folder, as Ray workers open it."""
    finish: Finish | None = None
    """Where it is set every trial is needed: one that failed is trained again by the next start."""


def trial_metrics(
    recipe: TrainConfig,
    row: dict[str, float],
    lr: list[float],
    confusion: list[list[int]],
    objective: list[float],
) -> dict[str, Any]:
    """What Tune is told of an epoch; appends to the trial's `objective` by epoch."""
    del objective[int(row["epoch"]) - 1 :]  # done again after a lost process
    is_kept = recipe.keep == "last" and row["epoch"] == recipe.epochs
    objective.append(row["val_ua"] if is_kept else max([row["val_ua"], *objective[-1:]]))
    return {
        OBJECTIVE: objective[-1],
        "epoch": int(row["epoch"]),
        "objective_by_epoch": list(objective),
        "row": row,
        "lr": lr,
        "confusion": confusion,
    }


def problem_metrics(problem: BaseException, objective: list[float]) -> dict[str, Any]:
    """What Tune is told of a trial that cannot go on, after the epochs of `objective`."""
    return {
        "problem": f"{type(problem).__name__}: {problem}",
        OBJECTIVE: 0.0,
        "objective_by_epoch": list(objective),
    }
