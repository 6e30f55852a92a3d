"""Runs the trials of a study with Ray Tune: searchers, schedulers, retries and resuming.

Every trial runs in an actor. The next trial reuses the actor with its imports and CUDA context. Ray
Tune restores an interrupted study from its snapshots. Ended trials stay ended, running trials
resume from their checkpoints, and trials whose process failed too often are retried. A snapshot
holds the trials and the searcher. ASHA is restored from the results of the trials.

Ray Tune has no public functions for three tasks: to find out whether there is a snapshot (the
public `Tuner.can_restore` looks for a file that only `Tuner` writes), to read the last result of a
trial, and to train a single ended trial again. `tests/search/test_tune_run.py` fails when an
upgrade of Ray changes the private ones that are used here.
"""

import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from ray import tune
from ray.tune.execution.experiment_state import _find_newest_experiment_checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.basic_variant import BasicVariantGenerator

from ser_ray.cluster.resources import format_resources
from ser_ray.distributed.placement import RoomWatch, placement_groups
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search.actor import OBJECTIVE, TrialSetup, objectives, run_trial
from ser_ray.search.config import TuneConfig
from ser_ray.search.space import Dimension, hyperparameters_of, recipe_with
from ser_ray.training.recipe import TrainConfig

SNAPSHOT_SECONDS = 2
"""Time between two snapshots of a study. A killed driver loses at most the results of this time."""


Plan = dict[str, Any]
"""The arguments of `tune.run` that say which trials a study has and in which order."""


def search_plan(recipe: TrainConfig, config: TuneConfig, slots: int) -> Plan:
    """Plan a search: a searcher or a grid, and the scheduler that stops the worse trials."""
    scheduler = ResumableAsha(recipe, config) if config.scheduler == "asha" else FIFOScheduler()
    if config.searcher == "grid":
        return points_plan(grid_points(recipe, config), slots, scheduler)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A resumed trial repeats the epochs since its checkpoint, which Optuna already knows.
    warnings.filterwarnings("ignore", message="The reported value is ignored because this `step=")
    samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    searcher = OptunaSearch(
        {item.name: optuna_distribution(item) for item in config.dimensions},
        metric=OBJECTIVE,
        mode="max",
        points_to_evaluate=baseline(recipe, config),
        sampler=samplers[config.searcher](seed=recipe.seed),
    )
    limited = SlotLimiter(searcher, max_concurrent=slots)
    return {"search_alg": limited, "num_samples": config.trials, "scheduler": scheduler}


def points_plan(points: Sequence[dict[str, Any]], slots: int, scheduler: TrialScheduler) -> Plan:
    """Plan to train every point once, in this order. A point has a value for each name."""
    return {
        "search_alg": SlotVariants(points_to_evaluate=list(points), max_concurrent=slots),
        "num_samples": len(points),
        "scheduler": scheduler,
        "config": {name: tune.choice([point[name] for point in points]) for name in points[0]},
    }


