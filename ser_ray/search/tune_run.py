"""Runs the trials of a study with Ray Tune: searchers, schedulers, retries and resuming.

Every trial runs in an actor. The next trial reuses the actor with its imports and CUDA context. Ray
Tune restores an interrupted study from its snapshots: ended trials stay ended, running trials
resume from their checkpoints, and trials whose process failed too often are retried. With
`RetryFailed`, trials that reported a problem are trained again too. A snapshot holds the trials,
the searcher, and the numbers of the trials (`Study.get_state`). ASHA is restored from the results
of the trials.

This module uses functions of Ray Tune that are not public, to find out whether there is a snapshot,
to read the last result of a trial, and to train one ended trial again. (The public
`Tuner.can_restore` looks for a file that only `Tuner` writes.) `tests/search/test_tune_run.py`
fails if an upgrade of Ray changes these functions.
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
from ser_ray.distributed.placement import PlacementWatch, placement_groups
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search.actor import OBJECTIVE, objectives, run_trial
from ser_ray.search.config import TuneConfig
from ser_ray.search.space import Dimension, hyperparameters_of, recipe_with
from ser_ray.search.study import Study
from ser_ray.training.recipe import TrainConfig

SNAPSHOT_SECONDS = 2
"""Time between two snapshots of a study. A killed driver loses at most the results of this time."""

TuneArguments = dict[str, Any]
"""Arguments of `tune.run` that say which trials a study has and which ones are stopped early."""


def search_arguments(recipe: TrainConfig, config: TuneConfig, max_concurrent: int) -> TuneArguments:
    """Return the arguments for a search: its searcher or grid, and its scheduler."""
    scheduler = ResumableAsha(recipe, config) if config.scheduler == "asha" else FIFOScheduler()
    if config.searcher == "grid":
        return points_arguments(grid_points(recipe, config), max_concurrent, scheduler)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A resumed trial repeats the epochs after its checkpoint. Optuna already knows their scores.
    warnings.filterwarnings("ignore", message="The reported value is ignored because this `step=")
    samplers = {"optuna": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    searcher = OptunaSearch(
        {dimension.name: optuna_distribution(dimension) for dimension in config.dimensions},
        metric=OBJECTIVE,
        mode="max",
        points_to_evaluate=baseline_points(recipe, config),
        sampler=samplers[config.searcher](seed=recipe.seed),
    )
    limited = LimitedSearcher(searcher, max_concurrent=max_concurrent)
    return {"search_alg": limited, "num_samples": config.trials, "scheduler": scheduler}


def points_arguments(
    points: Sequence[dict[str, Any]], max_concurrent: int, scheduler: TrialScheduler
) -> TuneArguments:
    """Return the arguments to train every point once, in this order.

    Args:
        points: the values of each trial, by name.
        max_concurrent: largest number of trials that run at the same time.
        scheduler: decides which trials are stopped early or trained again.
    """
    return {
        "search_alg": LimitedPoints(points_to_evaluate=list(points), max_concurrent=max_concurrent),
        "num_samples": len(points),
        "scheduler": scheduler,
        "config": {name: tune.choice([point[name] for point in points]) for name in points[0]},
    }


def grid_points(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """Return all points of a grid. If the space contains the recipe, the recipe comes first."""
    names = [dimension.name for dimension in config.dimensions]
    grid = itertools.product(*(dimension.grid_values() for dimension in config.dimensions))
    points = baseline_points(recipe, config)
    points += [dict(zip(names, values, strict=True)) for values in grid]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def num_trials(recipe: TrainConfig, config: TuneConfig) -> int:
    """Return the number of trials of a search."""
    return len(grid_points(recipe, config)) if config.searcher == "grid" else config.trials


def fields_outside_space(recipe: TrainConfig, config: TuneConfig) -> list[str]:
    """Return name and value of each searched field whose value in the recipe cannot be drawn."""
    values = hyperparameters_of(recipe, config.dimensions)
    return [
        f"{dimension.name} {values[dimension.name]}"
        for dimension in config.dimensions
        if not dimension.contains(values[dimension.name])
    ]


def baseline_points(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """Return the recipe as the first point to try; empty if the space does not contain it."""
    is_outside = fields_outside_space(recipe, config)
    return [] if is_outside else [hyperparameters_of(recipe, config.dimensions)]


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


class _KeepsLimit:
    """Keeps the current limit of concurrent trials when a snapshot is restored."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore a snapshot, except for its limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class LimitedSearcher(_KeepsLimit, ConcurrencyLimiter):
    """Limits the number of concurrent trials of a searcher."""


