"""The result of an evaluation: the prediction of every clip, and the scores computed from them."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation import statistics
from ser_ray.evaluation.rendering import notebook_cell
from ser_ray.evaluation.statistics import Calibration, Comparison, Intervals
from ser_ray.shards.card import UsedCorpus
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import label_indices
from ser_ray.training.metrics import Scores, scores_of

Part = Literal["validation", "test"]
Row = dict[str, Any]
"""A row of a table: names and counts, and scores as shares from 0 to 1."""
REPORT = "report.html"
"""File name of a run's page, in the run folder and in the MLflow run."""
GROUPS = ("speaker", "sex", "channel", "intensity", "statement")
"""Columns whose values define groups of clips that are also scored. A column is left out if the
corpus lacks it or a value is missing."""
CLIP_COLUMNS = ("path", "start", "end", "take", "corpus", *GROUPS, "emotion")
"""Columns that a table of predictions copies from the shard set, if the shard set has them."""
NUM_HARDEST = 12
"""Number of the hardest clips that a page shows."""
NOT_IN_METRIC_NAME = r"[^\w.\- ]"
"""Characters that are replaced in a part of a metric's name: those that MLflow forbids, and the
slash, which separates the parts."""
SCORES = {"ua": "UA", "wa": "WA", "f1": "macro F1"}
"""{name in `Scores.to_dict` and `Intervals`: title} of the scores that have intervals."""


