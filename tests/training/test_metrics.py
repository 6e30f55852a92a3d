"""Scores against scikit-learn's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss

from ser_ray.training.metrics import Scores, count_confusion, scores_of

pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60)


@given(pairs)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_scores_equal_scikit_learn(pairs):
    truth, predicted = np.array(pairs).T
    scores = Scores(count_confusion(truth, predicted, 5), 0.0)
    assert scores.wa == pytest.approx((truth == predicted).mean())
    assert scores.ua == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert scores.macro_f1 == pytest.approx(f1_score(truth, predicted, average="macro"))
    assert scores.num_clips == len(pairs)


@given(pairs, st.integers(1, 4))
def test_confusion_counts_of_subsets_sum_to_those_of_the_full_set(pairs, parts):
    truth, predicted = np.array(pairs).T
    whole = count_confusion(truth, predicted, 5)
    split = sum(count_confusion(truth[r::parts], predicted[r::parts], 5) for r in range(parts))
    assert (whole == split).all()


def test_loss_is_the_mean_negative_log_likelihood():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(4), 50)
    truth = rng.integers(0, 4, 50)
    expected = log_loss(truth, probabilities, labels=range(4))
    assert scores_of(truth, probabilities).loss == pytest.approx(expected)
