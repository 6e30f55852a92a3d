"""A checkpoint and a shard set to scores on the test part of the checkpoint's own fold.

This is the one place that reads a test part. The checkpoint was chosen on validation before.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ser_ray.errors import CheckpointError
from ser_ray.report import bars_figure, confusion_figure
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.tracking import Tracker, now_ms
from ser_ray.training.checkpoint import CheckpointCard, read_card, read_network
from ser_ray.training.data import label_indices, load_clips, select_rows
from ser_ray.training.loop import predict_clips
from ser_ray.training.metrics import Scores, accuracy_by, scores_of


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a checkpoint on its test part."""

    card: CheckpointCard
    scores: Scores
    predictions: pa.Table
    """A row for each test clip: take, speaker, emotion, predicted, and p_<label> for each label."""

    @property
    def label(self) -> str:
        """Protocol, fold and corpus, as shown beside the scores."""
        return f"{self.card.split['label']}, {self.card.trained_on}"

    @property
    def by_speaker(self) -> list[tuple[str, int, float]]:
        """(speaker, clips, accuracy) for each test speaker."""
        table = self.predictions
        right = np.asarray(table["emotion"].to_pylist()) == np.asarray(
            table["predicted"].to_pylist()
        )
        return accuracy_by(table["speaker"].to_pylist(), right)

    def to_dict(self) -> dict[str, Any]:
        """What a program reads."""
        return {
            "protocol": self.card.split["label"],
            "corpus": self.card.corpus,
            "clips": self.scores.num_clips,
            **self.scores.to_dict(),
            "recall": dict(zip(self.card.labels, self.scores.recall.tolist(), strict=True)),
            "accuracy_by_speaker": {name: share for name, _, share in self.by_speaker},
            "confusion": self.scores.confusion.tolist(),
        }


def evaluate(checkpoint: Path, shards_location: str) -> Evaluation:
    """Score a checkpoint on the test part of the fold it was trained for.

    Raises:
        CheckpointError: not a checkpoint, or trained on other shards.
        ShardsError: no finished shard set there.
    """
    card = read_card(checkpoint)
    shards = open_shards(shards_location)
    _require_same_data(card, shards, shards_location)
    table = shards.clips()
    rows = select_rows(table, card.config).test
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_frames = table["num_frames"].to_numpy()
    labels = label_indices(table, card.labels)
    clips = load_clips(
        shards, card.config.feature, rows, labels, num_frames, card.normalisation, device
    )
    network = read_network(checkpoint, card).to(device, memory_format=torch.channels_last)
    probabilities = predict_clips(
        network, clips, np.arange(len(rows)), card.config, len(card.labels)
    )
    chosen = table.select(["take", "speaker", "emotion"]).take(rows)
    predicted = [card.labels[index] for index in probabilities.argmax(axis=1)]
    chosen = chosen.append_column("predicted", pa.array(predicted))
    for index, label in enumerate(card.labels):
        chosen = chosen.append_column(f"p_{label}", pa.array(probabilities[:, index]))
    return Evaluation(card, scores_of(labels[rows], probabilities), chosen)


def log_evaluation(evaluation: Evaluation, tracker: Tracker) -> None:
    """Record an evaluation in the run that trained the checkpoint."""
    scores, card = evaluation.scores, evaluation.card
    test = {f"test_{name}": value for name, value in scores.to_dict().items()}
    tracker.log_metrics(test, 0, now_ms())
    tracker.flush()
    speakers = evaluation.by_speaker
    tracker.log_files(
        {
            "plots/test_confusion.png": confusion_figure(
                scores.confusion, card.labels, evaluation.label
            ),
            "plots/test_recall_by_emotion.png": bars_figure(
                list(card.labels),
                scores.recall.tolist(),
                scores.confusion.sum(axis=1).tolist(),
                evaluation.label,
                "recall",
            ),
            "plots/test_accuracy_by_speaker.png": bars_figure(
                [name for name, _, _ in speakers],
                [share for _, _, share in speakers],
                [clips for _, clips, _ in speakers],
                evaluation.label,
                "accuracy",
            ),
            "tables/test.json": evaluation.to_dict(),
            "tables/test_predictions.csv": _csv(evaluation.predictions),
        }
    )


def origin_of(checkpoint: Path) -> Mapping[str, str]:
    """The MLflow run that a chosen checkpoint came from: `run_id` and `tracking_uri`, or empty."""
    path = checkpoint / "run.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _require_same_data(card: CheckpointCard, shards: ShardSet, location: str) -> None:
    if card.shards_fingerprint != shards.card.fingerprint:
        raise CheckpointError(
            f"{location}: these shards ({shards.card.fingerprint}) are not those that the "
            f"checkpoint was trained on ({card.shards_fingerprint}), so its test speakers cannot "
            "be told from its training speakers: name the shards it was trained on with --shards"
        )


def _csv(table: pa.Table) -> str:
    from pyarrow import csv

    sink = pa.BufferOutputStream()
    csv.write_csv(table, sink)
    return sink.getvalue().to_pybytes().decode()