class LimitedPoints(_KeepsLimit, BasicVariantGenerator):
    """Tries the points of a list, with a limited number of concurrent trials."""


class ResumableAsha(ASHAScheduler):
    """ASHA (Li 2018) that continues after a restart.

    Ray Tune's snapshots do not contain the scheduler. On restore, Ray Tune adds every trial again
    with its last result, which holds all epochs of the trial. This class replays these epochs.
    """

    def __init__(self, recipe: TrainConfig, config: TuneConfig) -> None:
        self.recipe = recipe
        searched = [max(item.values) for item in config.dimensions if item.name == "epochs"]
        max_epochs = max([recipe.epochs, *searched])
        super().__init__(
            time_attr="epoch",
            max_t=max_epochs,
            grace_period=min(config.grace_epochs, max_epochs),
            reduction_factor=config.reduction,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Replay the epochs of a restored trial.

        The decisions are ignored, because Ray Tune has already carried them out.
        """
        super().on_trial_add(tune_controller, trial)
        rows = trial.last_result.get("history", [])
        past_values = objectives(rows, recipe_with(self.recipe, trial.config))
        for epoch, value in enumerate(past_values, start=1):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, OBJECTIVE: value})


class RetryFailed(FIFOScheduler):
    """Trains trials in their order. If a study resumes, trials that reported a problem train again.

    For Ray Tune, a trial that reported a problem has ended like any other, and `ResumeConfig`
    resumes either all ended trials or none.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Queue a restored trial again if it had a problem."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.TERMINATED and "problem" in trial.last_result:
            trial.set_status(Trial.PENDING)


def tune_folder(folder: RunFolder, num_before: int) -> RunFolder:
    """Return the folder of Ray Tune's files, which is inside the folder of a study.

    When Ray Tune resumes, it copies all JSON files of its folder to this machine, and later writes
    these copies back. Therefore its folder must not contain the study's lock and run record. Ray
    Tune cannot add points to a list that it resumes, so points that are added later get another
    folder.

    Args:
        folder: the study's folder.
        num_before: number of trials that are in earlier folders of this study.
    """
    # The folder of the local copies has the same name, so the name must differ between studies.
    return RunFolder(folder.location, f"{folder.name}-{num_before}")


def has_snapshot(folder: RunFolder) -> bool:
    """Return whether Ray Tune has stored a snapshot in this folder (`tune_folder`)."""
    return _find_newest_experiment_checkpoint(folder.path, folder.filesystem) is not None


def run_trials(study: Study, arguments: TuneArguments) -> None:
    """Run further trials of a study. If an earlier driver was interrupted, resume its trials.

    Raises:
        KeyboardInterrupt: the user pressed Ctrl-C. The same call resumes.
        ResourcesError: the cluster had no resources for a trial.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(SNAPSHOT_SECONDS))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new output ignores `verbose`
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "0"  # `_interruptible` relies on this handler
    resources, folder = study.slots.resources, tune_folder(study.folder, len(study.records))
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=study.trial_setup, resources=resources),
        tune.PlacementGroupFactory([resources]),
    )
    resume = tune.ResumeConfig(errored=tune.ResumeConfig.ResumeType.RESUME)
    # `Tuner.restore` would restore the searcher and callbacks with the limit and paths of the
    # first start.
    with _interruptible():
        tune.run(
            trainable,
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            resume_config=resume if has_snapshot(folder) else None,
            metric=OBJECTIVE,
            mode="max",
            **arguments,
            callbacks=[study, RoomCallback(resources)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            max_failures=study.run.max_failures,
            reuse_actors=True,
            trial_dirname_creator=attrgetter("trial_id"),
            raise_on_failed_trial=False,
            verbose=0,
        )


class RoomCallback(tune.Callback):
    """Warns every minute while no trial has resources, and ends a study that waits too long."""

    def __init__(self, resources: dict[str, float]) -> None:
        self.watch = PlacementWatch(
            placement_groups(), f"a trial with {format_resources(resources)}"
        )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for resources after each step of Ray Tune's loop."""
        self.watch.check()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block if Ctrl-C ended it, and restore the signal's handler.

    After Ctrl-C, Ray Tune returns as if all trials had ended. At the first signal, Ray Tune's
    handler of SIGINT puts the previous handler back. Without a signal, Ray Tune's handler stays in
    place. Therefore the handler after the block shows whether Ctrl-C was pressed.
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
