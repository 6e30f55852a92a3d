"""A search for the best recipe: plan the trials, run them, and record the best.

Every trial trains the same fold and is scored on its validation part. The test part is never read.
If the space contains the given recipe, the first trial trains this recipe. The same command resumes
an interrupted search.
"""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from ser_ray.corpus.folds import ALL
from ser_ray.distributed.mlflow_run import command_like
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.evaluation.rendering import as_artifact, store_page
from ser_ray.features.config import KINDS
from ser_ray.search.actor import TrialSetup
from ser_ray.search.config import SlotConfig, TuneConfig
from ser_ray.search.open_study import open_study
from ser_ray.search.optuna_study import importance_of, optuna_journal
from ser_ray.search.slots import require_one_worker
from ser_ray.search.study import Show, Study
from ser_ray.search.trial import StudyResult, TrialRecord, best_of, count_states, trial_rows
from ser_ray.search.tune_run import fields_outside_space, num_trials, run_trials, search_arguments
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import absolute, short_digest
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.run_metadata import scored_on
from ser_ray.tracking.tracker import now_ms
from ser_ray.training.metrics import selected_metrics
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig

OPTUNA_STUDY = "optuna.journal"
"""File in the folder of a search that holds its Optuna study. `optuna-dashboard FILE` shows it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneResult(StudyResult):
    """A finished search."""

    label: str
    """Protocol, fold and corpus, as shown beside every score."""
    best: TrialRecord
    train_command: str
    """Command that trains the best recipe."""

    def __repr__(self) -> str:
        best = self.best
        values = best.values | {"lr_min": best.recipe.lr_min}
        lines = [
            f"searched     {len(self.trials)} trials: {count_states(self.trials)}",
            f"best         trial {best.number}: UA {best.selected['val/ua']:.1%}, WA "
            f"{best.selected['val/wa']:.1%} in epoch {best.selected['epoch']:.0f} ({self.label})",
            *(
                f"             {name} {f'{value:.3g}' if isinstance(value, float) else value}"
                for name, value in values.items()
            ),
            f"report       {self.report}",
        ]
        return "\n".join(lines)


def search(
    shards_location: ShardLocations,
    recipe: TrainConfig,
    run: RunConfig,
    config: TuneConfig,
    slots: SlotConfig,
    *,
    show: Show,
    address: str = "",
) -> TuneResult:
    """Search a space of recipes on a fold's validation part, or resume an interrupted search.

    Raises:
        ShardsError, ConfigError, CheckpointError: the shards, a setting, the initial weights or the
            folder cannot be used.
        ResourcesError: the cluster cannot be used, or had no room for a trial.
        TrackingError: the tracking store cannot be used or does not answer.
        SerRayError: no trial succeeded. The message says why the first trial failed.
        KeyboardInterrupt: the user pressed Ctrl-C. The same call resumes.
    """
    require_one_worker(run)
    require_same_validation_clips(recipe, config)
    shards = open_corpora(shards_location, recipe.label_map)
    searched = {dimension.name: dimension.values for dimension in config.dimensions}
    features = set(searched["feature"])  # the default space has a feature
    encoders, others = sorted(features - {*KINDS}), sorted(features & {*KINDS})
    setup = TrialSetup(
        recipe=recipe,
        shards=shards,
        # The initial weights do not depend on the feature, but heads on encoders have none. Their
        # empty entries come first, and the entries of another feature replace them.
        pretrained={
            weights: read_initial_weights(
                replace(recipe, feature=feature, weights=weights), shards, run.tracking_uri
            )
            for feature in (*encoders, *others[:1])
            for weights in searched.get("weights", (recipe.weights,))
        },
    )
    with open_study(
        "search",
        select_rows(shards.clips(), recipe).label,
        RunFolder(absolute(run.storage), run.name or search_name(recipe, config, shards, features)),
        run,
        slots,
        setup,
        settings=config.settings,
        varied_fields={*searched, "lr_min"},  # each trial computes its lr_min from lr_ratio
        show=show,
        address=address,
    ) as study:
        if not study.has_ended:
            if outside := fields_outside_space(recipe, config):
                logger.warning(
                    "no trial trains the recipe as given, because the space excludes its %s",
                    ", ".join(outside),
                )
            run_trials(study, search_arguments(recipe, config, study.slots.max_concurrent))
        study.deliver_all(num_trials(recipe, config))
        best = best_of(study.trials)
        result = TuneResult(
            name=study.folder.name,
            label=f"validation, {scored_on(study.tags)}",
            best=best,
            trials=study.trials,
            run_id=study.parent.run_id,
            tracking_uri=study.parent.uri,
            location=study.folder.location,
            train_command=command_like(best.run_id, shards.locations, run, address),
        )
        _log_outcome(study, result, config)
        study.finish()
    return result


def require_same_validation_clips(recipe: TrainConfig, config: TuneConfig) -> None:
    """Check that all trials of a search are validated on the same clips.

    Raises:
        ConfigError: the seed is searched with the protocol random, or the protocol has no
            validation clips.
    """
    if recipe.protocol == ALL:
        raise ConfigError(
            f"protocol is {ALL}, which has no validation clips to compare trials on: choose another"
        )
    searched = {dimension.name for dimension in config.dimensions}
    if recipe.protocol == "random" and "seed" in searched:
        raise ConfigError(
            "space: seed cannot be searched with protocol random, because the seed draws the "
            "split, and trials validated on different clips cannot be compared; leave the seed "
            "out of --space, or choose another --protocol"
        )


def search_name(
    recipe: TrainConfig, config: TuneConfig, shards: ShardSet, features: Collection[str]
) -> str:
    """Return the name of a search. The same settings on the same shards give the same name."""
    data = sorted({shards.card.fingerprint_of(feature) for feature in {recipe.feature, *features}})
    identity = json.dumps(config.settings, sort_keys=True) + recipe.fingerprint + "".join(data)
    return f"tune-{recipe.protocol}-fold{recipe.fold}-{config.searcher}-{short_digest(identity)}"


def _log_outcome(study: Study, result: TuneResult, config: TuneConfig) -> None:
    """Write the page and the Optuna study of a search, and complete its MLflow run."""
    from ser_ray.evaluation.pages import search_page  # slow: matplotlib
    from ser_ray.plots.search import history_figure, importance_figure, parameter_figure

    tracker, folder, trials, best = study.parent, study.folder, result.trials, result.best
    rows, importance = trial_rows(trials), importance_of(trials, config.dimensions)
    counts = count_states(trials)
    tracker.log_params(best.recipe.to_dict())
    tracker.log_scores(selected_metrics(best.selected), now_ms())
    tracker.set_tags({"best.run_id": best.run_id})
    ua, wa = best.selected["val/ua"], best.selected["val/wa"]
    tracker.describe(
        Validation=f"UA {ua:.1%}, WA {wa:.1%} ({result.label}), the best of {len(trials)} trials "
        f"({counts}): trial {best.number}, run {best.run_id}. "
        f"To train it: `{result.train_command}`"
    )
    page = search_page(
        folder.name,
        rows,
        counts=counts,
        best=best.number,
        selected=best.selected,
        recipe=best.recipe,
        searched={dimension.name: str(dimension) for dimension in config.dimensions},
        importance=importance,
        tags=study.tags,
        train_command=result.train_command,
        pages={trial.number: trial.page for trial in trials},
        num_labels=len(study.trial_setup.shards.card.labels),
        run_id=tracker.run_id,
    )
    store_page(page, folder.report)
    journal = optuna_journal(folder.name, trials, config.dimensions)
    folder.write(OPTUNA_STUDY, journal)
    files: dict[str, Any] = {
        REPORT: as_artifact(page),
        OPTUNA_STUDY: journal,
        "config.json": best.recipe.to_dict(),
        "plots/history.png": history_figure(rows, result.label),
        "tables/trials.csv": pa.Table.from_pylist(rows),
    }
    for dimension in config.dimensions:
        figure = parameter_figure(rows, dimension.name, result.label)
        files[f"plots/by_{dimension.name}.png"] = figure
    if importance:
        files["plots/importance.png"] = importance_figure(importance, result.label)
    tracker.log_files(files)
