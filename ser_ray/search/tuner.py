"""A search for the best recipe: draws, trials that are stopped early, and what came of them.

Every trial trains the same fold and is judged by its validation clips; the test part is never read.
The first trial is the recipe as it was given, where the space holds it. The same command goes on
with an interrupted search.
"""

import hashlib
import json
import logging
import math
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from ray import tune as ray_tune
from ray.tune.search import SearchAlgorithm, Searcher

from ser_ray.cluster import cluster, require_shared
from ser_ray.distributed.config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError
from ser_ray.search.outcome import importance_of, trial_rows
from ser_ray.search.space import Dimension, SlotConfig, TuneConfig, values_of
from ser_ray.search.study import Show, Study
from ser_ray.search.trial import Slots, TrialSetup
from ser_ray.search.trial_log import TrialLog, best_of
from ser_ray.search.trials import (
    Plan,
    ResumableAsha,
    SlotLimiter,
    SlotVariants,
    find_slots,
    fixed_workers,
    open_study,
    run_trials,
)
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage.atomic import write_file
from ser_ray.storage.paths import absolute, location_inside
from ser_ray.tracking.tracker import now_ms
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import select_rows
from ser_ray.training.metrics import selected_metrics
from ser_ray.training.model import Pretrained, read_pretrained
from ser_ray.training.trainer import require_workers_fit

BEST_RECIPE = "best.json"
"""Beside the trials: the best recipe and where it came from."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TuneResult:
    """A finished search."""

    name: str
    label: str
    """Protocol, fold and corpus, as shown beside every score."""
    best: TrialLog
    trials: list[TrialLog]
    run_id: str
    """The search's own run; its trials are nested in it."""
    tracking_uri: str
    location: str
    """Folder of the search."""
    again: str
    """Command that trains the best recipe."""

    @property
    def best_recipe(self) -> str:
        """Location of best.json."""
        return location_inside(self.location, BEST_RECIPE)


def search(
    shards_location: str,
    recipe: TrainConfig,
    run: RunConfig,
    config: TuneConfig,
    slots: SlotConfig,
    *,
    show: Show,
    address: str = "",
) -> TuneResult:
    """Search a space of recipes on a fold's validation clips, or go on with an interrupted search.

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: before any trial
            starts.
        SerRayError: no trial succeeded; says why the first failed.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    require_one_split(recipe, config)
    shards = open_shards(absolute(shards_location))
    parts = select_rows(shards.clips(), recipe)
    sizes = [min(item.values) for item in config.dimensions if item.name == "batch_size"]
    smallest = replace(recipe, batch_size=min(sizes or [recipe.batch_size]))
    require_workers_fit(smallest, len(parts.train), fixed_workers(run))
    pretrained = read_starts(recipe, config.dimensions, shards)
    name = run.name or search_name(recipe, config, shards)
    folder = RunFolder(run.storage, name)
    with cluster(address), folder.lock() as lock:
        require_shared(shards.uri, folder.location)
        found = find_slots(run, slots)
        setup = TrialSetup(
            recipe=recipe, shards=shards, slots=found, storage=absolute(folder.location)
        )
        identity = {"recipe": recipe.to_dict(), "search": _settings(config)}
        with open_study(setup, folder, run, parts.label, identity, show) as study:
            finished = folder.record().get("finished", False)
            if not finished:
                warn_of_baseline(recipe, config)
                plan = make_plan(recipe, config, found)
                run_trials(setup, pretrained, plan, folder, study.journal, run.max_failures)
            study.settle(0 if finished else num_trials(recipe, config))
            lock.check()
            best = best_of(study.logs)
            again = train_command(best.run_id, shards_location, run)
            title = f"validation, {parts.label}, {shards.card.corpus}"
            return _conclude(folder, study, best, config, title, again)


def require_one_split(recipe: TrainConfig, config: TuneConfig) -> None:
    """Refuse a search whose trials are validated on different clips.

    Raises:
        ConfigError: the seed is searched under the protocol whose split it draws.
    """
    if recipe.protocol == "random" and any(item.name == "seed" for item in config.dimensions):
        raise ConfigError(
            "space: seed cannot be searched with protocol random, whose split it draws: trials "
            "validated on different clips do not compare; leave it out, or search with another "
            "--protocol"
        )


def train_command(run_id: str, shards_location: str, run: RunConfig) -> str:
    """Command that trains the recipe of a run of MLflow, on the same shards and store."""
    words = ["ser-ray", "train", "--like", run_id, "--shards", shards_location]
    for name in ("tracking_uri", "experiment", "storage"):
        if (value := getattr(run, name)) != getattr(RunConfig(), name):
            words += [f"--{name.replace('_', '-')}", value]
    return shlex.join(words)


def search_name(recipe: TrainConfig, config: TuneConfig, shards: ShardSet) -> str:
    """Name of a search, equal for equal searches on equal shards."""
    settings = json.dumps(_settings(config), sort_keys=True)
    identity = settings + recipe.fingerprint + shards.card.fingerprint
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"tune-{recipe.protocol}-fold{recipe.fold}-{config.searcher}-{digest}"


def read_starts(
    recipe: TrainConfig, dimensions: tuple[Dimension, ...], shards: ShardSet
) -> dict[str, Pretrained]:
    """Read what a trial may start from: the recipe's weights, or all those that are drawn."""
    names = {recipe.weights}
    names.update(*(item.values for item in dimensions if item.name == "weights"))
    return {name: read_pretrained(name, len(shards.card.labels)) for name in sorted(names)}


