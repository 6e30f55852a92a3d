"""The result of a cross-validation: the predictions of all folds in one table, and their scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation.evaluation import SCORES, Evaluation
from ser_ray.evaluation.statistics import Calibration, calibration
from ser_ray.search.config import CrossvalConfig
from ser_ray.search.fold_files import PREDICTIONS, read_fold, write_predictions
from ser_ray.search.trial import StudyResult, TrialRecord
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import location_inside
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.metrics import Scores, scores_of
from ser_ray.training.recipe import TrainConfig


@dataclass(frozen=True, slots=True)
class CrossvalPlan:
    """The trainings of a cross-validation. Every fold has clips in every part."""

    shards: ShardSet
    recipe: TrainConfig
    config: CrossvalConfig
    folds: tuple[int, ...]
    caption: str
    """Protocol and folds, and whether the protocol is speaker-dependent."""

    @property
    def points(self) -> list[dict[str, int]]:
        """Seed and fold of each training."""
        seeds = range(self.recipe.seed, self.recipe.seed + self.config.seeds)
        return [{"seed": seed, "fold": fold} for seed in seeds for fold in self.folds]

    @property
    def label(self) -> str:
        """Caption and corpus, as shown beside every score."""
        return f"{self.caption}, {CORPORA[self.shards.card.corpus]}"


@dataclass(frozen=True, kw_only=True, repr=False)
class PooledEvaluation(Evaluation):
    """The predictions of all trainings, with the columns `fold` and `seed`.

    Each training has scaled its probabilities with its own temperature. Therefore the temperature
    of `card` is 1.
    """

    unscaled: np.ndarray
    """Probability of every label without any temperature [clips, labels]."""

    @cached_property
    def uncalibrated(self) -> Calibration:
        """The calibration without the temperatures of the trainings."""
        return calibration(self.truth, self.unscaled)


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossvalResult(StudyResult):
    """A finished cross-validation. Its trials are in the order of the plan."""

    plan: CrossvalPlan
    folds: list[Evaluation]
    """The evaluation of each training on the scored part of its fold."""
    pooled: PooledEvaluation
    ensemble: Scores | None
    """Scores of the probabilities averaged over the seeds. None if there is only one seed, or if
    the seeds scored different clips."""

    @property
    def table(self) -> str:
        """Location of the table of all predictions."""
        return location_inside(self.location, PREDICTIONS)

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """One row per training: fold, seed, scores, validation UA, number of clips, speakers."""
        return [
            {
                "fold": trial.recipe.fold,
                "seed": trial.recipe.seed,
                "ua": fold.scores.ua,
                "wa": fold.scores.wa,
                "validation UA": trial.selected["val/ua"],
                "clips": fold.scores.num_clips,
                "speakers": ", ".join(sorted(set(fold.speakers))),
            }
            for trial, fold in zip(self.trials, self.folds, strict=True)
        ]

    def spread(self, score: str) -> float:
        """Return the sample standard deviation of ua, wa or f1 over the seeds; 0 for one seed."""
        values = [scores.to_dict()[score] for scores in self.pooled.by_seed.values()]
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    @property
    def sentence(self) -> str:
        """The UA of all folds, and of the ensemble, in one sentence."""
        seeds, ua = self.plan.config.seeds, self.pooled.mean("ua")
        text = f"The UA over the clips of {len(self.plan.folds)} folds is {ua:.1%}"
        if seeds > 1:
            text += f", the mean of {seeds} seeds (standard deviation {self.spread('ua'):.1%})"
        if self.ensemble is not None:
            text += f"; the ensemble of these networks has {self.ensemble.ua:.1%}"
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as JSON values."""
        pooled = self.pooled
        return {
            "protocol": self.plan.label,
            "part": pooled.part,
            "clips": pooled.predictions.num_rows // len(pooled.by_seed),
            "seeds": list(pooled.by_seed),
            "mean": {name: pooled.mean(name) for name in SCORES},
            "spread": {name: self.spread(name) for name in SCORES},
            "interval": {name: getattr(pooled.intervals, name) for name in SCORES},
            "by_seed": {str(seed): scores.to_dict() for seed, scores in pooled.by_seed.items()},
            "ensemble": None if self.ensemble is None else self.ensemble.to_dict(),
            "by_corpus": pooled.corpus_rows,
            "by_speaker": pooled.groups["speaker"],
            "confusion": pooled.scores.confusion.tolist(),
            "under": list(pooled.under),
        }

    def describe(self, score: str) -> str:
        """Return the mean of ua, wa or f1 over the seeds as text, with its spread and interval."""
        low, high = getattr(self.pooled.intervals, score)
        spread = f" ± {self.spread(score):.1%} over seeds" if self.plan.config.seeds > 1 else ""
        return (
            f"{self.pooled.mean(score):.1%}{spread}, 95 % interval over "
            f"{self.pooled.intervals.drawn} {low:.1%} to {high:.1%}"
        )

    def __repr__(self) -> str:
        part = self.plan.config.part
        lines = [
            f"fold {row['fold']}, seed {row['seed']} {part} UA {row['ua']:.1%}, "
            f"WA {row['wa']:.1%}, {row['clips']} clips"
            for row in self.trainings
        ]
        label = self.plan.label
        lines += [f"{title:8}  {self.describe(name)}  ({label})" for name, title in SCORES.items()]
        lines += self.pooled.corpus_lines
        if self.ensemble is not None:
            scores = self.ensemble.to_dict()
            shown = ", ".join(f"{title} {scores[name]:.1%}" for name, title in SCORES.items())
            lines.append(
                f"{'ensemble':8}  {shown}: mean probability of {self.plan.config.seeds} networks, "
                f"not a single network  ({label})"
            )
        lines += self.pooled.under_lines
        lines += [f"predictions  {self.table}", f"report       {self.report}"]
        return "\n".join(lines)


