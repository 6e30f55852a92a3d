"""Intervals, calibration and paired comparisons of scores.

Clips of one speaker are alike, so the bootstrap resamples complete speakers (the cluster bootstrap,
Field and Welsh 2007). `scipy.stats.bootstrap` resamples single observations and computes one
statistic per call. Here, a draw sums the confusion counts of whole speakers, and all scores are
computed from the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ser_ray.training.metrics import macro_f1_of, ua_of, wa_of

DRAWS = 2000
"""Resamples of the bootstrap."""
BINS = 10
"""Equal intervals of confidence over which calibration is measured."""

Interval = tuple[float, float]
"""95 % interval: the 2.5th and 97.5th percentile of the draws."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """95 % intervals of the scores of one part."""

    drawn: str
    """What was resampled: `speakers`, or `clips` if there is only one speaker."""
    count: int
    """Number of speakers or clips; with only a few, the intervals are too narrow."""
    ua: Interval
    wa: Interval
    f1: Interval
    """Macro F1."""


def bootstrap(
    speakers: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    num_labels: int,
    seeds: np.ndarray | None = None,
) -> Intervals:
    """Compute intervals by bootstrap over speakers; equal arguments give equal intervals.

    Args:
        speakers: speaker of every clip [clips].
        truth: label indices [clips].
        predicted: label indices [clips].
        num_labels: number of labels.
        seeds: seed of every clip [clips], if several trainings scored the same clips. A score is
            then the mean over the seeds, and all seeds have the same draws of speakers.
    """
    counts, drawn = _counts(speakers, truth, predicted, num_labels, seeds)
    draws = _draw(counts)  # [draws, seeds, labels, labels]
    ua, wa, f1 = (_interval(score(draws).mean(axis=1)) for score in (ua_of, wa_of, macro_f1_of))
    return Intervals(drawn=drawn, count=len(counts), ua=ua, wa=wa, f1=f1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against accuracy (Guo et al. 2017)."""

    confidence: np.ndarray
    """Mean probability of the predicted label in every bin [bins]; NaN in an empty one."""
    accuracy: np.ndarray
    """Share of correct predictions in every bin [bins]; NaN in an empty one."""
    count: np.ndarray
    """Clips in every bin [bins]."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over the clips."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.count).sum() / max(self.count.sum(), 1))


def calibration(truth: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """Measure how well the confidence agrees with the accuracy.

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
    """Two models scored on the same clips; differences are first minus second."""

    wa_difference: float
    only_first_right: int
    only_second_right: int
    mcnemar_p: float
    """Exact McNemar test of equal WA. It treats clips as independent, so p is too small."""
    ua_difference: float
    ua_interval: Interval
    """Interval of the UA difference by bootstrap over speakers. Both models have the same draws."""
    drawn: str
    """What was resampled: `speakers`, or `clips` if there is only one speaker."""
    count: int
    """Number of speakers or clips."""

    def __repr__(self) -> str:
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
        speakers: speaker of every clip [clips].
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
    differences = ua_of(_draw(ones)) - ua_of(_draw(others))  # the same draws of speakers
    return Comparison(
        wa_difference=float(first_right.mean() - second_right.mean()),
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p=binomtest(only_first, differing).pvalue if differing else 1.0,
        ua_difference=float(ua_of(ones.sum(axis=(0, 1))) - ua_of(others.sum(axis=(0, 1)))),
        ua_interval=_interval(differences[:, 0]),
        drawn=drawn,
        count=len(ones),
    )


def _counts(
    speakers: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    num_labels: int,
    seeds: np.ndarray | None = None,
) -> tuple[np.ndarray, str]:
    """Count the confusions of every speaker, or of every clip if there is only one speaker.

    Returns:
        Counts [units, seeds, labels, labels], and the plural noun for the units.
    """
    names, owners = np.unique(np.asarray(speakers), return_inverse=True)
    drawn = "speakers"
    if len(names) == 1:
        owners, drawn = np.arange(len(truth)), "clips"
    runs = np.zeros(len(truth), int) if seeds is None else np.unique(seeds, return_inverse=True)[1]
    counts = np.zeros((owners.max() + 1, runs.max() + 1, num_labels, num_labels), np.int64)
    np.add.at(counts, (owners, runs, truth, predicted), 1)
    return counts, drawn


def _draw(counts: np.ndarray) -> np.ndarray:
    """Draw all units again with replacement, DRAWS times, and sum the counts of each draw.

    Args:
        counts: [units, seeds, labels, labels].

    Returns:
        [draws, seeds, labels, labels].
    """
    rng = np.random.default_rng(0)
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=DRAWS)
    return np.tensordot(times, counts, axes=1)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