def make_plan(recipe: TrainConfig, config: TuneConfig, slots: Slots) -> Plan:
    """Tune's searcher, space and scheduler for a search."""
    dimensions = config.dimensions
    first = baseline(recipe, config)
    scheduler = None
    if config.scheduler == "asha":
        epochs = max(
            [recipe.epochs, *(max(item.values) for item in dimensions if item.name == "epochs")]
        )
        scheduler = ResumableAsha(
            time_attr="epoch",
            max_t=epochs,
            grace_period=min(config.grace_epochs, epochs),
            reduction_factor=config.reduction,
        )
    space: dict[str, Any]
    algorithm: Searcher | SearchAlgorithm
    if config.searcher == "grid":
        space = {
            item.name: ray_tune.grid_search(_own_first(item.grid(), own))
            for item, own in zip(dimensions, values_of(recipe, dimensions).values(), strict=True)
        }
    else:
        space = {item.name: _domain(item) for item in dimensions}
    if config.searcher == "optuna":
        algorithm = _optuna(recipe.seed, first, slots)
    else:
        algorithm = SlotVariants(
            points_to_evaluate=first, max_concurrent=slots.count, random_state=recipe.seed
        )
    samples = 1 + len(first) if config.searcher == "grid" else config.trials
    return Plan(space=space, algorithm=algorithm, num_samples=samples, scheduler=scheduler)


def baseline(recipe: TrainConfig, config: TuneConfig) -> list[dict[str, Any]]:
    """The recipe itself as a point of the space to try before all others.

    None where the space leaves it out, or a grid has it among its own.
    """
    values = values_of(recipe, config.dimensions)
    on_grid = all(values[item.name] in item.grid() for item in config.dimensions)
    if config.searcher == "grid" and on_grid:
        return []
    return [] if _left_out(recipe, config) else [values]


def warn_of_baseline(recipe: TrainConfig, config: TuneConfig) -> None:
    """Say so where no trial will be the recipe as given."""
    if left_out := _left_out(recipe, config):
        logger.warning(
            "no trial is the recipe as given, for the space leaves it out by %s",
            ", ".join(left_out),
        )


