"""Every fold of a protocol, trained, validated and tested once.

Folds and seeds are the trials of a study (`ser_ray.search.trials`): each trains, keeps the selected
epoch's checkpoint, scores its own test part with it in the same process, and leaves those
predictions as a table beside the checkpoint. All figures here come from these tables. The same
command goes on with an interrupted cross-validation, and trains folds that failed again.

To choose between recipes it scores the validation parts instead: no test part is read then.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.cluster import cluster, require_shared
from ser_ray.corpus.splits import dependence_of, num_folds
from ser_ray.distributed.config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError, SerRayError
from ser_ray.evaluation.evaluate import evaluate
from ser_ray.evaluation.pages import run_page
from ser_ray.evaluation.record import record_evaluation
from ser_ray.evaluation.results import Evaluation, Part, group_rows
from ser_ray.evaluation.statistics import Intervals, bootstrap
from ser_ray.plots.scores import confusion_figure
from ser_ray.search.space import CrossvalConfig, SlotConfig
from ser_ray.search.study import Show, Study
from ser_ray.search.trial import TrialSetup
from ser_ray.search.trial_log import TrialLog, best_of
from ser_ray.search.trials import find_slots, fixed_workers, grid_plan, open_study, run_trials
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.paths import absolute, filesystem_of, location_inside
from ser_ray.tracking.registry import local_checkpoint
from ser_ray.tracking.tracker import Tracker, now_ms
from ser_ray.training.checkpoint import CARD, MODEL, read_card
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import label_indices, select_rows
from ser_ray.training.metrics import Scores, scores_of
from ser_ray.training.model import read_pretrained
from ser_ray.training.trainer import require_workers_fit

PREDICTIONS = "predictions.parquet"
FIGURES = {"wa": "WA", "ua": "UA", "f1": "macro F1"}


@dataclass(frozen=True, slots=True)
class CrossvalPlan:
    """Which folds of which clips are trained; no side of any is empty."""

    shards: ShardSet
    recipe: TrainConfig
    config: CrossvalConfig
    folds: tuple[int, ...]
    fewest_clips: int
    """Training clips of the fold that has the fewest."""
    caption: str
    """Protocol, folds and whether it is speaker-dependent."""

    @property
    def seeds(self) -> list[int]:
        """The seed of every training of a fold."""
        return [self.recipe.seed + index for index in range(self.config.seeds)]

    @property
    def num_trials(self) -> int:
        """Trainings there will be."""
        return len(self.folds) * self.config.seeds

    @property
    def label(self) -> str:
        """Caption and corpus, as shown beside every score."""
        return f"{self.caption}, {self.shards.card.corpus}"


@dataclass(frozen=True, slots=True)
class CrossvalResult:
    """The pooled parts, test or validation, of all folds."""

    name: str
    plan: CrossvalPlan
    by_seed: dict[int, Scores]
    """Scores of all folds' clips together, for every seed; each test clip is there once."""
    ensemble: Scores | None
    """Scores of the mean of all seeds' probabilities; None for one seed, or where the seeds scored
    different clips."""
    intervals: Intervals
    """95 % intervals by drawing speakers again, over all seeds together."""
    predictions: pa.Table
    """A row for each clip and seed: fold, seed, speaker, emotion, predicted, p_<label>."""
    run_id: str
    tracking_uri: str
    location: str
    """Folder of the cross-validation."""

    @property
    def label(self) -> str:
        """Protocol and corpus, as shown beside every score."""
        return self.plan.label

    @property
    def part(self) -> Part:
        """What was scored."""
        return self.plan.config.part

    @property
    def labels(self) -> tuple[str, ...]:
        """Emotions, in the order of the probabilities."""
        return self.plan.shards.card.labels

    @property
    def table(self) -> str:
        """Location of predictions.parquet."""
        return location_inside(self.location, PREDICTIONS)

    def mean(self, figure: str) -> float:
        """Mean of wa, ua or f1 over the seeds."""
        return float(np.mean([scores.to_dict()[figure] for scores in self.by_seed.values()]))

    def spread(self, figure: str) -> float:
        """Standard deviation of wa, ua or f1 over the seeds (n - 1); 0 for one seed."""
        values = [scores.to_dict()[figure] for scores in self.by_seed.values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    @property
    def confusion(self) -> np.ndarray:
        """Counts summed over folds and seeds [labels, labels]."""
        return np.sum([scores.confusion for scores in self.by_seed.values()], axis=0)

    @property
    def speakers(self) -> list[dict[str, Any]]:
        """Clips, WA and UA of every speaker over all seeds."""
        return group_rows(
            "speaker",
            self.predictions["speaker"].to_pylist(),
            *_truth(self.predictions, self.labels),
        )

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "protocol": self.label,
            "part": self.part,
            "clips": self.predictions.num_rows // len(self.by_seed),
            "seeds": list(self.by_seed),
            "mean": {name: self.mean(name) for name in FIGURES},
            "spread": {name: self.spread(name) for name in FIGURES},
            "interval": {name: getattr(self.intervals, name) for name in FIGURES},
            "by_seed": {str(seed): scores.to_dict() for seed, scores in self.by_seed.items()},
            "ensemble": None if self.ensemble is None else self.ensemble.to_dict(),
            "by_speaker": self.speakers,
            "confusion": self.confusion.tolist(),
        }

    def text(self) -> str:
        """The figures, each with what it is a figure of."""
        lines = []
        for name, title in FIGURES.items():
            low, high = getattr(self.intervals, name)
            spread = f" ± {self.spread(name):.1%} over seeds" if len(self.by_seed) > 1 else ""
            lines.append(
                f"{title:8}  {self.mean(name):.1%}{spread}, 95 % interval over "
                f"{self.intervals.drawn} {low:.1%} to {high:.1%}  ({self.label})"
            )
        if self.ensemble is not None:
            scores = self.ensemble.to_dict()
            shown = ", ".join(f"{title} {scores[name]:.1%}" for name, title in FIGURES.items())
            lines.append(
                f"{'ensemble':8}  {shown}: mean probability of {len(self.by_seed)} networks, not "
                f"one of them  ({self.label})"
            )
        return "\n".join(lines)


