"""Intervals, calibration and paired comparisons, against other ways to compute them."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from ser_ray.evaluation import statistics


@pytest.mark.parametrize(("one", "other"), [(0, 0), (1, 0), (5, 5), (3, 14), (40, 22)])
def test_mcnemar_is_the_exact_binomial_test(one: int, other: int) -> None:
    total, fewer = one + other, min(one, other)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    truth = np.zeros(total + 10, dtype=int)
    first, second = truth.copy(), truth.copy()
    second[:one] = 1
    first[one:total] = 1
    speakers = [f"{clip % 3:02d}" for clip in range(len(truth))]
    found = statistics.compare(speakers, speakers, truth, first, second, 2)
    assert (found.only_first_right, found.only_second_right) == (one, other)
    assert found.mcnemar_p == pytest.approx(min(1, 2 * tail / 2**total))


def test_calibration_by_hand():
    """Ten clips at 0.95, of which eight are right, and ten at 0.55, of which five are."""
    probabilities = np.array([[0.95, 0.05]] * 10 + [[0.45, 0.55]] * 10)
    truth = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)
    found = statistics.calibration(truth, probabilities)
    assert found.count.tolist() == [0, 0, 0, 0, 0, 10, 0, 0, 0, 10]
    assert found.accuracy[[5, 9]].tolist() == [0.5, 0.8]
    assert np.isnan(found.accuracy[0])
    assert found.ece == pytest.approx((0.15 + 0.05) / 2)


def test_bootstrap_agrees_with_drawing_the_clips_themselves():
    """Complete speakers drawn one by one, scored by scikit-learn, give the same interval."""
    rng = np.random.default_rng(3)
    speakers = np.repeat([f"s{n}" for n in range(8)], 24)
    truth = np.tile([0, 1, 2], 64)
    skill = np.repeat(rng.uniform(0.2, 0.9, 8), 24)
    predicted = np.where(rng.random(192) < skill, truth, rng.integers(0, 3, 192))
    found = statistics.bootstrap(list(speakers), list(speakers), truth, predicted, 3)
    assert (found.drawn, found.count) == ("speakers", 8)
    drawn = []
    for _ in range(1000):
        rows = np.concatenate(
            [np.flatnonzero(speakers == name) for name in rng.choice(np.unique(speakers), 8)]
        )
        drawn.append(balanced_accuracy_score(truth[rows], predicted[rows]))
    np.testing.assert_allclose(found.ua, np.percentile(drawn, [2.5, 97.5]), atol=0.03)


def test_the_clips_of_a_single_speaker_are_drawn():
    truth = np.array([0, 1] * 20)
    clips = [str(number) for number in range(40)]
    found = statistics.bootstrap(["01"] * 40, clips, truth, truth, 2)
    assert (found.drawn, found.count) == ("clips", 40)
    assert found.ua == (1.0, 1.0)


def test_the_seeds_that_score_a_single_speaker_do_not_narrow_the_interval():
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 2, (2, 40))
    clips = [str(number) for number in range(40)]
    once = statistics.bootstrap(["01"] * 40, clips, truth, predicted, 2)
    twice = statistics.bootstrap(
        ["01"] * 80, clips * 2, np.tile(truth, 2), np.tile(predicted, 2), 2, np.repeat([0, 1], 40)
    )
    assert twice == once
    compared = statistics.compare(["01"] * 40, clips, truth, predicted, truth, 2)
    repeated = statistics.compare(
        ["01"] * 80, clips * 2, np.tile(truth, 2), np.tile(predicted, 2), np.tile(truth, 2), 2
    )
    assert repeated.ua_interval == compared.ua_interval
