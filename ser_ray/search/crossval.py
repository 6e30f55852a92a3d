"""Cross-validation: train, validate and test every fold of a protocol.

Every fold with every seed is a trial of a study (`ser_ray.search.tune_run`). The process of the
trial trains the fold, scores its test part with the selected checkpoint, and stores the predictions
as a table beside the checkpoint. All scores come from these tables
(`ser_ray.search.crossval_result`). The same command resumes an interrupted cross-validation and
trains failed folds again.

To choose between recipes, `--part validation` scores the validation parts and reads no test part.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa

from ser_ray.corpus.folds import ALL, DEPENDENCE, num_folds
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError, SerRayError
from ser_ray.evaluation.evaluation import REPORT, SCORES
from ser_ray.evaluation.pages import crossval_page
from ser_ray.evaluation.rendering import as_artifact, store_page
from ser_ray.evaluation.robustness import predict_conditions, score_under
from ser_ray.evaluation.to_mlflow import record_evaluation
from ser_ray.inference.predictor import Predictor
from ser_ray.plots.scores import confusion_figure
from ser_ray.search.actor import TrialSetup
from ser_ray.search.config import CrossvalConfig, SlotConfig
from ser_ray.search.crossval_result import CrossvalPlan, CrossvalResult, pool
from ser_ray.search.fold_files import fold_folder, score_and_store_fold
from ser_ray.search.open_study import open_study
from ser_ray.search.slots import require_one_worker
from ser_ray.search.study import Show, Study
from ser_ray.search.trial import TrialRecord, best_of
from ser_ray.search.tune_run import RetryFailed, points_plan
from ser_ray.shards.corpora import open_corpora
from ser_ray.storage.paths import absolute, short_digest
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.tracker import Tracker, model_id_of, now_ms
from ser_ray.training.checkpoint import copy_encoder, local_checkpoint, read_card
from ser_ray.training.metrics import selected_metrics
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig


def plan_crossval(
    shards_location: str | Sequence[str], recipe: TrainConfig, config: CrossvalConfig
) -> CrossvalPlan:
    """Plan the folds to train: `config.folds`, or all folds of the protocol.

    Raises:
        ShardsError: there is no shard set at the location.
        ConfigError: the recipe names a fold, a fold does not exist, or a fold has an empty part.
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
    # This refuses a fold with an empty part.
    dependent = [select_rows(table, replace(recipe, fold=f)).speaker_dependent for f in folds]
    which = f"{count} folds"
    if config.folds:
        which = f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))} of {count}"
    if config.part == "validation":
        which += ", VALIDATION parts"
    caption = f"{recipe.protocol}, {which}, {DEPENDENCE[any(dependent)]}"
    return CrossvalPlan(shards, recipe, config, folds, caption)