def plan_crossval(
    shards_location: str, recipe: TrainConfig, config: CrossvalConfig
) -> CrossvalPlan:
    """Find the folds to train: the selected ones, or every one of the protocol.

    Raises:
        ShardsError: no shard set is there.
        ConfigError: the recipe names a fold, there is no such fold, or one has an empty side.
    """
    if recipe.fold:
        raise ConfigError(f"fold is {recipe.fold}: crossval trains every fold, or those of --folds")
    shards = open_shards(absolute(shards_location))
    table = shards.clips()
    count = num_folds(recipe.protocol, table["speaker"].to_pylist())
    folds = config.folds or tuple(range(count))
    parts = [select_rows(table, replace(recipe, fold=fold)) for fold in folds]
    fewest_clips = min(len(part.train) for part in parts)
    which = f"{count} folds"
    if config.folds:
        which = f"fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))} of {count}"
    if config.part == "validation":
        which += ", VALIDATION parts"
    caption = f"{recipe.protocol}, {which}, {dependence_of(recipe.protocol)}"
    return CrossvalPlan(shards, recipe, config, folds, fewest_clips, caption)


def crossval(
    plan: CrossvalPlan, run: RunConfig, slots: SlotConfig, *, show: Show, address: str = ""
) -> CrossvalResult:
    """Cross-validate a recipe over the plan's folds, or go on with it.

    Raises:
        ConfigError, CheckpointError, ResourcesError, TrackingError: before any trial starts.
        SerRayError: a fold failed; says which and why, and the same call trains it again.
        KeyboardInterrupt: interrupted; the same call goes on.
    """
    shards, recipe, config = plan.shards, plan.recipe, plan.config
    require_workers_fit(recipe, plan.fewest_clips, fixed_workers(run))
    pretrained = {recipe.weights: read_pretrained(recipe.weights, len(shards.card.labels))}
    folder = RunFolder(run.storage, run.name or crossval_name(plan))
    location = absolute(folder.location)
    with cluster(address), folder.lock() as lock:
        require_shared(shards.uri, location)
        found = find_slots(run, slots)
        setup = TrialSetup(
            recipe=recipe,
            shards=shards,
            slots=found,
            storage=location,
            finish=partial(keep_fold, folder=location, part=config.part),
        )
        identity = {"recipe": recipe.to_dict(), "crossval": asdict(config)}
        with open_study(setup, folder, run, plan.caption, identity, show) as study:
            finished = folder.record().get("finished", False)
            if not finished:
                grid = grid_plan({"seed": plan.seeds, "fold": list(plan.folds)}, found)
                run_trials(setup, pretrained, grid, folder, study.journal, run.max_failures)
            study.settle(0 if finished else plan.num_trials)
            lock.check()
            _require_all_finished(study.logs)
            result = pool(plan, location, folder.name, study.parent)
            page = crossval_page(result, audio=run.audio)
            _log_outcome(study.parent, result, page)
            if config.part == "test":
                _record_tests(study, location, audio=run.audio)
            _log_best(study, location)
            folder.update_record(finished=True)
            study.parent.finish("FINISHED")
    return result


