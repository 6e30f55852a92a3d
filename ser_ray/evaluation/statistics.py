"""How uncertain scores on few speakers are: intervals, calibration and paired comparisons.

Clips of one speaker are alike, so the bootstrap resamples complete speakers (the cluster bootstrap,
Field and Welsh 2007). `scipy.stats.bootstrap` resamples single observations, one statistic a call;
here one set of draws of each speaker's counts serves all scores at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ser_ray.training.metrics import count_confusion

DRAWS = 2000
"""Resamples of the bootstrap."""
BINS = 10
"""Equal intervals of confidence over which calibration is measured."""

Interval = tuple[float, float]
"""95 % interval: the 2.5th and 97.5th percentile of the draws."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """Uncertainty of the scores of one test part."""

    drawn: str
    """What was resampled: `speakers`, or `clips` where there is only one speaker."""
    count: int
    """How many of them there are; with only a few, the intervals are too narrow."""
    ua: Interval
    wa: Interval
    f1: Interval
    """Macro F1."""
    recall: tuple[Interval | None, ...]
    """Of every label; None for one that does not occur."""


def bootstrap(
    speakers: Sequence[str], truth: np.ndarray, predicted: np.ndarray, num_labels: int
) -> Intervals:
    """Intervals of the scores by bootstrap over speakers; equal arguments give equal intervals.

    Args:
        speakers: of every clip [clips].
        truth: label indices [clips].
        predicted: label indices [clips].
    """
    counts, drawn = _counts(speakers, truth, predicted, num_labels)
    draws = _draw(counts)
    occurring = draws.sum(axis=2)
    hits = np.diagonal(draws, axis1=1, axis2=2)
    recall = _ratio(hits, occurring)
    f1 = _ratio(2 * hits, occurring + draws.sum(axis=1))
    seen = (occurring + draws.sum(axis=1)) > 0
    return Intervals(
        drawn=drawn,
        count=len(counts),
        ua=_interval(_mean_where(recall, occurring > 0)),
        wa=_interval(hits.sum(axis=1) / occurring.sum(axis=1)),
        f1=_interval(_mean_where(f1, seen)),
        recall=tuple(
            _interval(of_label[occurs]) if occurs.any() else None
            for of_label, occurs in zip(recall.T, occurring.T > 0, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against accuracy (Guo et al. 2017)."""

    confidence: np.ndarray
    """Mean probability of the predicted label in every bin [bins]; NaN in an empty one."""
    accuracy: np.ndarray
    """Share predicted right in every bin [bins]; NaN in an empty one."""
    count: np.ndarray
    """Clips in every bin [bins]."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance between the two over the clips, a share."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.count).sum() / max(self.count.sum(), 1))


def calibration(truth: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """Measure how far the confidence agrees with the accuracy.

    Args:
        truth: label indices [clips].
        probabilities: [clips, labels], rows summing to 1.
    """
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == truth
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    count = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Calibration(
            np.bincount(places, confidence, BINS) / count,
            np.bincount(places, right, BINS) / count,
            count,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on the same clips; differences are first minus second."""

    wa_difference: float
    only_first_right: int
    only_second_right: int
    mcnemar_p: float
    """Exact McNemar test of equal WA. It treats clips as independent, so p is too small."""
    ua_difference: float
    ua_interval: Interval
    """Interval of the UA difference, by bootstrap over speakers, the same draws for both models."""
    drawn: str
    """What was resampled: `speakers`, or `clips` where there is only one speaker."""
    count: int
    """How many of them there are."""

    def __str__(self) -> str:
        low, high = self.ua_interval
        return (
            f"UA {self.ua_difference:+.1%} (95 % interval {low:+.1%} to {high:+.1%} by bootstrap "
            f"over {self.count} {self.drawn}), WA {self.wa_difference:+.1%}: "
            f"{self.only_first_right} clips that only this model gets right, "
            f"{self.only_second_right} that only the other does, McNemar p = {self.mcnemar_p:.3g}"
        )


def compare(
    speakers: Sequence[str],
    truth: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    num_labels: int,
) -> Comparison:
    """Compare two models' predictions of the same clips.

    Args:
        speakers: of every clip [clips].
        truth: label indices [clips].
        first: label indices that the first model predicted [clips].
        second: label indices that the second model predicted [clips].
    """
    from scipy.stats import binomtest  # slow to import, and only comparisons need it

    first_right, second_right = first == truth, second == truth
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    differing = only_first + only_second
    ones, drawn = _counts(speakers, truth, first, num_labels)
    others, _ = _counts(speakers, truth, second, num_labels)
    differences = _ua(_draw(ones)) - _ua(_draw(others))  # equal seeds draw the same speakers
    return Comparison(
        wa_difference=float(first_right.mean() - second_right.mean()),
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p=binomtest(only_first, differing).pvalue if differing else 1.0,
        ua_difference=float((_ua(ones.sum(axis=0)[None]) - _ua(others.sum(axis=0)[None]))[0]),
        ua_interval=_interval(differences),
        drawn=drawn,
        count=len(ones),
    )


def _counts(
    speakers: Sequence[str], truth: np.ndarray, predicted: np.ndarray, num_labels: int
) -> tuple[np.ndarray, str]:
    """Count confusions of every speaker, or of every clip [units, labels, labels]; say which."""
    names, owners = np.unique(np.asarray(speakers), return_inverse=True)
    drawn = "speakers"
    if len(names) == 1:
        owners, drawn = np.arange(len(truth)), "clips"
    units = range(int(owners.max()) + 1)
    return np.stack(
        [count_confusion(truth[owners == u], predicted[owners == u], num_labels) for u in units]
    ), drawn


def _draw(counts: np.ndarray) -> np.ndarray:
    """Draw as many units as there are, with replacement; sum their counts per draw.

    Args:
        counts: [units, labels, labels].

    Returns:
        [draws, labels, labels].
    """
    rng = np.random.default_rng(0)
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
    return np.tensordot(times, counts, axes=1)


def _ua(counts: np.ndarray) -> np.ndarray:
    """Mean recall over the labels that occur [draws], of counts [draws, labels, labels]."""
    occurring = counts.sum(axis=2)
    recall = _ratio(np.diagonal(counts, axis1=1, axis2=2), occurring)
    return _mean_where(recall, occurring > 0)


def _ratio(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    return np.divide(part, total, out=np.zeros(part.shape), where=total > 0)


def _mean_where(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return (values * where).sum(axis=1) / np.maximum(where.sum(axis=1), 1)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