def pool(
    plan: CrossvalPlan, trials: Sequence[TrialRecord], location: str, name: str, tracker: Tracker
) -> CrossvalResult:
    """Concatenate the predictions of the planned folds, write them as one table, and score them.

    Args:
        plan: the trainings to pool. Other trials are left out.
        trials: the trials of the study.
        location: folder of the cross-validation.
        name: name of the cross-validation.
        tracker: tracker of the cross-validation's MLflow run.
    """
    by_point = {(trial.recipe.seed, trial.recipe.fold): trial for trial in trials if trial.ended}
    planned = [by_point[point["seed"], point["fold"]] for point in plan.points]
    folds = [read_fold(plan.config.part, location, trial, tracker.uri) for trial in planned]
    predictions = pa.concat_tables([fold.predictions for fold in folds])
    write_predictions(predictions, location)
    unscaled = [apply_temperature(f.probabilities, 1 / f.card.temperature) for f in folds]
    pooled = PooledEvaluation(
        card=replace(folds[0].card, config=plan.recipe, temperature=1.0),
        part=plan.config.part,
        protocol=plan.caption,
        corpus=folds[0].corpus,
        is_own_test=folds[0].is_own_test,
        seen_speakers=(),
        predictions=predictions,
        unscaled=np.concatenate(unscaled),
    )
    numbers = predictions["fold"].to_pylist()
    clips = [f"{fold} {clip}" for fold, clip in zip(numbers, pooled.clips, strict=True)]
    return CrossvalResult(
        name=name,
        plan=plan,
        trials=planned,
        folds=folds,
        pooled=pooled,
        ensemble=ensemble_scores(clips, pooled.seeds, pooled.truth, pooled.probabilities),
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        location=location,
    )


def ensemble_scores(
    clips: Sequence[str], seeds: np.ndarray, truth: np.ndarray, probabilities: np.ndarray
) -> Scores | None:
    """Return the scores of the probabilities averaged over the seeds.

    Args:
        clips: name of the clip in each row [num_rows].
        seeds: seed of the training that scored the row [num_rows].
        truth: label indices [num_rows].
        probabilities: [num_rows, num_labels].

    Returns:
        None if there is only one seed, or if the seeds scored different clips.
    """
    names, clips_by_seed = np.asarray(clips), np.unique(seeds, return_counts=True)[1]
    if len(clips_by_seed) == 1 or len(set(clips_by_seed)) > 1:
        return None
    rows = np.lexsort((names, seeds)).reshape(len(clips_by_seed), -1)  # [seeds, clips]
    if (names[rows] != names[rows[0]]).any():
        return None
    return scores_of(truth[rows[0]], probabilities[rows].mean(axis=0))