def crossval_name(plan: CrossvalPlan) -> str:
    """Name of a cross-validation, equal for equal ones on equal shards."""
    recipe, config = plan.recipe, plan.config
    identity = f"{recipe.fingerprint}{plan.shards.card.fingerprint}{asdict(config)}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    kind = "crossval" if config.part == "test" else "validation"
    return f"{kind}-{recipe.feature}-{recipe.protocol}-{config.seeds}seeds-{digest}"


def keep_fold(
    checkpoint: Path, shards: ShardSet, recipe: TrainConfig, *, folder: str, part: Part
) -> None:
    """Score a part of a fold with its selected checkpoint; keep the predictions and the model."""
    table = evaluate(checkpoint, shards.uri, part=part).predictions
    for name, value in (("seed", recipe.seed), ("fold", recipe.fold)):
        column = pa.array(np.full(table.num_rows, value, np.int32))
        table = table.add_column(0, name, column)
    filesystem, path = filesystem_of(fold_folder(folder, recipe.fold, recipe.seed))
    filesystem.create_dir(path, recursive=True)
    for name in (CARD, MODEL):
        fs.copy_files(
            str(checkpoint / name), f"{path}/{name}", destination_filesystem=filesystem,
            use_threads=False,
        )  # fmt: skip
    with atomic_write(filesystem, f"{path}/{PREDICTIONS}") as target:
        pq.write_table(table, target, filesystem=filesystem)


def pool(plan: CrossvalPlan, location: str, name: str, tracker: Tracker) -> CrossvalResult:
    """Put the predictions of all folds together, keep them as one table, and score them.

    Args:
        plan: what was trained.
        location: folder of the cross-validation.
        name: of the cross-validation.
        tracker: of its MLflow run.
    """
    tables = []
    for seed, fold in itertools.product(plan.seeds, plan.folds):
        tables.append(_predictions_of(fold_folder(location, fold, seed)))
    predictions = pa.concat_tables(tables)
    filesystem, path = filesystem_of(location_inside(location, PREDICTIONS))
    pq.write_table(predictions, path, filesystem=filesystem)
    labels = plan.shards.card.labels
    truth, predicted = _truth(predictions, labels)
    probabilities = np.stack([predictions[f"p_{label}"].to_numpy() for label in labels], axis=1)
    seeds = predictions["seed"].to_numpy()
    places = zip(predictions["fold"].to_pylist(), predictions["path"].to_pylist(), strict=True)
    return CrossvalResult(
        name=name,
        plan=plan,
        by_seed={
            seed: scores_of(truth[seeds == seed], probabilities[seeds == seed])
            for seed in plan.seeds
        },
        ensemble=_ensemble([f"{f} {path}" for f, path in places], seeds, truth, probabilities),
        intervals=bootstrap(predictions["speaker"].to_pylist(), truth, predicted, len(labels)),
        predictions=predictions,
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        location=location,
    )


def _ensemble(
    clips: Sequence[str], seeds: np.ndarray, truth: np.ndarray, probabilities: np.ndarray
) -> Scores | None:
    """Scores of the mean probabilities over the seeds, if there are several of the same clips.

    Args:
        clips: name of the clip in every row [rows].
        seeds: [rows].
        truth: label indices [rows].
        probabilities: [rows, labels].
    """
    named = np.asarray(clips)
    order = np.lexsort((named, seeds))
    by_seed = np.split(order, np.flatnonzero(np.diff(seeds[order])) + 1)
    scored = [named[rows] for rows in by_seed]
    if len(scored) == 1 or not all(np.array_equal(other, scored[0]) for other in scored):
        return None
    mean = np.mean([probabilities[rows] for rows in by_seed], axis=0)
    return scores_of(truth[by_seed[0]], mean)


