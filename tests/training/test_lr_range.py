"""The range test's proposal on loss curves with a known answer, and on a small training."""

import tracemalloc

import numpy as np
import pytest
import torch

from ser_ray.errors import ConfigError, DivergedError
from ser_ray.training.lr_range import has_diverged, propose_bounds, range_steps
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import LrRangeConfig, TrainConfig
from tests.conftest import PLAIN

RATES = np.geomspace(1e-6, 1.0, 300)


def test_the_bounds_are_where_the_loss_begins_and_ends_to_fall():
    # Flat, then falling from 1e-4 to 1e-2, straight on the logarithmic scale, flat, then rising.
    losses = np.interp(np.log10(RATES), [-6, -4, -2, -1, 0], [2.0, 2.0, 0.5, 0.5, 9.0])
    found = propose_bounds(RATES, losses)
    assert found.lr_min == pytest.approx(10**-3.8, rel=0.3)
    assert found.lr_max == pytest.approx(10**-2.2, rel=0.3)


def test_noise_changes_the_bounds_little():
    losses = np.interp(np.log10(RATES), [-6, -4, -2, -1, 0], [2.0, 2.0, 0.5, 0.5, 9.0])
    clean = propose_bounds(RATES, losses)
    noisy = propose_bounds(RATES, losses + np.random.default_rng(0).normal(0, 0.15, len(losses)))
    assert np.log10(noisy.lr_min / clean.lr_min) == pytest.approx(0, abs=0.5)
    assert np.log10(noisy.lr_max / clean.lr_max) == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize("losses", [np.linspace(1, 5, 300), np.ones(300), np.ones(0)])
def test_a_loss_that_never_falls_is_an_error(losses):
    with pytest.raises(DivergedError, match="did not fall"):
        propose_bounds(RATES[: len(losses)], losses)


def test_it_ends_when_the_loss_diverges_and_its_bounds_are_a_valid_recipe(
    memory_shards, small_network
):
    config = TrainConfig(
        protocol="speaker-3", batch_size=8, crop_frames=16, weights="none", augment=PLAIN
    )
    test = LrRangeConfig(lowest=1e-6, highest=100.0, steps=60)
    steps = range_steps(config, memory_shards, Pretrained("", {}), test, torch.device("cpu"))
    found = propose_bounds(*zip(*steps, strict=True))
    assert len(found.learning_rates) < 60
    assert found.learning_rates[0] == pytest.approx(1e-6)
    assert TrainConfig(lr_min=found.lr_min, lr_max=found.lr_max)
    assert 1e-6 < found.lr_min < found.lr_max < found.learning_rates[-1]


@pytest.mark.parametrize("first", [0.3, 2.0, 20.0])
def test_one_unusual_loss_in_the_first_step_does_not_decide_when_the_test_ends(first):
    falling = [first, *np.linspace(2.0, 0.5, 99)]
    assert not any(has_diverged(falling[: step + 1]) for step in range(len(falling)))
    assert has_diverged([*falling, *np.linspace(0.5, 9.0, 30)])


def test_the_memory_for_many_steps_grows_in_proportion_to_their_number():
    losses = np.linspace(2.0, 0.5, 3000).tolist()
    tracemalloc.start()
    try:
        assert not has_diverged(losses)
        assert tracemalloc.get_traced_memory()[1] < 200 * len(losses)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wrong", [{"lowest": 0.0}, {"lowest": 2.0}, {"steps": 3}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LrRangeConfig(**wrong)
