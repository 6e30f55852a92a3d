"""Cross-validation: train, validate and test every fold of a protocol.

Each pair of a fold and a seed is a trial of a study (`ser_ray.search.study`). The process of a
trial trains the fold, scores its test part with the selected checkpoint, and stores the predictions
in a table beside the checkpoint (`ser_ray.search.fold_files`). All test scores are computed from
these tables (`ser_ray.search.crossval_result`), except those under recording conditions, which need
the checkpoints. The same command resumes an interrupted cross-validation and trains failed folds
again.

To choose between recipes, `--part validation` scores the validation parts and reads no test part.
If the test parts are scored later, the same networks are used, and nothing is trained again.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import geometric_mean
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.corpus.folds import ALL, DEPENDENCE, num_folds
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError, SerRayError
from ser_ray.evaluation.evaluation import REPORT, SCORES, Part
from ser_ray.evaluation.pages import crossval_page
from ser_ray.evaluation.rendering import as_artifact, store_page
from ser_ray.evaluation.robustness import predict_conditions, score_under
from ser_ray.evaluation.to_mlflow import record_evaluation
from ser_ray.inference.predictor import Predictor
from ser_ray.plots.scores import confusion_figure
from ser_ray.search.actor import TrainedTrial, TrialSetup
from ser_ray.search.config import CrossvalConfig, SlotConfig
from ser_ray.search.crossval_result import CrossvalPlan, CrossvalResult, pool
from ser_ray.search.fold_files import fold_folder, has_checkpoint, score_and_store_fold
from ser_ray.search.open_study import open_study
from ser_ray.search.slots import require_one_worker
from ser_ray.search.study import Show, Study
from ser_ray.search.trial import TrialRecord, best_of, read_records
from ser_ray.search.tune_run import RetryFailed, points_arguments, run_trials
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.corpora import open_corpora
from ser_ray.storage.paths import absolute, short_digest
from ser_ray.tracking.registry import SELECTED_BY, read_initial_weights
from ser_ray.tracking.tracker import Tracker, model_id_of, now_ms
from ser_ray.training.checkpoint import copy_encoder, local_checkpoint, read_card
from ser_ray.training.metrics import selected_metrics
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig

logger = logging.getLogger(__name__)


def plan_crossval(
    shards_location: ShardLocations, recipe: TrainConfig, config: CrossvalConfig
) -> CrossvalPlan:
    """Plan to train `config.folds`, or all folds of the protocol.

    Raises:
        ShardsError: a location has no committed shard set.
        ConfigError: the recipe names a fold, the protocol has no test part or does not fit the
            shards, the shard sets cannot be read as one (`open_corpora`), or a fold does not exist
            or cannot be trained (`select_rows`).
    """
    if recipe.fold:
        raise ConfigError(
            f"fold is {recipe.fold}: crossval trains every fold, or the folds of --folds; leave "
            "--fold out"
        )
    if recipe.protocol == ALL:
        raise ConfigError(f"protocol is {ALL}, which has no folds to test on: choose another")
    shards = open_corpora(shards_location, recipe.label_map)
    table = shards.clips()
    count = num_folds(recipe.protocol, table)
    folds = config.folds or tuple(range(count))
    # `select_rows` raises ConfigError if a fold does not exist or cannot be trained.
    splits = [select_rows(table, replace(recipe, fold=fold)) for fold in folds]
    named_folds = f"{count} folds"
    if config.folds:
        numbers = ", ".join(map(str, folds))
        named_folds = f"{'fold' if len(folds) == 1 else 'folds'} {numbers} of {count}"
    if config.part == "validation":
        named_folds += ", VALIDATION parts"
    is_dependent = any(split.speaker_dependent for split in splits)
    caption = f"{recipe.protocol}, {named_folds}, {DEPENDENCE[is_dependent]}"
    return CrossvalPlan(shards, recipe, config, folds, caption)


def crossval(
    plan: CrossvalPlan, run: RunConfig, slots: SlotConfig, *, show: Show, address: str = ""
) -> CrossvalResult:
    """Cross-validate a recipe over the plan's folds, or resume an interrupted cross-validation.

    Raises:
        ConfigError, CheckpointError: a setting, the initial weights or the folder cannot be used.
        ResourcesError: the cluster cannot be used, or had no room for a trial.
        TrackingError: the tracking store cannot be used or does not answer.
        SerRayError: a fold failed, or Ray Tune stopped before all folds had ended. The message
            gives the reason. The same call trains the missing folds.
        KeyboardInterrupt: the user pressed Ctrl-C. The same call resumes.
    """
    require_one_worker(run)
    recipe, config = plan.recipe, plan.config
    folder = RunFolder(absolute(run.storage), run.name or crossval_name(plan))
    weights = read_initial_weights(recipe, plan.shards, run.tracking_uri, plan.folds)
    setup = TrialSetup(
        recipe=recipe,
        shards=plan.shards,
        pretrained={recipe.weights: weights},
        finish=partial(score_and_store_fold, folder=folder.location, part=config.part),
        trained=trained_for_other_part(plan, folder, run.storage),
    )
    with open_study(
        "cross-validation",
        plan.caption,
        folder,
        run,
        slots,
        setup,
        settings={"part": config.part},
        varied_fields={"fold", "seed"},
        # An earlier call may have trained folds or seeds that are not in this plan.
        show=lambda trials: show([trial for trial in trials if trial.values in plan.points]),
        address=address,
        has_actor_pool=bool(config.under),
    ) as study:
        # If an earlier call with fewer folds was interrupted, the first pass completes only these
        # folds.
        while points := remaining_points(plan, study.trials):
            num_before = len(study.trials)
            arguments = points_arguments(points, study.slots.max_concurrent, RetryFailed())
            run_trials(study, arguments)
            require_none_failed(study.trials)
            all_ended = all(trial.ended for trial in study.trials)
            if len(study.trials) == num_before or not all_ended:
                break  # Ray Tune stopped early: `deliver_all` raises SerRayError
            study.store_records()
        num_ended = sum(trial.ended for trial in study.trials)  # some may not be in this plan
        study.deliver_all(num_ended + len(remaining_points(plan, study.trials)))
        result = pool(plan, study.trials, folder.location, folder.name, study.parent)
        if config.under:
            result = score_conditions(result, config.under)
        _record(result, study.parent, audio=run.audio)
        _log_best_model(study)
        study.parent.log_files({"config.json": final_recipe(result).to_dict()})
        study.finish()
    return result


def crossval_name(plan: CrossvalPlan) -> str:
    """Return the name of a cross-validation.

    The name depends on neither the number of seeds nor the folds, so that a later call can add
    seeds and folds.
    """
    recipe, config = plan.recipe, plan.config
    identity = f"{recipe.fingerprint}{plan.shards.card.fingerprint_of(recipe.feature)}{config.part}"
    kind = "crossval" if config.part == "test" else "validation"
    return f"{kind}-{recipe.feature}-{recipe.protocol}-{short_digest(identity)}"


def trained_for_other_part(
    plan: CrossvalPlan, folder: RunFolder, storage: str
) -> list[TrainedTrial]:
    """Return the trainings that the cross-validation of the other part has, and this one has not.

    Args:
        plan: the planned trainings.
        folder: folder of this cross-validation.
        storage: folder of all runs, in which the other cross-validation has its default name.
    """
    part: Part = "validation" if plan.config.part == "test" else "test"
    name = crossval_name(replace(plan, config=replace(plan.config, part=part)))
    other = RunFolder(absolute(storage), name)
    own, others = (
        [trial for trial in read_records(study, plan.recipe) if trial.state == "finished"]
        for study in (folder, other)
    )
    points = remaining_points(plan, own)
    trained = [
        TrainedTrial(trial.recipe, trial.report, fold_folder(other.location, trial.recipe))
        for trial in others
        if trial.values in points and has_checkpoint(other.location, trial.recipe)
    ]
    if trained:
        count = f"{len(trained)} of {len(points)}"
        logger.info("%-12s %s, already trained for their %s parts", "taken over", count, part)
    return trained


def remaining_points(plan: CrossvalPlan, trials: list[TrialRecord]) -> list[dict[str, int]]:
    """Return each seed and fold of the plan that has no trial, or whose trial has not ended."""
    ended = [trial.values for trial in trials if trial.ended]
    return [point for point in plan.points if point not in ended]


def require_none_failed(trials: list[TrialRecord]) -> None:
    """Check that no fold failed.

    Raises:
        SerRayError: a fold failed. The message names the first failed fold and the reason.
    """
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        first = failed[0]
        raise SerRayError(
            f"{len(failed)} of {len(trials)} trainings failed. The first is fold "
            f"{first.recipe.fold}, seed {first.recipe.seed}: {first.problem}. The same command "
            "trains the failed folds again"
        )


def score_conditions(result: CrossvalResult, conditions: Sequence[str]) -> CrossvalResult:
    """Score the clips of each fold also under recording conditions, with the fold's own model.

    The clips are decoded on the connected cluster.
    """
    by_fold = []
    for trial, fold in zip(result.trials, result.folds, strict=True):
        with local_checkpoint(fold_folder(result.location, trial.recipe)) as checkpoint:
            by_fold.append(predict_conditions(fold, Predictor(checkpoint), conditions))
    probabilities = {name: np.concatenate([p[name] for p in by_fold]) for name in by_fold[0]}
    under = score_under(result.pooled, probabilities)
    return replace(result, pooled=replace(result.pooled, under=under))


def final_recipe(result: CrossvalResult) -> TrainConfig:
    """Return the recipe for a final model that is trained on all speakers.

    Such a model has no validation clips for its calibration. Therefore the recipe's temperature is
    the geometric mean of the folds' temperatures.
    """
    temperature = geometric_mean(fold.card.temperature for fold in result.folds)
    return replace(result.plan.recipe, temperature=temperature)


def _record(result: CrossvalResult, tracker: Tracker, *, audio: bool) -> None:
    """Write the page of the cross-validation, and record its scores and files in MLflow.

    The test scores of each fold are also recorded in the MLflow run of this fold.
    """
    pooled, part, label = result.pooled, result.pooled.part, result.plan.label
    page = crossval_page(
        pooled,
        name=result.name,
        summary=result.sentence,
        folds=result.trainings,
        pages=[trial.page for trial in result.trials],
        run_id=result.run_id,
        audio=audio,
    )
    store_page(page, result.report)
    # Single trainings use the same prefixes for the metrics of these parts.
    prefix = "selected" if part == "validation" else "test"
    metrics = {f"{prefix}/{name}": value for name, value in _scores_to_log(result).items()}
    # MLflow's table of all runs is sorted by this score.
    metrics.setdefault(SELECTED_BY, np.mean([row["validation UA"] for row in result.trainings]))
    tracker.log_scores(metrics, now_ms())
    tracker.describe(**{part.capitalize(): f"UA {result.describe('ua')} ({label})"})
    files: dict[str, Any] = {
        REPORT: as_artifact(page),
        f"plots/{part}_confusion.png": confusion_figure(
            pooled.scores.confusion, pooled.card.labels, f"{part}, {label}"
        ),
        "tables/crossval.json": result.to_dict(),
        "tables/predictions.csv": pooled.predictions,
    }
    for table, column in (("speakers", "speaker"), ("corpora", "corpus")):
        if column in pooled.groups:
            files[f"tables/{table}.csv"] = pa.Table.from_pylist(pooled.groups[column])
    tracker.log_files(files)
    if part == "test":
        for fold in result.folds:
            record_evaluation(fold, audio=audio)


def _scores_to_log(result: CrossvalResult) -> dict[str, float]:
    """Return the pooled scores by the names of their MLflow metrics, without the prefix."""
    pooled = result.pooled
    scores = pooled.group_metrics
    for name in SCORES:
        low, high = getattr(pooled.intervals, name)
        scores |= {
            name: pooled.mean(name),
            f"{name}_spread": result.spread(name),
            f"{name}_low": low,
            f"{name}_high": high,
        }
        if result.ensemble is not None:
            scores[f"{name}_ensemble"] = result.ensemble.to_dict()[name]
    return scores


def _log_best_model(study: Study) -> None:
    """Log the model of the fold with the best validation UA to the MLflow run of this fold."""
    best = best_of(study.trials)
    with local_checkpoint(fold_folder(study.folder.location, best.recipe)) as checkpoint:
        labels = read_card(checkpoint).labels
        if study.run.keep_encoder:
            copy_encoder(checkpoint)
        tracker = Tracker(study.parent.uri, best.run_id)
        if not model_id_of(tracker.read()):
            tracker.log_model(checkpoint, labels)
    tracker.log_scores(selected_metrics(best.selected), now_ms())
