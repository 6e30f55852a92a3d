"""Intervals, calibration and paired comparisons of scores.

Clips of one speaker are similar, so the bootstrap draws complete speakers (the cluster bootstrap,
Field and Welsh 2007). `scipy.stats.bootstrap` does not fit: it draws single observations, and
computes one statistic per call. Here, each draw is a sum of the speakers' confusion counts, and all
scores are computed from the same draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ser_ray.training.metrics import Scores

NUM_DRAWS = 2000
"""Number of resamples of the bootstrap."""
NUM_BINS = 10
"""Number of equally wide bins of confidence in which calibration is measured."""

Interval = tuple[float, float]
"""95 % interval: the 2.5th and 97.5th percentile of the draws."""


@dataclass(frozen=True, slots=True)
class Intervals:
    """95 % intervals of the scores of one part."""

    drawn: str
    """What was resampled: `speakers`, or `clips` if there is only one speaker."""
    count: int
    """Number of speakers or clips. With few of them, the intervals are too narrow."""
    ua: Interval
    wa: Interval
    f1: Interval
    """Macro F1."""


def bootstrap(
    speakers: Sequence[str],
    clips: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    num_labels: int,
    seeds: np.ndarray | None = None,
) -> Intervals:
    """Compute intervals by bootstrap over speakers; equal arguments give equal intervals.

    Args:
        speakers: speaker in every row [rows].
        clips: name of the clip in every row [rows].
        truth: index of the true label in every row [rows].
        predicted: index of the predicted label in every row [rows].
        num_labels: number of labels.
        seeds: seed of the training that scored each row [rows], if several scored the same clips.
            A score is then the mean over the seeds, and the same speakers are drawn for all seeds.
    """
    counts, drawn = _counts(speakers, clips, truth, predicted, num_labels, seeds)
    scores = Scores(_resample(counts))  # each score is [draws, seeds]
    ua, wa, f1 = (_interval(s.mean(axis=1)) for s in (scores.ua, scores.wa, scores.macro_f1))
    return Intervals(drawn=drawn, count=len(counts), ua=ua, wa=wa, f1=f1)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence and accuracy in bins of confidence (Guo et al. 2017)."""

    confidence: np.ndarray
    """Mean probability of the predicted label in every bin [bins]; NaN in an empty bin."""
    accuracy: np.ndarray
    """Share of correct predictions in every bin [bins]; NaN in an empty bin."""
    count: np.ndarray
    """Number of clips in every bin [bins]."""

    @property
    def ece(self) -> float:
        """Expected calibration error: mean of |confidence - accuracy| over the clips."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((gaps * self.count).sum() / max(self.count.sum(), 1))


def calibration(truth: np.ndarray, probabilities: np.ndarray) -> Calibration:
    """Measure how well the confidence agrees with the accuracy.

    Args:
        truth: label indices [clips].
        probabilities: [clips, labels]; the sum of a row is 1.
    """
    confidence = probabilities.max(axis=1)
    is_right = probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    count = np.bincount(bins, minlength=NUM_BINS)
    with np.errstate(invalid="ignore"):
        return Calibration(
            np.bincount(bins, confidence, NUM_BINS) / count,
            np.bincount(bins, is_right, NUM_BINS) / count,
            count,
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A comparison of two models on the same clips. A difference is the first minus the second."""

    wa_difference: float
    only_first_right: int
    only_second_right: int
    mcnemar_p: float
    """p value of the exact McNemar test of equal WA. The test assumes independent clips, but the
    clips of one speaker are similar, so the value is too small."""
    ua_difference: float
    ua_interval: Interval
    """Interval of the UA difference. In each draw of the bootstrap, both models have the same
    speakers."""
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
            f"{self.only_second_right} that only the other gets right, "
            f"McNemar p = {self.mcnemar_p:.3g}"
        )


def compare(
    speakers: Sequence[str],
    clips: Sequence[str],
    truth: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    num_labels: int,
) -> Comparison:
    """Compare the predictions of two models for the same clips.

    Args:
        speakers: speaker in every row [rows].
        clips: name of the clip in every row [rows].
        truth: label indices [rows].
        first: label indices that the first model predicted [rows].
        second: label indices that the second model predicted [rows].
        num_labels: number of labels.
    """
    from scipy.stats import binomtest  # slow to import

    first_right, second_right = first == truth, second == truth
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    num_different = only_first + only_second
    first_counts, drawn = _counts(speakers, clips, truth, first, num_labels)
    second_counts, _ = _counts(speakers, clips, truth, second, num_labels)
    # `_resample` draws the same speakers in both calls.
    differences = Scores(_resample(first_counts)).ua - Scores(_resample(second_counts)).ua
    first_ua, second_ua = (Scores(c.sum(axis=(0, 1))).ua for c in (first_counts, second_counts))
    return Comparison(
        wa_difference=float(first_right.mean() - second_right.mean()),
        only_first_right=only_first,
        only_second_right=only_second,
        mcnemar_p=binomtest(only_first, num_different).pvalue if num_different else 1.0,
        ua_difference=float(first_ua - second_ua),
        ua_interval=_interval(differences[:, 0]),
        drawn=drawn,
        count=len(first_counts),
    )


def _counts(
    speakers: Sequence[str],
    clips: Sequence[str],
    truth: np.ndarray,
    predicted: np.ndarray,
    num_labels: int,
    seeds: np.ndarray | None = None,
) -> tuple[np.ndarray, str]:
    """Count the confusions of every speaker, or of every clip if there is only one speaker.

    Returns:
        Counts [units, seeds, labels, labels], where a unit is a speaker or clip, and the name of
        the units: `speakers` or `clips`.
    """
    names, units = np.unique(np.asarray(speakers), return_inverse=True)
    drawn = "speakers"
    if len(names) == 1:
        units, drawn = np.unique(np.asarray(clips), return_inverse=True)[1], "clips"
    runs = np.zeros(len(truth), int) if seeds is None else np.unique(seeds, return_inverse=True)[1]
    counts = np.zeros((units.max() + 1, runs.max() + 1, num_labels, num_labels), np.int64)
    np.add.at(counts, (units, runs, truth, predicted), 1)
    return counts, drawn


def _resample(counts: np.ndarray) -> np.ndarray:
    """Return the summed counts of `NUM_DRAWS` bootstrap samples of the units.

    Args:
        counts: [units, seeds, labels, labels].

    Returns:
        [draws, seeds, labels, labels].
    """
    rng = np.random.default_rng(0)
    times = rng.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=NUM_DRAWS)
    return np.tensordot(times, counts, axes=1)


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