def crossval(
    plan: CrossvalPlan, run: RunConfig, slots: SlotConfig, *, show: Show, address: str = ""
) -> CrossvalResult:
    """Cross-validate a recipe over the plan's folds, or resume an interrupted cross-validation.

    Raises:
        ConfigError, CheckpointError, ResourcesError, TrackingError: before any trial starts.
        SerRayError: a fold failed; the message says which and why. The same call trains it again.
        KeyboardInterrupt: interrupted; the same call resumes.
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
    )
    with open_study(
        "cross-validation",
        plan.caption,
        folder,
        run,
        slots,
        setup,
        settings={"part": config.part},
        varied={"fold", "seed"},
        show=show,
        address=address,
    ) as study:
        while missing := missing_folds(plan, study.trials):
            num_before = len(study.trials)
            study.run_trials(points_plan(missing, study.slots, RetryFailed()))
            require_all_finished(study.trials)
            ended = [trial for trial in study.trials if trial.ended]
            if not num_before < len(study.trials) == len(ended):
                break
            study.store()
        study.settle(len(plan.points))
        result = pool(plan, study.trials, folder.location, folder.name, study.parent)
        if config.under:
            result = add_conditions(result, config.under)
        _record(result, study.parent, audio=run.audio)
        _log_best(study)
        study.parent.log_files({"config.json": recipe_to_ship(result).to_dict()})
        study.finish()
    return result


def crossval_name(plan: CrossvalPlan) -> str:
    """Name of a cross-validation. Seeds and folds do not change it, so more can be added later."""
    recipe, config = plan.recipe, plan.config
    identity = f"{recipe.fingerprint}{plan.shards.card.fingerprint_of(recipe.feature)}{config.part}"
    kind = "crossval" if config.part == "test" else "validation"
    return f"{kind}-{recipe.feature}-{recipe.protocol}-{short_digest(identity)}"


def missing_folds(plan: CrossvalPlan, trials: list[TrialRecord]) -> list[dict[str, int]]:
    """Folds and seeds of the plan that no trial has finished yet."""
    done = [trial.values for trial in trials if trial.ended]
    return [point for point in plan.points if point not in done]


def require_all_finished(trials: list[TrialRecord]) -> None:
    """Refuse to pool the folds if any of them failed.

    Raises:
        SerRayError: a fold failed; the message names the first one and the reason.
    """
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        first = failed[0]
        raise SerRayError(
            f"{len(failed)} of {len(trials)} folds failed; fold {first.recipe.fold}, seed "
            f"{first.recipe.seed}: {first.problem}; the same command trains the failed folds again"
        )


def add_conditions(result: CrossvalResult, groups: Sequence[str]) -> CrossvalResult:
    """Score every fold's clips with its own model under recording conditions, on the cluster."""
    predicted = []
    for trial, fold in zip(result.trials, result.folds, strict=True):
        with local_checkpoint(fold_folder(result.location, trial.recipe)) as checkpoint:
            predicted.append(predict_conditions(fold, Predictor(checkpoint), groups))
    of_all = {name: np.concatenate([of[name] for of in predicted]) for name in predicted[0]}
    return replace(result, pooled=replace(result.pooled, under=score_under(result.pooled, of_all)))


def recipe_to_ship(result: CrossvalResult) -> TrainConfig:
    """Make the recipe of a model of all speakers, with the geometric mean of the temperatures."""
    logs = [np.log(fold.card.temperature) for fold in result.folds]
    return replace(result.plan.recipe, temperature=float(np.exp(np.mean(logs))))


def _record(result: CrossvalResult, tracker: Tracker, *, audio: bool) -> None:
    """Write the page of the cross-validation, and record all scores in MLflow."""
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
    section = "selected" if part == "validation" else "test"  # as in trainings
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
    tracker.log_scores({f"{section}/{name}": value for name, value in scores.items()}, now_ms())
    line = "Validation" if part == "validation" else "Test"
    tracker.describe(**{line: f"UA {result.in_words('ua')} ({label})"})
    confusion = confusion_figure(pooled.scores.confusion, pooled.card.labels, f"{part}, {label}")
    tracker.log_files(
        {
            REPORT: as_artifact(page),
            f"plots/{part}_confusion.png": confusion,
            "tables/crossval.json": result.to_dict(),
            **{
                f"tables/{table}.csv": pa.Table.from_pylist(pooled.groups[group])
                for table, group in (("speakers", "speaker"), ("corpora", "corpus"))
                if group in pooled.groups
            },
            "tables/predictions.csv": pooled.predictions,
        }
    )
    for fold in result.folds if part == "test" else ():
        record_evaluation(fold, audio=audio)


def _log_best(study: Study) -> None:
    """Log the model of the fold with the best validation UA in the run of this fold."""
    best = best_of(study.trials)
    with local_checkpoint(fold_folder(study.folder.location, best.recipe)) as checkpoint:
        labels = read_card(checkpoint).labels
        if study.run.keep_encoder:
            copy_encoder(checkpoint)
        tracker = Tracker(study.parent.uri, best.run_id)
        if not model_id_of(tracker.read()):
            tracker.log_model(checkpoint, labels)
    tracker.log_scores(selected_metrics(best.selected), now_ms())
