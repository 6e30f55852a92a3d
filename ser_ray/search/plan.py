"""A search or a grid in Ray Tune's terms: search space, searcher and scheduler."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from ser_ray.search.actor import OBJECTIVE
from ser_ray.search.ray_internals import RetryFailed, last_result
from ser_ray.search.slots import Slots
from ser_ray.search.space import Dimension, TuneConfig, values_of
from ser_ray.training.config import TrainConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which trials a study has and in which order they run."""

    space: dict[str, Any]
    """Name -> value, Tune's domain or grid."""
    algorithm: Searcher | SearchAlgorithm
    num_samples: int
    scheduler: TrialScheduler | None = None


def search_plan(recipe: TrainConfig, config: TuneConfig, slots: Slots) -> Plan:
    """Tune's search space, searcher and scheduler for a search."""
    dimensions, first = config.dimensions, baseline(recipe, config)
    if config.searcher == "grid":
        own = values_of(recipe, dimensions)
        space = {
            item.name: tune.grid_search(_own_first(item.grid(), own[item.name]))
            for item in dimensions
        }
        num_samples = 1 + len(first)  # to Ray Tune, the complete grid is one sample
    else:
        space = {item.name: _domain(item) for item in dimensions}
        num_samples = config.trials
    searcher = _optuna if config.searcher == "optuna" else _variants
    return Plan(
        space=space,
        algorithm=searcher(recipe.seed, first, slots),
        num_samples=num_samples,
        scheduler=asha(recipe, config) if config.scheduler == "asha" else None,
    )


def grid_plan(points: Sequence[dict[str, Any]], slots: Slots) -> Plan:
    """Every point once, in this order; a point has a value for each name."""
    return Plan(
        space={name: tune.choice([point[name] for point in points]) for name in points[0]},
        algorithm=SlotVariants(points_to_evaluate=list(points), max_concurrent=slots.count),
        num_samples=len(points),
        scheduler=RetryFailed(),
    )


def num_trials(recipe: TrainConfig, config: TuneConfig) -> int:
    """Number of trials that a search has."""
    if config.searcher != "grid":
        return config.trials
    points = math.prod(len(item.grid()) for item in config.dimensions)
    return points + len(baseline(recipe, config))


def baseline(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """The recipe itself, as the first point of the space to try.

    Empty if the space excludes it, or if the grid contains it anyway.
    """
    values = values_of(recipe, config.dimensions)
    on_grid = all(values[item.name] in item.grid() for item in config.dimensions)
    if config.searcher == "grid" and on_grid:
        return []
    return [] if _excluded(recipe, config) else [values]


def warn_of_baseline(recipe: TrainConfig, config: TuneConfig) -> None:
    """Warn if no trial will train the recipe as given."""
    if excluded := _excluded(recipe, config):
        logger.warning(
            "no trial trains the recipe as given, because the space excludes its %s",
            ", ".join(excluded),
        )


def _excluded(recipe: TrainConfig, config: TuneConfig) -> list[str]:
    """Every name and value of the recipe that the space cannot draw."""
    values = values_of(recipe, config.dimensions)
    return [
        f"{item.name} {values[item.name]}"
        for item in config.dimensions
        if not item.holds(values[item.name])
    ]


def _own_first(grid: Sequence[Any], own: Any) -> list[Any]:
    """The values of a grid with the recipe's own first, so that the recipe is the first trial."""
    return sorted(grid, key=lambda value: bool(value != own))


def _domain(dimension: Dimension) -> Any:
    low, high = dimension.values[0], dimension.values[-1]
    match dimension.kind:
        case "loguniform":
            return tune.loguniform(low, high)
        case "uniform":
            return tune.uniform(low, high)
        case "integer":
            return tune.randint(low, high + 1)
        case _:
            return tune.choice(list(dimension.values))


def _optuna(seed: int, first: list[dict[str, Any]], slots: Slots) -> Searcher:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A resumed trial repeats the epochs since its checkpoint, which Optuna already knows.
    warnings.filterwarnings("ignore", message="The reported value is ignored because this `step=")
    searcher = OptunaSearch(points_to_evaluate=first, seed=seed)
    return SlotLimiter(searcher, max_concurrent=slots.count)


def _variants(seed: int, first: list[dict[str, Any]], slots: Slots) -> SearchAlgorithm:
    return SlotVariants(points_to_evaluate=first, max_concurrent=slots.count, random_state=seed)


class _CurrentSlots:
    """On restore, use the current concurrency limit."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore everything but the concurrency limit."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class SlotLimiter(_CurrentSlots, ConcurrencyLimiter):
    """Asks a searcher for no more trials at once than there are slots."""


class SlotVariants(_CurrentSlots, BasicVariantGenerator):
    """A grid or random draws, no more at once than there are slots."""


class ResumableAsha(ASHAScheduler):
    """ASHA (Li 2018) that continues after a restart.

    Ray Tune's snapshots do not contain the scheduler. On restore Ray Tune adds every trial again
    with its last result, which holds the objective of every epoch; this class replays them.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Replay the epochs of a restored trial; ASHA's decisions were carried out before."""
        super().on_trial_add(tune_controller, trial)
        past = last_result(trial).get("objective_by_epoch", [])
        for epoch, value in enumerate(past, start=1):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, OBJECTIVE: value})


def asha(recipe: TrainConfig, config: TuneConfig) -> ResumableAsha:
    """ASHA for a search; its `max_t` is the largest number of epochs that a trial may have."""
    drawn = [max(item.values) for item in config.dimensions if item.name == "epochs"]
    epochs = max([recipe.epochs, *drawn])
    return ResumableAsha(
        time_attr="epoch",
        max_t=epochs,
        grace_period=min(config.grace_epochs, epochs),
        reduction_factor=config.reduction,
    )