def grid_points(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """Return all points of a grid. If the space contains the recipe itself, it comes first."""
    names = [item.name for item in config.dimensions]
    grid = itertools.product(*(item.grid_values() for item in config.dimensions))
    points = [*baseline(recipe, config), *(dict(zip(names, point, strict=True)) for point in grid)]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def num_trials(recipe: TrainConfig, config: TuneConfig) -> int:
    """Number of trials that a search has."""
    return len(grid_points(recipe, config)) if config.searcher == "grid" else config.trials


def excluded(recipe: TrainConfig, config: TuneConfig) -> list[str]:
    """Name and value of each field of the recipe that the space cannot draw."""
    values = hyperparameters_of(recipe, config.dimensions)
    return [
        f"{item.name} {values[item.name]}"
        for item in config.dimensions
        if not item.contains(values[item.name])
    ]


def baseline(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """Return the recipe as the first point to try; empty if the space excludes it."""
    return [] if excluded(recipe, config) else [hyperparameters_of(recipe, config.dimensions)]


def optuna_distribution(dimension: Dimension) -> Any:
    """Convert a dimension to Optuna's distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high = dimension.values[0], dimension.values[-1]
    match dimension.distribution:
        case "choice":
            return CategoricalDistribution(dimension.values)
        case "integer":
            return IntDistribution(low, high)
        case _:
            return FloatDistribution(low, high, log=dimension.distribution == "loguniform")


class _CurrentSlots:
    """On restore, use the current concurrency limit."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore everything but the concurrency limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class SlotLimiter(_CurrentSlots, ConcurrencyLimiter):
    """Limits the concurrent trials of a searcher to the number of slots."""


class SlotVariants(_CurrentSlots, BasicVariantGenerator):
    """Tries a list of points. The number of slots limits the concurrent trials."""


class ResumableAsha(ASHAScheduler):
    """ASHA (Li 2018) that continues after a restart.

    Ray Tune's snapshots do not contain the scheduler. On restore, Ray Tune adds every trial again
    with its last result, which holds all epochs of the trial. This class replays these epochs.
    """

    def __init__(self, recipe: TrainConfig, config: TuneConfig) -> None:
        self.recipe = recipe
        drawn = [max(item.values) for item in config.dimensions if item.name == "epochs"]
        most = max([recipe.epochs, *drawn])
        super().__init__(
            time_attr="epoch",
            max_t=most,
            grace_period=min(config.grace_epochs, most),
            reduction_factor=config.reduction,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Replay the epochs of a restored trial. The decisions were already carried out."""
        super().on_trial_add(tune_controller, trial)
        rows = last_result(trial).get("history", [])
        past = objectives(rows, recipe_with(self.recipe, trial.config))
        for epoch, value in enumerate(past, start=1):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, OBJECTIVE: value})


class RetryFailed(FIFOScheduler):
    """Trains trials in their order. A resumed study trains trials with a problem again.

    For Ray Tune, a trial that reported a problem has ended like any other, and `ResumeConfig`
    resumes either all ended trials or none.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Queue a restored trial again if it had a problem."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.TERMINATED and "problem" in last_result(trial):
            trial.set_status(Trial.PENDING)


def last_result(trial: Any) -> dict[str, Any]:
    """Return the last report of a trial; empty before its first report."""
    return trial.last_result or {}


def tune_folder(folder: RunFolder, num_before: int) -> RunFolder:
    """Folder of Ray Tune's files, inside the folder of a study.

    When Ray Tune resumes, it copies all JSON files of its folder to this machine, and later writes
    these copies back. Therefore its folder must not contain the study's lock and record. Tune can
    resume a grid but cannot add points to it, so points that are added later have another folder.

    Args:
        folder: the study's folder.
        num_before: number of trials that are in earlier folders of this study.
    """
    # Ray Tune names the local folder of its copies after this one, so two studies on one machine
    # need different names.
    return RunFolder(folder.location, f"{folder.name}-{num_before}")


def has_snapshot(folder: RunFolder) -> bool:
    """Whether Ray Tune has stored the state of a study in this folder of its own."""
    return _find_newest_experiment_checkpoint(folder.path, folder.filesystem) is not None


def run_trials(
    setup: TrialSetup,
    resources: dict[str, float],
    plan: Plan,
    folder: RunFolder,
    study: tune.Callback,
    max_failures: int,
) -> None:
    """Run the trials of a study, or the remaining ones of an interrupted study.

    Args:
        setup: recipe, data and weights of all trials.
        resources: CPUs and GPUs of a trial.
        plan: the trials and their order.
        folder: the folder of Ray Tune's files (`tune_folder`).
        study: the callback that Ray Tune calls whenever the state of a trial changes.
        max_failures: how often a trial is retried after its process failed.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C; the same call resumes.
        ResourcesError: the cluster had no resources for a trial.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(SNAPSHOT_SECONDS))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints whatever `verbose` says
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup, resources=resources),
        tune.PlacementGroupFactory([resources]),
    )
    resume = tune.ResumeConfig(errored=tune.ResumeConfig.ResumeType.RESUME)
    # `Tuner.restore` keeps the slots and paths of the first start in searcher and callbacks.
    with _interruptible():
        tune.run(
            trainable,
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            resume_config=resume if has_snapshot(folder) else None,
            metric=OBJECTIVE,
            mode="max",
            **plan,
            callbacks=[study, RoomCallback(resources)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            max_failures=max_failures,
            reuse_actors=True,
            trial_dirname_creator=attrgetter("trial_id"),
            raise_on_failed_trial=False,
            verbose=0,
        )


class RoomCallback(tune.Callback):
    """Logs every minute that no trial has resources, and ends a study that waits for too long."""

    def __init__(self, resources: dict[str, float]) -> None:
        self.watch = RoomWatch(placement_groups(), f"a trial with {format_resources(resources)}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for resources after each step of Ray Tune's loop."""
        self.watch.require_room()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block if Ctrl-C ended it, and restore the signal's handler.

    Ray Tune handles SIGINT, and then returns as if all trials had ended. At the first signal, Ray
    Tune restores the previous handler. Without a signal, its own handler remains.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
        interrupted = signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt
