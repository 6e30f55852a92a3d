"""Temperature scaling, compared with scipy's optimiser."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import log_loss

from ser_ray.training.calibration import MAX_TEMPERATURE, apply_temperature, fit_temperature


def clips(sharpness: float) -> tuple[np.ndarray, np.ndarray]:
    """Labels drawn from a softmax, and the probabilities of logits that are wrong by a factor."""
    rng = np.random.default_rng(7)
    logits = rng.normal(0, 2, (4_000, 5))
    chances = softmax(logits, axis=1)
    truth = np.array([rng.choice(5, p=row) for row in chances])
    return truth, softmax(sharpness * logits, axis=1)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_fitted_temperature_is_that_of_the_smallest_loss(sharpness: float) -> None:
    truth, probabilities = clips(sharpness)
    found = fit_temperature(truth, probabilities)
    best = minimize_scalar(
        lambda t: log_loss(truth, softmax(np.log(probabilities) / t, axis=1)), bounds=(0.25, 4)
    )
    assert found == pytest.approx(best.x, rel=1e-3)
    assert found == pytest.approx(sharpness, rel=0.1), "it undoes the factor"


def test_scaling_keeps_the_order_and_is_undone_by_the_reciprocal() -> None:
    _, probabilities = clips(1.0)
    scaled = apply_temperature(probabilities, 1.7)
    np.testing.assert_allclose(scaled.sum(axis=1), 1)
    np.testing.assert_array_equal(scaled.argsort(axis=1), probabilities.argsort(axis=1))
    assert scaled.max(axis=1).mean() < probabilities.max(axis=1).mean()
    np.testing.assert_allclose(apply_temperature(scaled, 1 / 1.7), probabilities, atol=1e-12)
    assert apply_temperature(probabilities, 1.0) is probabilities


def test_few_clips_that_are_all_right_do_not_make_a_model_certain() -> None:
    right = np.full((6, 4), 0.1) + 0.6 * np.eye(4)[[0, 1, 2, 3, 0, 1]]
    assert fit_temperature(np.array([0, 1, 2, 3, 0, 1]), right) == pytest.approx(
        1 / MAX_TEMPERATURE
    )
    assert fit_temperature(np.zeros(0, int), np.zeros((0, 4))) == 1.0
    certain = np.eye(4)[[0, 1, 2, 3, 0, 1]]
    assert (
        1 / MAX_TEMPERATURE
        <= fit_temperature(np.array([1, 1, 2, 3, 0, 1]), certain)
        <= MAX_TEMPERATURE
    )