def fold_folder(location: str, fold: int, seed: int) -> str:
    """Where a fold's checkpoint and predictions are kept."""
    return location_inside(location, f"models/fold{fold}-seed{seed}")


def _predictions_of(folder: str) -> pa.Table:
    filesystem, path = filesystem_of(location_inside(folder, PREDICTIONS))
    return pq.read_table(path, filesystem=filesystem)


def _truth(predictions: pa.Table, labels: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Label indices [clips] of what was said and of what was predicted."""
    named = predictions.select(["predicted"]).rename_columns(["emotion"])
    return label_indices(predictions, labels), label_indices(named, labels)


def _require_all_finished(trials: list[TrialLog]) -> None:
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        first = failed[0]
        raise SerRayError(
            f"{len(failed)} of {len(trials)} folds failed; fold {first.recipe.fold}, seed "
            f"{first.recipe.seed}: {first.problem}; the same command trains those that failed again"
        )


def crossval_page(result: CrossvalResult, *, audio: bool) -> str:
    """The page of all folds' parts together, as `evaluate` writes that of one."""
    first = fold_folder(result.location, result.plan.folds[0], result.plan.seeds[0])
    with local_checkpoint(first) as checkpoint:
        card = read_card(checkpoint)
    pooled = Evaluation(
        card=replace(card, config=result.plan.recipe),
        part=result.part,
        protocol=result.plan.caption,
        corpus=card.corpus,
        is_own_test=result.part == "test",
        seen_speakers=(),
        predictions=result.predictions,
    )
    return run_page(pooled, name=result.name, audio=audio)


def _log_outcome(tracker: Tracker, result: CrossvalResult, page: str) -> None:
    prefix = "val" if result.part == "validation" else "test"  # as trainings name their metrics
    scores = {f"{prefix}_{name}": result.mean(name) for name in FIGURES}
    scores |= {f"{prefix}_{name}_spread": result.spread(name) for name in FIGURES}
    for name in FIGURES:
        low, high = getattr(result.intervals, name)
        scores |= {f"{prefix}_{name}_low": low, f"{prefix}_{name}_high": high}
    if result.ensemble is not None:
        ensemble = result.ensemble.to_dict()
        scores |= {f"{prefix}_{name}_ensemble": ensemble[name] for name in FIGURES}
    tracker.log_metrics(scores, 0, now_ms())
    tracker.deliver()
    tracker.log_files(
        {
            "report.html": page,
            f"plots/{result.part}_confusion.png": confusion_figure(
                result.confusion, result.labels, f"{result.part}, {result.label}"
            ),
            "tables/crossval.json": result.to_dict(),
            "tables/speakers.csv": pa.Table.from_pylist(result.speakers),
            "tables/predictions.csv": result.predictions,
        }
    )


def _record_tests(study: Study, location: str, *, audio: bool) -> None:
    """Record every fold's test part in its own run."""
    for trial in study.logs:
        if trial.state != "finished":
            continue  # lost, and done again by another
        folder = fold_folder(location, trial.recipe.fold, trial.recipe.seed)
        with local_checkpoint(folder) as checkpoint:
            card = read_card(checkpoint)
        evaluation = Evaluation(
            card=card,
            part="test",
            protocol=card.split["label"],
            corpus=card.corpus,
            is_own_test=True,
            seen_speakers=(),
            predictions=_predictions_of(folder),
        )
        record_evaluation(evaluation, Tracker(study.parent.uri, trial.run_id), audio=audio)


def _log_best(study: Study, location: str) -> None:
    """Keep the best fold by validation as a model of its own run."""
    best = best_of(study.logs)
    folder = fold_folder(location, best.recipe.fold, best.recipe.seed)
    with local_checkpoint(folder) as checkpoint:
        labels = read_card(checkpoint).labels
        Tracker(study.parent.uri, best.run_id).log_model(checkpoint, labels)
