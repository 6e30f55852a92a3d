import math

import pytest

from ser_ray.errors import ConfigError
from ser_ray.search.config import SlotConfig, TuneConfig
from ser_ray.search.space import (
    hyperparameters_of,
    parse_dimension,
    recipe_with,
    searchable_fields,
)
from ser_ray.training.recipe import TrainConfig


def test_the_default_space_contains_the_default_recipe():
    dimensions = TuneConfig().dimensions
    assert [item.name for item in dimensions] == ["lr_max", "lr_ratio", "feature"]
    values = hyperparameters_of(TrainConfig(), dimensions)
    assert all(item.contains(values[item.name]) for item in dimensions)
    assert recipe_with(TrainConfig(), values) == TrainConfig()


def test_the_lower_bound_of_a_drawn_recipe_is_always_below_the_upper():
    dimensions = {item.name: item for item in TuneConfig().dimensions}
    for lr_max in dimensions["lr_max"].values:
        for ratio in dimensions["lr_ratio"].values:
            recipe = recipe_with(TrainConfig(), {"lr_max": lr_max, "lr_ratio": ratio})
            assert recipe.lr_min == pytest.approx(lr_max / ratio)
            assert recipe.lr_min < recipe.lr_max


def test_a_line_of_the_same_name_replaces_the_default_and_others_are_added():
    config = TuneConfig(space=("feature = choice(mel)", "mixup=uniform(0,0.4)"))
    assert [item.name for item in config.dimensions] == ["lr_max", "lr_ratio", "feature", "mixup"]
    assert config.dimensions[2].values == ("mel",)
    assert recipe_with(TrainConfig(), {"mixup": 0.1}).augment.mixup == 0.1


@pytest.mark.parametrize(
    ("line", "grid"),
    [
        ("lr_max=loguniform(1e-4,1e-2)", (1e-4, 1e-3, 1e-2)),
        ("lr_max=loguniform(3e-4,7e-3)", (3e-4, 21e-7**0.5, 7e-3)),
        ("weight_decay=uniform(0,0.1)", (0, 0.05, 0.1)),
        ("batch_size=integer(8,64)", (8, 36, 64)),
        ("epochs=integer(4,5)", (4, 5)),
        ("balanced=choice(true,false)", (True, False)),
    ],
)
def test_the_grid_of_a_dimension(line, grid):
    dimension = parse_dimension(line)
    assert dimension.grid_values() == pytest.approx(grid)
    assert all(dimension.contains(value) for value in dimension.grid_values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning=choice(1)", "no field learning; known are balanced, "),
        ("lr_min=loguniform(1e-5,1e-4)", "draw lr_ratio"),
        ("fold=choice(0,1)", "fold cannot be searched"),
        ("keep=choice(last,best)", "keep cannot be searched"),
        (
            "label_map=choice(usual,common)",
            "label_map cannot be searched: all trials read",
        ),
        ("temperature=choice(true)", "temperature cannot be searched: it changes no score, and is"),
        ("lr_max", "must be name=distribution(...)"),
        ("lr_max=normal(0,1)", "no distribution normal; known are loguniform"),
        ("lr_max=loguniform(1e-2,1e-4)", "must be below the high value"),
        ("lr_max=loguniform(0,1e-4)", "must be above 0"),
        ("lr_max=loguniform(1e-4)", "needs a low and a high value"),
        ("lr_max=uniform(-1,1)", "lr_max is -1"),
        ("lr_max=uniform(low,1)", "'low' is not of type float"),
        ("lr_max=uniform(nan,1)", "'nan' is not of type float"),
        ("lr_ratio=uniform(0.5,2)", "must be above 1"),
        ("batch_size=uniform(8,64)", "use integer or choice"),
        ("weight_decay=integer(0,1)", "use loguniform, uniform or choice"),
        ("batch_size=choice(8,0)", "batch_size is 0: it must be above 0"),
        ("train_channel=choice(speech,opera)", "'opera' is not speech, song, all"),
        ("feature=uniform(1,2)", "uniform does not fit a field of type str: use choice"),
        ("label_smoothing=uniform(0,1)", "label_smoothing is 1.0: it must be below 1"),
        ("balanced=choice(yes)", "'yes' is not of type bool"),
    ],
)
def test_an_impossible_space_is_refused_when_it_is_read(line, message):
    with pytest.raises(ConfigError, match=r"space ") as error:
        TuneConfig(space=(line,))
    assert message in str(error.value)


@pytest.mark.parametrize("gpus", [0, -1, 1.5, math.nan])
def test_a_trial_has_a_share_of_a_gpu_or_a_whole_number(gpus):
    with pytest.raises(ConfigError, match="gpus_per_worker"):
        SlotConfig(gpus_per_worker=gpus)


def test_every_searchable_name_is_a_flag_of_the_recipe_or_the_ratio():
    assert {"lr_ratio", "weight_decay", "mixup", "weights", "seed"} <= set(searchable_fields())
    excluded = {"lr_min", "augment", "protocol", "fold", "validation_speakers", "channel"}
    assert not (excluded | {"keep"}) & set(searchable_fields())
