"""Computes scores from confusion matrices, and selects an epoch by its scores.

WA (weighted accuracy) is plain accuracy. UA (unweighted accuracy, also called UAR) is the mean
recall over the labels that occur. Macro F1 is the mean F1 over the labels that occur or are
predicted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ser_ray.training.recipe import Keep


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of a set of clips, or of many sets at once.

    Every score has the leading dimensions of `confusion`; for one set it is a number.

    Args:
        confusion: number of clips [..., labels, labels], with a row for each true label and a
            column for each predicted label.
        loss: mean negative log-likelihood of the true label, in nats.
    """

    confusion: np.ndarray
    loss: float = 0.0

    @property
    def num_clips(self) -> int:
        """Number of clips."""
        return int(self.confusion.sum())

    @property
    def wa(self) -> Any:
        """Share of the clips whose predicted label is correct; 0 without clips."""
        return _ratio(self._hits.sum(axis=-1), self.confusion.sum(axis=(-2, -1)))

    @property
    def ua(self) -> Any:
        """Mean recall over the labels that occur; 0 if no label occurs."""
        return _mean_where(self.recall, self._occurrences > 0)

    @property
    def macro_f1(self) -> Any:
        """Mean F1 over the labels that occur or are predicted; 0 without clips."""
        return _mean_where(self.f1, self._occurrences + self._predictions > 0)

    @property
    def recall(self) -> np.ndarray:
        """Recall [..., labels]; 0 for a label that does not occur."""
        return _ratio(self._hits, self._occurrences)

    @property
    def precision(self) -> np.ndarray:
        """Precision [..., labels]; 0 for a label that is never predicted."""
        return _ratio(self._hits, self._predictions)

    @property
    def f1(self) -> np.ndarray:
        """F1 [..., labels]: 2 TP / (occurrences + predictions); 0 for 0 / 0."""
        return _ratio(2 * self._hits, self._occurrences + self._predictions)

    def to_dict(self) -> dict[str, float]:
        """Return the scalar scores by their names in MLflow."""
        scores = {"loss": self.loss, "wa": self.wa, "ua": self.ua, "f1": self.macro_f1}
        return {name: float(score) for name, score in scores.items()}

    @property
    def _hits(self) -> np.ndarray:
        return np.diagonal(self.confusion, axis1=-2, axis2=-1)

    @property
    def _occurrences(self) -> np.ndarray:
        return self.confusion.sum(axis=-1)

    @property
    def _predictions(self) -> np.ndarray:
        return self.confusion.sum(axis=-2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratio = np.divide(part, whole, out=np.zeros(np.shape(whole)), where=whole > 0)
    return ratio[()]  # an array without dimensions becomes a number


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return _ratio((values * where).sum(axis=-1), where.sum(axis=-1))


def count_confusion(truth: np.ndarray, predicted: np.ndarray, num_labels: int) -> np.ndarray:
    """Count pairs of label indices into a confusion matrix [labels, labels]."""
    flat = np.asarray(truth, dtype=np.int64) * num_labels + np.asarray(predicted, dtype=np.int64)
    return np.bincount(flat, minlength=num_labels**2).reshape(num_labels, num_labels)


def log_losses(truth: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the negative log-likelihood of the true label of each clip, in nats [clips]."""
    return -np.log(np.maximum(probabilities[np.arange(len(truth)), truth], 1e-12))


def scores_of(truth: np.ndarray, probabilities: np.ndarray) -> Scores:
    """Score predictions.

    Args:
        truth: indices of the true labels [clips].
        probabilities: [clips, labels], whose rows sum to 1.
    """
    num_labels = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    loss = float(log_losses(truth, probabilities).mean()) if len(truth) else 0.0
    return Scores(count_confusion(truth, predicted, num_labels), loss)


def selected_epoch(rows: Sequence[Mapping[str, float]], keep: Keep) -> int:
    """Return the index of the selected epoch: the last one, or the best one by validation scores.

    Args:
        rows: metrics of each epoch; at least one epoch.
        keep: `TrainConfig.keep`.
    """
    if keep == "last":
        return len(rows) - 1
    return max(range(len(rows)), key=lambda epoch: validation_rank(rows[epoch]))


def selected_row(rows: Sequence[Mapping[str, float]], keep: Keep) -> Mapping[str, float]:
    """Return the metrics of the selected epoch; empty if there are no epochs."""
    return rows[selected_epoch(rows, keep)] if rows else {}


def validation_rank(row: Mapping[str, float]) -> tuple[float, float]:
    """Return a key that is highest for the best epoch: the validation UA, then negative loss."""
    return row["val/ua"], -row["val/loss"]


def selected_metrics(row: Mapping[str, float]) -> dict[str, float]:
    """Return the epoch and validation metrics of the selected epoch by their names in MLflow."""
    return {
        f"selected/{name.removeprefix('val/')}": value
        for name, value in row.items()
        if name == "epoch" or name.startswith("val/")
    }