def _left_out(recipe: TrainConfig, config: TuneConfig) -> list[str]:
    """Names, each with the recipe's own value, for which the space does not hold that value."""
    values = values_of(recipe, config.dimensions)
    return [
        f"{item.name} {values[item.name]}"
        for item in config.dimensions
        if not item.holds(values[item.name])
    ]


def _own_first(grid: Sequence[Any], own: Any) -> list[Any]:
    """The values of a grid, the recipe's own before the others: then it is the first trial."""
    return sorted(grid, key=lambda value: bool(value != own))


def num_trials(recipe: TrainConfig, config: TuneConfig) -> int:
    """Trials that a search has."""
    if config.searcher != "grid":
        return config.trials
    points = math.prod(len(item.grid()) for item in config.dimensions)
    return points + len(baseline(recipe, config))


def _settings(config: TuneConfig) -> dict[str, Any]:
    """What a search is; to refit its best afterwards does not change it."""
    return {name: value for name, value in asdict(config).items() if name != "refit"}


def _conclude(
    folder: RunFolder, study: Study, best: TrialLog, config: TuneConfig, title: str, again: str
) -> TuneResult:
    """Keep the best recipe beside the trials and complete the search's run."""
    tracker = study.parent
    content = {"run_id": best.run_id, "selected": best.selected, "recipe": best.recipe.to_dict()}
    encoded = json.dumps(content, indent=2).encode()
    write_file(folder.filesystem, f"{folder.path}/{BEST_RECIPE}", encoded)
    _log_outcome(study, best, config.dimensions, title, again)
    folder.update_record(finished=True)
    tracker.finish("FINISHED")
    return TuneResult(
        name=folder.name,
        label=title,
        best=best,
        trials=study.logs,
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        location=folder.location,
        again=again,
    )


def _domain(dimension: Dimension) -> Any:
    low, high = dimension.values[0], dimension.values[-1]
    match dimension.kind:
        case "loguniform":
            return ray_tune.loguniform(low, high)
        case "uniform":
            return ray_tune.uniform(low, high)
        case "integer":
            return ray_tune.randint(low, high + 1)
        case _:
            return ray_tune.choice(list(dimension.values))


def _optuna(seed: int, first: list[dict[str, Any]], slots: Slots) -> Searcher:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # An interrupted trial does its last epochs again, which Optuna has heard of.
    warnings.filterwarnings("ignore", message="The reported value is ignored because this `step=")
    searcher = OptunaSearch(points_to_evaluate=first, seed=seed)
    return SlotLimiter(searcher, max_concurrent=slots.count)


def _log_outcome(
    study: Study, best: TrialLog, dimensions: tuple[Dimension, ...], title: str, again: str
) -> None:
    from ser_ray.evaluation.pages import search_page  # slow: matplotlib
    from ser_ray.plots.search import bounds_figure, history_figure, importance_figure

    tracker, trials = study.parent, study.logs
    rows, importance = trial_rows(trials), importance_of(trials, dimensions)
    scores = selected_metrics(best.selected)
    states = [trial.state for trial in trials]
    counts = {f"trials_{state}": float(states.count(state)) for state in np.unique(states)}
    tracker.log_metrics(scores | counts, 0, now_ms())
    tracker.deliver()
    tracker.set_tags({"best.run_id": best.run_id, "best.trial": str(best.number)})
    files: dict[str, Any] = {
        "report.html": search_page(
            study.name,
            rows,
            best=best.number,
            selected=best.selected,
            recipe=best.recipe,
            searched={item.name: str(item) for item in dimensions},
            importance=importance,
            tags=study.tags,
            again=again,
        ),
        "config.json": best.recipe.to_dict(),
        "plots/history.png": history_figure(rows, title),
        "plots/learning_rate_bounds.png": bounds_figure(rows, title),
        "tables/trials.csv": pa.Table.from_pylist(rows),
    }
    if importance:
        files["plots/importance.png"] = importance_figure(importance, title)
        files["tables/importance.json"] = importance
    tracker.log_files(files)
