"""Which settings a recipe accepts, and that it can be written and read."""

from dataclasses import replace

import pytest

from ser_ray.errors import ConfigError
from ser_ray.training.recipe import AugmentConfig, TrainConfig


def test_an_empty_mapping_is_the_default_recipe():
    assert TrainConfig.from_dict({}) == TrainConfig()
    assert TrainConfig.from_dict({"augment": {}}) == TrainConfig()


def test_a_recipe_is_read_back_as_it_was_written():
    recipe = TrainConfig(fold=2, lr_max=1e-3, augment=AugmentConfig(mixup=0.3, echo=0.1))
    assert TrainConfig.from_dict(recipe.to_dict()) == recipe


def test_the_best_epoch_cannot_be_kept_without_validation_clips():
    with pytest.raises(ConfigError, match="all has no validation clips"):
        TrainConfig(protocol="all", keep="best")


def test_every_setting_changes_the_fingerprint():
    recipe = TrainConfig()
    assert replace(recipe, seed=1).fingerprint != recipe.fingerprint
    assert replace(recipe, augment=AugmentConfig(noise=0.1)).fingerprint != recipe.fingerprint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.1}, r"unknown training settings learning_rate; known are allow_seen_"),
        ({"augment": {"pitch": 1}}, r"unknown augmentation settings pitch; known are band_limit, "),
    ],
)
def test_an_unknown_setting_is_refused_and_the_known_ones_are_listed(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize("name", ["noise", "echo", "band_limit", "mix_style"])
def test_a_share_above_one_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is 1.5: it must be at most 1"):
        TrainConfig.from_dict({"augment": {name: 1.5}})
