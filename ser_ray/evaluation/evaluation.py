"""The result of an evaluation: the prediction of every clip, and the scores computed from them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation import statistics
from ser_ray.evaluation.statistics import Calibration, Intervals
from ser_ray.shards.card import UsedCorpus
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import label_indices
from ser_ray.training.metrics import Scores, count_confusion, scores_of

Part = Literal["validation", "test"]
Row = dict[str, Any]
"""A row of a table: names and counts, and scores as shares from 0 to 1."""
REPORT = "report.html"
"""Name of a run's page, in the run's folder and in its MLflow run."""
GROUPS = ("speaker", "sex", "channel", "intensity", "statement")
"""Columns of the clips by which scores are broken down, if the corpus has them."""
KEPT = ("path", "start", "end", "take", "corpus", *GROUPS, "emotion")
"""Columns of the clips that are kept beside their predictions."""
HARDEST = 12
"""Number of the hardest clips that a page shows."""
FORBIDDEN = r"[^\w.\- ]"
"""Characters that MLflow forbids in the names of metrics, and the slash, which groups metrics."""
SCORES = {"ua": "UA", "wa": "WA", "f1": "macro F1"}
"""The scores that have intervals, by their names in `Scores.to_dict` and `Intervals`."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions of a model on one part of a fold, or on shards it was not trained on."""

    card: CheckpointCard
    """Card of the checkpoint that was scored. If folds are pooled, the card of one fold."""
    part: Part
    """Which part of the fold was scored."""
    protocol: str
    """Protocol and fold in words, or a phrase that says that other shards were scored."""
    corpus: str
    """The kind of corpus that was scored (`ser_ray.corpus.words.CORPORA`)."""
    is_own_test: bool
    """Whether this is the test part of the model's own fold. The training's run records only these
    scores."""
    seen_speakers: tuple[str, ...]
    """Speakers of these clips that the model was trained on, if the user allowed them."""
    predictions: pa.Table
    """One row for each clip (`predictions_table`)."""
    corpora: tuple[UsedCorpus, ...] = ()
    """The clips and labels of each corpus, if there are several or if labels were mapped."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Record of the run that trained the model (`ser_ray.evaluation.evaluate.origin_of`); empty if
    there is none."""
    report: str = ""
    """Location of the page that has these scores; empty if there is none."""
    under: tuple[Row, ...] = ()
    """Scores of these clips under recording conditions, as `robustness.score_under` returns them;
    empty if they were not asked for."""

    @property
    def label(self) -> str:
        """Protocol and fold, as shown beside every score."""
        if not self.seen_speakers:
            return self.protocol
        return f"{self.protocol}, SPEAKERS SEEN IN TRAINING: {', '.join(self.seen_speakers)}"

    @property
    def measured_on(self) -> str:
        """Part, protocol and corpus, as shown beside every score."""
        return f"{self.part}, {self.label}, {CORPORA[self.corpus]}"

    @cached_property
    def truth(self) -> np.ndarray:
        """Label indices [clips]."""
        return label_indices(self.predictions, self.card.labels)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probability of every label [clips, labels]."""
        columns = [f"p_{label}" for label in self.card.labels]
        return np.stack(self.predictions.select(columns).columns, axis=1)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Label indices [clips]."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def speakers(self) -> list[str]:
        """Speaker of every clip [clips]."""
        return self.predictions["speaker"].to_pylist()

    @cached_property
    def scores(self) -> Scores:
        """The scores; several seeds are scored by the sum of their confusion matrices."""
        return scores_of(self.truth, self.probabilities)

    @cached_property
    def seeds(self) -> np.ndarray:
        """Seed of the training that scored each clip [clips]; zeros if there was only one."""
        if "seed" in self.predictions.schema.names:
            return self.predictions["seed"].to_numpy()
        return np.zeros(len(self.truth), int)

    @cached_property
    def by_seed(self) -> dict[int, Scores]:
        """The scores of every seed."""
        return {
            int(seed): scores_of(self.truth[own], self.probabilities[own])
            for seed in np.unique(self.seeds)
            for own in [self.seeds == seed]
        }

    def mean(self, score: str) -> float:
        """Mean over the seeds of wa, ua or f1."""
        return float(np.mean([scores.to_dict()[score] for scores in self.by_seed.values()]))

    @cached_property
    def intervals(self) -> Intervals:
        """95 % intervals of the scores."""
        return statistics.bootstrap(
            self.speakers, self.truth, self.predicted, len(self.card.labels), self.seeds
        )

    @cached_property
    def calibration(self) -> Calibration:
        """Confidence against accuracy."""
        return statistics.calibration(self.truth, self.probabilities)

    @cached_property
    def uncalibrated(self) -> Calibration:
        """Calibration before the model's temperature scaled the probabilities."""
        return statistics.calibration(
            self.truth, apply_temperature(self.probabilities, 1 / self.card.temperature)
        )

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """Clips, WA and UA by speaker, sex, channel, intensity and statement."""
        groups = {"corpus": self.corpus_rows} if self.corpus_rows else {}
        for name in GROUPS:
            if name in self.predictions.schema.names and not self.predictions[name].null_count:
                values = [str(value) for value in self.predictions[name].to_pylist()]
                groups[name] = group_rows(name, values, self.truth, self.predicted)
        return groups

    @cached_property
    def corpus_rows(self) -> list[Row]:
        """Clips, WA, and UA with its 95 % interval, of every corpus; empty for one shard set."""
        if "corpus" not in self.predictions.column_names:
            return []
        names, rows = self.predictions["corpus"], []
        for name in sorted(names.unique().to_pylist()):
            own = replace(self, predictions=self.predictions.filter(pc.equal(names, name)))
            scores = {score: own.mean(score) for score in ("wa", "ua")}
            low, high = own.intervals.ua
            clips = own.predictions.num_rows // len(own.by_seed)
            rows.append({"corpus": name, "clips": clips, **scores, "ua_low": low, "ua_high": high})
        return rows

    @property
    def corpus_lines(self) -> list[str]:
        """The scores of every corpus, each in a line; empty for a single corpus."""
        return [
            f"  {row['corpus']:14} UA {row['ua']:6.1%} [{row['ua_low']:.1%}, "
            f"{row['ua_high']:.1%}], WA {row['wa']:6.1%}, {row['clips']} clips"
            for row in self.corpus_rows
            if len(self.corpus_rows) > 1
        ]

    @property
    def group_metrics(self) -> dict[str, float]:
        """UA and WA of every corpus and recording condition, by name, such as `corpus/emodb/ua`."""
        groups = (("corpus", "corpus", self.corpus_rows), ("under", "condition", self.under))
        return {
            f"{group}/{re.sub(FORBIDDEN, '-', row[name])}/{score}": row[score]
            for group, name, rows in groups
            for row in rows
            for score in ("ua", "wa")
        }

    @property
    def speaker_rows(self) -> list[Row]:
        """Clips, WA and UA of every speaker; the highest WA comes first."""
        return sorted(self.groups["speaker"], key=lambda row: -row["wa"])

    def hardest(self) -> list[int]:
        """Row numbers of the wrong predictions with the highest confidence, the highest first."""
        wrong = np.flatnonzero(self.predicted != self.truth)
        confidence = self.probabilities[wrong].max(axis=1)
        return wrong[np.argsort(-confidence, kind="stable")][:HARDEST].tolist()

    def typical(self) -> list[int]:
        """One row number for each label: the clip whose true label has the median probability."""
        rows = []
        for label in np.unique(self.truth):
            own = np.flatnonzero(self.truth == label)
            order = np.argsort(self.probabilities[own, label], kind="stable")
            rows.append(int(own[order[len(own) // 2]]))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """All results, as JSON values."""
        hardest = self.predictions.select(["path", "emotion", "predicted"]).take(self.hardest())
        return {
            "protocol": self.label,
            "part": self.part,
            "corpus": self.corpus,
            "seen_speakers": list(self.seen_speakers),
            "clips": self.scores.num_clips,
            **self.scores.to_dict(),
            "recall": dict(zip(self.card.labels, self.scores.recall.tolist(), strict=True)),
            "intervals": asdict(self.intervals),
            "corpora": [asdict(corpus) for corpus in self.corpora],
            "groups": self.groups,
            "ece": self.calibration.ece,
            "ece_uncalibrated": self.uncalibrated.ece,
            "temperature": self.card.temperature,
            "hardest": hardest.to_pylist(),
            "confusion": self.scores.confusion.tolist(),
            "under": list(self.under),
            **self.origin,
        }

    @property
    def sentence(self) -> str:
        """UA and WA with their intervals, protocol and corpus, in one line."""
        return (
            f"{self._shown('ua')}, {self._shown('wa')} on {self.scores.num_clips} clips "
            f"({self.label}, {CORPORA[self.corpus]}; 95 % intervals by bootstrap over "
            f"{self.intervals.count} {self.intervals.drawn})"
        )

    def __repr__(self) -> str:
        """The scores in a few lines."""
        lines = [
            f"{self.label}, {CORPORA[self.corpus]}, {self.part}, {self.scores.num_clips} clips: "
            f"{', '.join(map(self._shown, SCORES))}, ECE {self.calibration.ece:.1%}",
            f"in brackets 95 % intervals by bootstrap over {self.intervals.count} "
            f"{self.intervals.drawn}",
        ]
        read = [f"read of {corpus}" for corpus in self.corpora]
        return "\n".join([*lines, *self.corpus_lines, *read, *self.under_lines])

    @property
    def under_lines(self) -> list[str]:
        """A line for each recording condition."""
        return [
            f"  {row['condition']:14} UA {row['ua']:6.1%} ({row['ua_change']:+6.1%} "
            f"[{row['low']:+6.1%}, {row['high']:+6.1%}]), WA {row['wa']:6.1%}"
            + (f", {row['unscored']} clips not scored" if row["unscored"] else "")
            for row in self.under
        ]

    def _shown(self, score: str) -> str:
        """A score with its interval."""
        low, high = getattr(self.intervals, score)
        return f"{SCORES[score]} {self.scores.to_dict()[score]:.1%} [{low:.1%}, {high:.1%}]"


def predictions_table(
    clips: pa.Table, probabilities: np.ndarray, labels: Sequence[str]
) -> pa.Table:
    """Add predictions to their clips: the columns `KEPT`, predicted, and p_<label> for each label.

    Args:
        clips: one row for each clip, with the columns of a shard set.
        probabilities: [clips, labels].
        labels: names of the probabilities' columns.
    """
    table = clips.select([name for name in KEPT if name in clips.schema.names])
    predicted = [labels[index] for index in probabilities.argmax(axis=1)]
    table = table.append_column("predicted", pa.array(predicted))
    for index, name in enumerate(labels):
        table = table.append_column(f"p_{name}", pa.array(probabilities[:, index]))
    return table


def group_rows(
    kind: str, groups: Sequence[str], truth: np.ndarray, predicted: np.ndarray
) -> list[Row]:
    """Compute a table row for each group of clips: its number of clips, its WA and its UA.

    The rows are sorted by the name of the group. WA and UA are shares from 0 to 1.

    Args:
        kind: name of the groups' column, such as speaker or sex.
        groups: group of every clip [clips].
        truth: label indices [clips].
        predicted: label indices [clips].
    """
    num_labels = int(max(truth.max(), predicted.max())) + 1
    rows = []
    for group in sorted(set(groups)):
        own = np.asarray(groups) == group
        scores = Scores(count_confusion(truth[own], predicted[own], num_labels), loss=0.0)
        rows.append({kind: group, "clips": scores.num_clips, "wa": scores.wa, "ua": scores.ua})
    return rows
