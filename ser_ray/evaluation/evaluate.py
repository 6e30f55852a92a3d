"""A checkpoint and a shard set to exact scores, their intervals and what lies behind them.

This is the one place that reads a test part. Everything was selected on validation before. The
scores are of the fold that the checkpoint was trained for; on another protocol's fold or on other
shards, speakers that it was trained on are refused, unless told, and then named beside every score.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.corpus.splits import one_clip_per_take
from ser_ray.errors import CheckpointError, ConfigError
from ser_ray.evaluation import statistics
from ser_ray.evaluation.statistics import Calibration, Comparison, Intervals
from ser_ray.plots.scores import Row, group_rows
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.training.checkpoint import CheckpointCard, read_card, read_network
from ser_ray.training.data import label_indices, load_clips, on_channel, select_rows
from ser_ray.training.metrics import Scores, scores_of
from ser_ray.training.scoring import predict_clips

Part = Literal["validation", "test"]
GROUPS = ("speaker", "sex", "channel", "intensity", "statement")
"""Columns of the clips by which accuracy is broken down, where a corpus has them."""
KEPT = ("path", "take", *GROUPS, "emotion")
HARDEST = 12


@dataclass(frozen=True)
class Evaluation:
    """Scores of a checkpoint on one part of a fold, or on shards it has nothing to do with."""

    card: CheckpointCard
    part: Part
    """Which side of the fold the clips are."""
    protocol: str
    """Protocol and fold in words, or that these are other shards."""
    corpus: str
    """ravdess, synthetic or table: what was scored."""
    is_own_test: bool
    """Whether it is the test part that the model's protocol meant for it: what its run records."""
    seen_speakers: tuple[str, ...]
    """Speakers of these clips that the model was trained on, where it was told to score them."""
    predictions: pa.Table
    """A row for each clip: `KEPT`, predicted, and p_<label> for each label."""
    origin: Mapping[str, str] = field(default_factory=dict)
    """MLflow run that trained the model, `run_id` and `tracking_uri`; empty if none is known."""

    @property
    def label(self) -> str:
        """Protocol and fold, as shown beside every score."""
        if not self.seen_speakers:
            return self.protocol
        return f"{self.protocol}, SPEAKERS SEEN IN TRAINING: {', '.join(self.seen_speakers)}"

    @cached_property
    def truth(self) -> np.ndarray:
        """Label indices [clips]."""
        return label_indices(self.predictions, self.card.labels)

    @cached_property
    def probabilities(self) -> np.ndarray:
        """Of every label [clips, labels]."""
        columns = [self.predictions[f"p_{label}"].to_numpy() for label in self.card.labels]
        return np.stack(columns, axis=1)

    @cached_property
    def predicted(self) -> np.ndarray:
        """Label indices [clips]."""
        return self.probabilities.argmax(axis=1)

    @cached_property
    def speakers(self) -> list[str]:
        """Of every clip."""
        speakers: list[str] = self.predictions["speaker"].to_pylist()
        return speakers

    @cached_property
    def scores(self) -> Scores:
        """The exact scores."""
        return scores_of(self.truth, self.probabilities)

    @cached_property
    def intervals(self) -> Intervals:
        """95 % intervals of the scores."""
        return statistics.bootstrap(
            self.speakers, self.truth, self.predicted, len(self.card.labels)
        )

    @cached_property
    def calibration(self) -> Calibration:
        """How far the confidence is to be believed."""
        return statistics.calibration(self.truth, self.probabilities)

    @cached_property
    def groups(self) -> dict[str, list[Row]]:
        """Clips, WA and UA by speaker, sex, channel, intensity and statement."""
        return {
            name: group_rows(
                name, [str(v) for v in self.predictions[name].to_pylist()],
                self.truth, self.predicted,
            )
            for name in GROUPS
            if name in self.predictions.schema.names and not self.predictions[name].null_count
        }  # fmt: skip

    def hardest(self, count: int = HARDEST) -> np.ndarray:
        """Rows of the clips that it is surest of and wrong about, the surest first."""
        wrong = np.flatnonzero(self.predicted != self.truth)
        confidence = self.probabilities[wrong].max(axis=1)
        return wrong[np.argsort(-confidence, kind="stable")][:count]

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        labels = self.card.labels
        intervals = asdict(self.intervals)
        hardest = self.predictions.select(["path", "emotion", "predicted"]).take(self.hardest())
        return {
            "protocol": self.label,
            "part": self.part,
            "corpus": self.corpus,
            "seen_speakers": list(self.seen_speakers),
            "clips": self.scores.num_clips,
            **self.scores.to_dict(),
            "recall": dict(zip(labels, self.scores.recall.tolist(), strict=True)),
            "intervals": intervals
            | {"recall": dict(zip(labels, intervals["recall"], strict=True))},
            "groups": self.groups,
            "ece": self.calibration.ece,
            "hardest": hardest.to_pylist(),
            "confusion": self.scores.confusion.tolist(),
            **self.origin,
        }

    def __str__(self) -> str:
        """The scores in a few lines."""
        scores, intervals = self.scores, self.intervals
        named = (
            ("UA", scores.ua, intervals.ua),
            ("WA", scores.wa, intervals.wa),
            ("macro F1", scores.macro_f1, intervals.f1),
        )
        shown = ", ".join(
            f"{name} {score:.1%} [{low:.1%}, {high:.1%}]" for name, score, (low, high) in named
        )
        return (
            f"{self.label}, {CORPORA[self.corpus]}, {self.part}, {scores.num_clips} clips: "
            f"{shown}, ECE {self.calibration.ece:.1%}\n"
            f"in brackets 95 % intervals over draws of {intervals.count} {intervals.drawn}"
        )


