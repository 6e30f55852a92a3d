"""Ray Tune around the trials of a study: what it draws, which trials it stops, and how it resumes.

Every trial runs in an actor, which the next trial reuses with its imports and CUDA context. Ray
Tune restores an interrupted study from its own snapshots: ended trials are kept, running ones
resume from their checkpoints, and those whose process failed too often are retried. Snapshots hold
the trials and the searcher; ASHA continues from the results of the trials.

Three things are not in Ray Tune's public interface: whether there is a snapshot (the public
`Tuner.can_restore` looks for a file that only `Tuner` writes), the last result of a trial, and how
to train a single ended trial again. `tests/search/test_tune_run.py` fails when an upgrade of Ray
changes them.
"""

import itertools
import os
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from ray import tune
from ray.tune.execution.experiment_state import _find_newest_experiment_checkpoint
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from ser_ray.cluster.resources import in_words
from ser_ray.distributed.room import RoomWatch, placement_groups
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search.actor import OBJECTIVE, TrialSetup, objectives, run_trial
from ser_ray.search.slots import Slots
from ser_ray.search.space import Dimension, TuneConfig, recipe_of, values_of
from ser_ray.training.config import TrainConfig

SNAPSHOT_SECONDS = 2
"""Time between two snapshots of a study; a driver that is killed loses at most this much."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which trials a study has and in which order they run."""

    algorithm: Searcher | SearchAlgorithm
    num_trials: int
    scheduler: TrialScheduler
    space: dict[str, Any] | None = None
    """Tune's domain of each name; None if the algorithm holds the space itself."""


def search_plan(recipe: TrainConfig, config: TuneConfig, slots: Slots) -> Plan:
    """Plan a search: its draws or its grid, and the scheduler that stops the worse trials."""
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
    limited = SlotLimiter(searcher, max_concurrent=slots.count)
    return Plan(algorithm=limited, num_trials=config.trials, scheduler=scheduler)


def points_plan(points: Sequence[dict[str, Any]], slots: Slots, scheduler: TrialScheduler) -> Plan:
    """Plan to train every point once, in this order; a point has a value for each name."""
    return Plan(
        algorithm=SlotVariants(points_to_evaluate=list(points), max_concurrent=slots.count),
        num_trials=len(points),
        scheduler=scheduler,
        space={name: tune.choice([point[name] for point in points]) for name in points[0]},
    )


def grid_points(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """All points of a grid, and before them the recipe itself if the space contains it."""
    names = [item.name for item in config.dimensions]
    grid = itertools.product(*(item.grid() for item in config.dimensions))
    points = [*baseline(recipe, config), *(dict(zip(names, point, strict=True)) for point in grid)]
    return [point for index, point in enumerate(points) if point not in points[:index]]


def num_trials(recipe: TrainConfig, config: TuneConfig) -> int:
    """Number of trials that a search has."""
    return len(grid_points(recipe, config)) if config.searcher == "grid" else config.trials


def excluded(recipe: TrainConfig, config: TuneConfig) -> list[str]:
    """Name and value of each field of the recipe that the space cannot draw."""
    values = values_of(recipe, config.dimensions)
    return [
        f"{item.name} {values[item.name]}"
        for item in config.dimensions
        if not item.holds(values[item.name])
    ]


def baseline(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """The recipe itself, as the first point to try; no point if the space excludes it."""
    return [] if excluded(recipe, config) else [values_of(recipe, config.dimensions)]


def optuna_distribution(dimension: Dimension) -> Any:
    """A dimension as Optuna knows it."""
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    low, high = dimension.values[0], dimension.values[-1]
    match dimension.kind:
        case "choice":
            return CategoricalDistribution(dimension.values)
        case "integer":
            return IntDistribution(low, high)
        case _:
            return FloatDistribution(low, high, log=dimension.kind == "loguniform")


class _CurrentSlots:
    """On restore, use the current concurrency limit."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore everything but the concurrency limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class SlotLimiter(_CurrentSlots, ConcurrencyLimiter):
    """Asks a searcher for no more trials at once than there are slots."""


class SlotVariants(_CurrentSlots, BasicVariantGenerator):
    """Tries a list of points, no more at once than there are slots."""


class ResumableAsha(ASHAScheduler):
    """ASHA (Li 2018) that continues after a restart.

    Ray Tune's snapshots do not contain the scheduler. On restore Ray Tune adds every trial again
    with its last result, which holds all its epochs; this class replays them.
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
        """Replay the epochs of a restored trial; ASHA's decisions were carried out before."""
        super().on_trial_add(tune_controller, trial)
        rows = last_result(trial).get("history", [])
        past = objectives(rows, recipe_of(self.recipe, trial.config))
        for epoch, value in enumerate(past, start=1):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, OBJECTIVE: value})


class RetryFailed(FIFOScheduler):
    """Trains trials in their order; a resumed study trains those that reported a problem again.

    For Ray Tune such a trial has ended like any other, and `ResumeConfig` resumes all ended trials
    or none.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Queue a restored trial again if it had a problem."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.TERMINATED and "problem" in last_result(trial):
            trial.set_status(Trial.PENDING)


def last_result(trial: Any) -> dict[str, Any]:
    """What a trial reported last; empty before its first report."""
    return trial.last_result or {}


def has_snapshot(folder: RunFolder) -> bool:
    """Whether Ray Tune has stored the state of a study in its folder."""
    return _find_newest_experiment_checkpoint(folder.path, folder.filesystem) is not None


def run_trials(
    setup: TrialSetup, plan: Plan, folder: RunFolder, study: tune.Callback, max_failures: int
) -> None:
    """Run the trials of a study, or the remaining ones of an interrupted study.

    Args:
        setup: what all trials share.
        plan: which trials the study has and in which order they run.
        folder: the study's folder.
        study: Ray Tune calls it for everything that happens to a trial.
        max_failures: how often a trial is retried after its process failed.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; the same call resumes.
        ResourcesError: there was no room for any trial.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(SNAPSHOT_SECONDS))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints whatever `verbose` says
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup),
        tune.PlacementGroupFactory([setup.slots.bundle()]),
    )
    resume = tune.ResumeConfig(errored=tune.ResumeConfig.ResumeType.RESUME)
    # `Tuner.restore` would keep the slots and paths of the first start in searcher and callbacks.
    with _interruptible():
        tune.run(
            trainable,
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            resume_config=resume if has_snapshot(folder) else None,
            metric=OBJECTIVE,
            mode="max",
            config=plan.space,
            num_samples=plan.num_trials,
            search_alg=plan.algorithm,
            scheduler=plan.scheduler,
            callbacks=[study, RoomCallback(setup.slots)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            max_failures=max_failures,
            reuse_actors=True,
            trial_dirname_creator=attrgetter("trial_id"),
            raise_on_failed_trial=False,
            verbose=0,
        )


class RoomCallback(tune.Callback):
    """Says every minute that no trial has room, and ends a search that has none for too long."""

    def __init__(self, slots: Slots) -> None:
        need = f"a trial with {in_words(slots.bundle())}"
        self.watch = RoomWatch(placement_groups(), need)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for room after each turn of Tune's loop."""
        self.watch.require_room()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block if Ctrl-C ended it, and restore the signal's handler.

    Tune handles SIGINT itself, and then returns as if all trials had ended. At the first signal it
    restores the handler that was there before; without a signal it leaves its own.
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