@dataclass(frozen=True)
class Evaluation:
    """The predictions of a model for one part of a fold, or for shards it was not trained on."""

    card: CheckpointCard
    """Card of the checkpoint that was scored. If folds are pooled, this is the card of one fold."""
    part: Part
    """The part of the fold that was scored."""
    protocol: str
    """Protocol and fold as text, or the name of another corpus whose speakers were scored."""
    corpus: str
    """The kind of corpus that was scored (`ser_ray.corpus.words.CORPORA`)."""
    is_own_test: bool
    """Whether this is the test part of the model's own fold. `ser_ray.evaluate` records only the
    scores of such parts in the training's MLflow run."""
    seen_speakers: tuple[str, ...]
    """Scored speakers that the model was trained or validated on, if the user allowed them."""
    predictions: pa.Table
    """One row for each clip (`predictions_table`)."""
    corpora: tuple[UsedCorpus, ...] = ()
    """Which clips of each corpus were used, if there are several or if labels were mapped."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """Record of the run that trained the model (`ser_ray.evaluation.evaluate.origin_of`); empty if
    there is none."""
    shards: tuple[str, ...] = ()
    """Locations of the shard sets that were scored; empty if several folds are pooled."""
    report: str = ""
    """Location of the page that shows these scores; empty if there is none."""
    is_recorded: bool = False
    """Whether the scores are in the MLflow run of `origin`."""
    under: tuple[Row, ...] = ()
    """Scores of the same clips under simulated recording conditions, as `robustness.score_under`
    returns them; empty if no condition was requested."""

    @property
    def label(self) -> str:
        """Protocol, fold and seen speakers, as shown beside every score."""
        if not self.seen_speakers:
            return self.protocol
        return f"{self.protocol}, SPEAKERS SEEN IN TRAINING: {', '.join(self.seen_speakers)}"

    @property
    def measured_on(self) -> str:
        """Part, protocol and corpus, as shown beside every score."""
        return f"{self.part}, {self.label}, {CORPORA[self.corpus]}"

    @cached_property
    def truth(self) -> np.ndarray:
        """Index of the true label [clips]."""
        return label_indices(self.predictions, self.card.labels)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Probability of every label [clips, labels]."""
        columns = [f"p_{label}" for label in self.card.labels]
        return np.stack(self.predictions.select(columns).columns, axis=1)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Index of the predicted label [clips]."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def speakers(self) -> list[str]:
        """Speaker of every clip [clips]."""
        return self.predictions["speaker"].to_pylist()

    @cached_property
    def clips(self) -> list[str]:
        """Location and start of every clip [clips]. The same clip occurs once for each seed."""
        paths, starts = (self.predictions[name].to_pylist() for name in ("path", "start"))
        return [f"{path} {start}" for path, start in zip(paths, starts, strict=True)]

    @property
    def num_clips(self) -> int:
        """Number of clips. A clip that several seeds scored counts once."""
        return len(set(self.clips))

    @cached_property
    def scores(self) -> Scores:
        """The scores of all clips. The clips of several seeds are scored together."""
        return scores_of(self.truth, self.probabilities)

    @cached_property
    def seeds(self) -> np.ndarray:
        """Seed of the model that scored each clip [clips]; 0 without a column `seed`."""
        if "seed" in self.predictions.schema.names:
            return self.predictions["seed"].to_numpy()
        return np.zeros(len(self.truth), int)

    @cached_property
    def by_seed(self) -> dict[int, Scores]:
        """{seed: scores} of all seeds."""
        scores = {}
        for seed in np.unique(self.seeds):
            rows = self.seeds == seed
            scores[int(seed)] = scores_of(self.truth[rows], self.probabilities[rows])
        return scores

    def mean(self, score: str) -> float:
        """Return the mean of a score (wa, ua or f1) over the seeds."""
        return float(np.mean([scores.to_dict()[score] for scores in self.by_seed.values()]))

    @cached_property
    def intervals(self) -> Intervals:
        """95 % intervals of the scores."""
        return statistics.bootstrap(
            self.speakers, self.clips, self.truth, self.predicted, len(self.card.labels), self.seeds
        )

    def compare(self, first: np.ndarray, second: np.ndarray, num_labels: int) -> Comparison:
        """Compare two predictions for these clips, which are label indices [clips]."""
        return statistics.compare(self.speakers, self.clips, self.truth, first, second, num_labels)

    @cached_property
    def calibration(self) -> Calibration:
        """How well the confidence agrees with the accuracy."""
        return statistics.calibration(self.truth, self.probabilities)

    @cached_property
    def uncalibrated(self) -> Calibration:
        """The calibration without the model's temperature."""
        return statistics.calibration(
            self.truth, apply_temperature(self.probabilities, 1 / self.card.temperature)
        )

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """{column: a row for each of its values}, for `corpus` and the columns in `GROUPS`."""
        groups = {"corpus": self.corpus_rows} if self.corpus_rows else {}
        for name in GROUPS:
            if name in self.predictions.schema.names and not self.predictions[name].null_count:
                groups[name] = [
                    {
                        name: value,
                        "clips": part.num_clips,
                        "wa": part.scores.wa,
                        "ua": part.scores.ua,
                    }
                    for value, part in self._parts_by(name)
                ]
        return groups

    @cached_property
    def corpus_rows(self) -> list[Row]:
        """A row for each corpus: clips, WA, UA and its 95 % interval; empty for one shard set."""
        if "corpus" not in self.predictions.column_names:
            return []
        rows = []
        for name, part in self._parts_by("corpus"):
            scores = {score: part.mean(score) for score in ("wa", "ua")}
            low, high = part.intervals.ua
            rows.append(
                {"corpus": name, "clips": part.num_clips, **scores, "ua_low": low, "ua_high": high}
            )
        return rows

    def _parts_by(self, column: str) -> Iterator[tuple[str, Self]]:
        """Yield each value of a column as text, and the evaluation of the clips that have it."""
        values = self.predictions[column]
        for value in sorted(values.unique().to_pylist(), key=str):
            rows = self.predictions.filter(pc.equal(values, value))
            yield str(value), replace(self, predictions=rows)

    @property
    def corpus_lines(self) -> list[str]:
        """A line with the scores of each corpus; empty if the clips are of one corpus."""
        rows = self.corpus_rows if len(self.corpus_rows) > 1 else []
        return [
            f"  {row['corpus']:14} UA {row['ua']:6.1%} [{row['ua_low']:.1%}, "
            f"{row['ua_high']:.1%}], WA {row['wa']:6.1%}, {row['clips']} clips"
            for row in rows
        ]

    @property
    def group_metrics(self) -> dict[str, float]:
        """UA and WA of all corpora and recording conditions, by names such as `corpus/emodb/ua`."""
        groups = (("corpus", "corpus", self.corpus_rows), ("under", "condition", self.under))
        return {
            f"{group}/{re.sub(NOT_IN_METRIC_NAME, '-', row[name])}/{score}": row[score]
            for group, name, rows in groups
            for row in rows
            for score in ("ua", "wa")
        }

    @property
    def speaker_rows(self) -> list[Row]:
        """A row for each speaker: clips, WA and UA, sorted by WA from high to low."""
        return sorted(self.groups["speaker"], key=lambda row: -row["wa"])

    def hardest(self) -> list[int]:
        """Return the rows of the most confident wrong predictions, sorted by confidence."""
        wrong = np.flatnonzero(self.predicted != self.truth)
        confidence = self.probabilities[wrong].max(axis=1)
        return wrong[np.argsort(-confidence, kind="stable")][:NUM_HARDEST].tolist()

    def typical(self) -> list[int]:
        """Return the row of a typical clip for each label.

        The probability of the label in this clip is the median over the label's clips.
        """
        rows = []
        for label in np.unique(self.truth):
            clips = np.flatnonzero(self.truth == label)
            order = np.argsort(self.probabilities[clips, label], kind="stable")
            rows.append(int(clips[order[len(clips) // 2]]))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Return the scores, what they were measured on, and the hardest clips, as JSON values."""
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
            **self.origin,  # its shards are those of the training
            "shards": list(self.shards),
            "report": self.report,
        }

    @property
    def sentence(self) -> str:
        """UA and WA with their intervals, protocol and corpus, in one line."""
        return (
            f"{self._with_interval('ua')}, {self._with_interval('wa')} on "
            f"{self.scores.num_clips} clips ({self.label}, {CORPORA[self.corpus]}; "
            f"95 % intervals by bootstrap over {self.intervals.count} {self.intervals.drawn})"
        )

    def __repr__(self) -> str:
        """Return the scores in a few lines."""
        lines = [
            f"{self.label}, {CORPORA[self.corpus]}, {self.part}, {self.scores.num_clips} clips: "
            f"{', '.join(map(self._with_interval, SCORES))}, ECE {self.calibration.ece:.1%}",
            f"in brackets: 95 % intervals by bootstrap over {self.intervals.count} "
            f"{self.intervals.drawn}",
        ]
        used = [f"corpus {corpus}" for corpus in self.corpora]
        return "\n".join([*lines, *self.corpus_lines, *used, *self.under_lines])

    def _repr_html_(self) -> str:
        return notebook_cell(repr(self), self.report)

    @property
    def under_lines(self) -> list[str]:
        """A line with the scores under each recording condition."""
        return [
            f"  {row['condition']:14} UA {row['ua']:6.1%} ({row['ua_change']:+6.1%} "
            f"[{row['low']:+6.1%}, {row['high']:+6.1%}]), WA {row['wa']:6.1%}"
            + (f", {row['unscored']} clips not scored" if row["unscored"] else "")
            for row in self.under
        ]

    def _with_interval(self, score: str) -> str:
        """Return a score and its interval as text."""
        low, high = getattr(self.intervals, score)
        return f"{SCORES[score]} {self.scores.to_dict()[score]:.1%} [{low:.1%}, {high:.1%}]"


def predictions_table(
    clips: pa.Table, probabilities: np.ndarray, labels: Sequence[str]
) -> pa.Table:
    """Make the table of predictions: `CLIP_COLUMNS`, `predicted`, and `p_<label>` for each label.

    Args:
        clips: one row for each clip, with the columns of a shard set.
        probabilities: [clips, labels].
        labels: the labels, in the order of `probabilities`.
    """
    table = clips.select([name for name in CLIP_COLUMNS if name in clips.schema.names])
    predicted = [labels[index] for index in probabilities.argmax(axis=1)]
    table = table.append_column("predicted", pa.array(predicted))
    for index, name in enumerate(labels):
        table = table.append_column(f"p_{name}", pa.array(probabilities[:, index]))
    return table