def evaluate(
    checkpoint: Path,
    shards_location: str,
    *,
    part: Part = "test",
    protocol: str = "",
    fold: int | None = None,
    allow_seen_speakers: bool = False,
) -> Evaluation:
    """Score a checkpoint.

    Args:
        checkpoint: its directory.
        shards_location: the shards it was trained on, or others with features of the same kind.
        part: side of the fold that is scored.
        protocol: another protocol than the one it was trained for. Of other shards all clips are
            scored if none is named.
        fold: of `protocol`; its own, or of another protocol the first, if None.
        allow_seen_speakers: score speakers it was trained on all the same.

    Raises:
        CheckpointError: not a checkpoint, or the shards hold other features, labels, or speakers
            that it was trained on.
        ShardsError: no finished shard set there.
        ConfigError: no such protocol or fold on these shards.
    """
    card = read_card(checkpoint)
    shards = open_shards(shards_location)
    _require_same_features(card, shards, shards_location)
    table = shards.clips()
    rows, label, is_own = _rows(card, shards, table, part, protocol, fold)
    seen = () if is_own else _seen_speakers(card, table, rows)
    if seen and not allow_seen_speakers:
        raise CheckpointError(
            f"{shards_location}: the model was trained on {len(seen)} of these speakers "
            f"({', '.join(seen)}), so scores on them would say nothing of other people; name "
            "shards of speakers it has not heard, or take --allow-seen-speakers (also where other "
            "people have the same names)"
        )
    probabilities = _score(checkpoint, card, shards, table, rows)
    names = [name for name in KEPT if name in table.schema.names]
    selected = table.select(names).take(rows)
    predicted = [card.labels[index] for index in probabilities.argmax(axis=1)]
    selected = selected.append_column("predicted", pa.array(predicted))
    for index, name in enumerate(card.labels):
        selected = selected.append_column(f"p_{name}", pa.array(probabilities[:, index]))
    return Evaluation(
        card=card,
        part=part,
        protocol=label,
        corpus=shards.card.corpus,
        is_own_test=is_own and part == "test",
        seen_speakers=seen,
        predictions=selected,
        origin=origin_of(checkpoint),
    )


def compare(first: Evaluation, second: Evaluation) -> Comparison:
    """Compare two models on the clips that both were scored on.

    Raises:
        ConfigError: they were scored on different clips, or know different labels.
    """
    ours, theirs = (item.predictions["take"].to_pylist() for item in (first, second))
    if first.card.labels != second.card.labels or ours != theirs:
        raise ConfigError(
            f"the two models were scored on different clips ({len(ours)} and {len(theirs)}) or "
            "know different labels: a paired test needs the same; name one --protocol and --fold "
            "whose test speakers neither was trained on"
        )
    return statistics.compare(
        first.speakers, first.truth, first.predicted, second.predicted, len(first.card.labels)
    )


def origin_of(checkpoint: Path) -> Mapping[str, str]:
    """The MLflow run that a checkpoint came from: `run_id` and `tracking_uri`, or empty."""
    path = checkpoint / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _rows(
    card: CheckpointCard,
    shards: ShardSet,
    table: pa.Table,
    part: Part,
    protocol: str,
    fold: int | None,
) -> tuple[np.ndarray, str, bool]:
    """Rows to score, what they are in words, and whether they are the checkpoint's own fold's."""
    config = card.config
    is_same_data = card.shards_fingerprint == shards.card.fingerprint
    if not (is_same_data or protocol):
        if fold is not None:
            raise ConfigError(
                f"fold is {fold}, but these are not the shards of the training, all of whose "
                "speakers are scored: name a --protocol too"
            )
        rows = on_channel(table, one_clip_per_take(table), config.channel)
        if not len(rows):
            raise ConfigError(
                f"{shards.uri}: these shards hold no {config.channel} clip, and it is those that "
                "the model is for"
            )
        return rows, "all speakers of other shards", False
    is_same_protocol = protocol in ("", config.protocol)
    if fold is None:
        fold = config.fold if is_same_protocol else 0
    is_own = is_same_data and is_same_protocol and fold == config.fold
    wanted = replace(
        config,
        protocol=protocol or config.protocol,
        fold=fold,
        # Who validated it says nothing of another fold or corpus.
        validation_speakers=config.validation_speakers if is_own else 0,
    )
    parts = select_rows(table, wanted)
    return getattr(parts, part), parts.label, is_own


def _seen_speakers(card: CheckpointCard, table: pa.Table, rows: np.ndarray) -> tuple[str, ...]:
    heard = {*card.split["train_speakers"], *card.split["validation_speakers"]}
    return tuple(sorted(heard & set(table["speaker"].take(rows).to_pylist())))


def _require_same_features(card: CheckpointCard, shards: ShardSet, location: str) -> None:
    if card.features != shards.card.features:
        raise CheckpointError(
            f"{location}: these shards hold other features than the model was trained on: prepare "
            "them with the model's settings, which its card.json holds under `features`"
        )
    unknown = sorted(set(shards.card.labels) - set(card.labels))
    if unknown:
        raise CheckpointError(
            f"{location}: the model does not know the labels {', '.join(unknown)}; it knows "
            f"{', '.join(card.labels)}"
        )


def _score(
    checkpoint: Path, card: CheckpointCard, shards: ShardSet, table: pa.Table, rows: np.ndarray
) -> np.ndarray:
    """Probabilities [clips, labels] of some rows of a shard set."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    labels = label_indices(table, card.labels)
    num_frames = table["num_frames"].to_numpy()
    clips = load_clips(
        shards, card.config.feature, rows, labels, num_frames, card.normalisation, device
    )
    network = read_network(checkpoint, card).to(device, memory_format=torch.channels_last)
    return predict_clips(network, clips, np.arange(len(rows)), card.config, len(card.labels))
