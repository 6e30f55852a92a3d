"""The predictions of all folds of a cross-validation put together, and their scores."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.evaluation.results import REPORT, Part, group_rows
from ser_ray.evaluation.statistics import Intervals, bootstrap
from ser_ray.search.record import TrialRecord
from ser_ray.search.space import CrossvalConfig
from ser_ray.shards.read import ShardSet
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.paths import filesystem_of, location_inside
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import label_indices
from ser_ray.training.metrics import Scores, count_confusion, scores_of

PREDICTIONS = "predictions.parquet"
FIGURES = {"wa": "WA", "ua": "UA", "f1": "macro F1"}


@dataclass(frozen=True, slots=True)
class CrossvalPlan:
    """The trainings of a cross-validation; no fold has an empty part."""

    shards: ShardSet
    recipe: TrainConfig
    config: CrossvalConfig
    folds: tuple[int, ...]
    caption: str
    """Protocol, folds and whether it is speaker-dependent."""

    @property
    def seeds(self) -> list[int]:
        """The seeds that every fold is trained with."""
        return [self.recipe.seed + index for index in range(self.config.seeds)]

    @property
    def num_trials(self) -> int:
        """Number of trainings."""
        return len(self.folds) * self.config.seeds

    @property
    def label(self) -> str:
        """Caption and corpus, as shown beside every score."""
        return f"{self.caption}, {CORPORA[self.shards.card.corpus]}"


@dataclass(frozen=True, slots=True)
class CrossvalResult:
    """The pooled parts, test or validation, of all folds."""

    name: str
    plan: CrossvalPlan
    by_seed: dict[int, Scores]
    """For every seed, the scores of all folds' clips together; every test clip occurs once."""
    ensemble: Scores | None
    """Scores of the mean probabilities over all seeds; None for one seed, or if the seeds scored
    different clips."""
    intervals: Intervals
    """95 % intervals of the means over the seeds, from resampling speakers."""
    predictions: pa.Table
    """One row per clip and seed: fold, seed, speaker, emotion, predicted, p_<label>."""
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
        """The part that was scored."""
        return self.plan.config.part

    @property
    def labels(self) -> tuple[str, ...]:
        """Emotions, in the order of the probabilities."""
        return self.plan.shards.card.labels

    @property
    def report(self) -> str:
        """Location of the cross-validation's page."""
        return location_inside(self.location, REPORT)

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
    def sentence(self) -> str:
        """The UA in a sentence."""
        seeds = len(self.by_seed)
        text = f"The UA over the clips of {len(self.plan.folds)} folds is {self.mean('ua'):.1%}"
        if seeds > 1:
            text += f", the mean of {seeds} seeds (standard deviation {self.spread('ua'):.1%})"
        if self.ensemble is not None:
            text += f"; the mean probabilities of their networks have {self.ensemble.ua:.1%}"
        return text + "."

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
            *label_indices_of(self.predictions, self.labels),
        )

    @property
    def trainings(self) -> list[dict[str, Any]]:
        """Clips, WA and UA of every training, by fold and seed."""
        folds, seeds = (self.predictions[name].to_pylist() for name in ("fold", "seed"))
        names = [f"fold {fold}, seed {seed}" for fold, seed in zip(folds, seeds, strict=True)]
        return group_rows("training", names, *label_indices_of(self.predictions, self.labels))

    def to_dict(self) -> dict[str, Any]:
        """The figures, in JSON's own types."""
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

    def figure(self, name: str) -> str:
        """The mean of wa, ua or f1 over the seeds, with its spread and interval, in words."""
        low, high = getattr(self.intervals, name)
        spread = f" ± {self.spread(name):.1%} over seeds" if len(self.by_seed) > 1 else ""
        return (
            f"{self.mean(name):.1%}{spread}, 95 % interval over {self.intervals.drawn} "
            f"{low:.1%} to {high:.1%}"
        )

    def text(self) -> str:
        """The figures, each with the protocol it belongs to."""
        lines = [
            f"{title:8}  {self.figure(name)}  ({self.label})" for name, title in FIGURES.items()
        ]
        if self.ensemble is not None:
            scores = self.ensemble.to_dict()
            shown = ", ".join(f"{title} {scores[name]:.1%}" for name, title in FIGURES.items())
            lines.append(
                f"{'ensemble':8}  {shown}: mean probability of {len(self.by_seed)} networks, not "
                f"one of them  ({self.label})"
            )
        return "\n".join(lines)


def fold_rows(result: CrossvalResult, trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Tabulate the trainings: fold, seed, speakers and clips scored, scores, and validation UA."""
    seeds, folds = (result.predictions[name].to_numpy() for name in ("seed", "fold"))
    speakers = np.asarray(result.predictions["speaker"].to_pylist())
    truth, predicted = label_indices_of(result.predictions, result.labels)
    rows = []
    for trial in trials:
        own = (seeds == trial.recipe.seed) & (folds == trial.recipe.fold)
        confusion = count_confusion(truth[own], predicted[own], len(result.labels))
        scores = Scores(confusion, loss=0.0)
        rows.append(
            {
                "fold": trial.recipe.fold,
                "seed": trial.recipe.seed,
                "speakers": ", ".join(sorted(set(speakers[own]))),
                "clips": scores.num_clips,
                "ua": scores.ua,
                "wa": scores.wa,
                "validation UA": trial.selected["val/ua"],
            }
        )
    return rows


def pool(plan: CrossvalPlan, location: str, name: str, tracker: Tracker) -> CrossvalResult:
    """Concatenate the predictions of all folds, store them as one table, and score them.

    Args:
        plan: what was trained.
        location: folder of the cross-validation.
        name: name of the cross-validation.
        tracker: its MLflow run.
    """
    tables = []
    for seed, fold in itertools.product(plan.seeds, plan.folds):
        tables.append(read_predictions(fold_folder(location, fold, seed)))
    predictions = pa.concat_tables(tables)
    write_predictions(predictions, location)
    labels = plan.shards.card.labels
    truth, predicted = label_indices_of(predictions, labels)
    probabilities = np.stack([predictions[f"p_{label}"].to_numpy() for label in labels], axis=1)
    seeds = predictions["seed"].to_numpy()
    folds, paths = (predictions[name].to_pylist() for name in ("fold", "path"))
    clips = [f"{fold} {path}" for fold, path in zip(folds, paths, strict=True)]
    return CrossvalResult(
        name=name,
        plan=plan,
        by_seed={
            seed: scores_of(truth[seeds == seed], probabilities[seeds == seed])
            for seed in plan.seeds
        },
        ensemble=ensemble_scores(clips, seeds, truth, probabilities),
        intervals=bootstrap(
            predictions["speaker"].to_pylist(), truth, predicted, len(labels), seeds
        ),
        predictions=predictions,
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        location=location,
    )


def ensemble_scores(
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


def write_predictions(predictions: pa.Table, folder: str) -> None:
    """Write a table of predictions into a folder, completely or not at all."""
    filesystem, path = filesystem_of(location_inside(folder, PREDICTIONS))
    with atomic_write(filesystem, path) as target:
        pq.write_table(predictions, target, filesystem=filesystem)


def read_predictions(folder: str) -> pa.Table:
    """Read the table of predictions in a folder."""
    filesystem, path = filesystem_of(location_inside(folder, PREDICTIONS))
    return pq.read_table(path, filesystem=filesystem)


def label_indices_of(
    predictions: pa.Table, labels: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Label indices [clips] of the true and of the predicted emotions."""
    named = predictions.select(["predicted"]).rename_columns(["emotion"])
    return label_indices(predictions, labels), label_indices(named, labels)
