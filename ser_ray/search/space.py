"""The space of a search: the fields of the recipe that are searched, and their possible values.

Each line of a space is `name=distribution(...)`: the name is a field of the recipe, and the
distribution is `loguniform`, `uniform`, `integer` or `choice`. Instead of `lr_min`, a search draws
`lr_ratio`, which is `lr_max / lr_min`, so that `lr_min` is always below `lr_max`.
"""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints

from ser_ray.errors import ConfigError
from ser_ray.features.config import KINDS
from ser_ray.training.recipe import AugmentConfig, TrainConfig

DEFAULT_SPACE = (
    "lr_max=loguniform(3e-4,1e-2)",
    "lr_ratio=loguniform(2,100)",
    f"feature=choice({','.join(KINDS)})",
)
"""The default space. `--space` adds lines, or replaces the lines with the same name."""
LR_RATIO = "lr_ratio"

_NOT_SEARCHABLE = {
    "lr_min": "draw lr_ratio instead, which is lr_max / lr_min",
    "protocol": "trials of different folds cannot be compared",
    "fold": "trials of different folds cannot be compared",
    "validation_speakers": "trials validated on different clips cannot be compared",
    "channel": "trials validated on different clips cannot be compared",
    "keep": "by luck, the best of many epochs nearly always has a higher score than the last one",
    "label_map": "all trials read the clips with the label map of the recipe",
    "temperature": "it changes no score, and is fitted on validation clips after the training",
    "allow_seen_labels": "it only decides whether the training is allowed",
}
_DISTRIBUTIONS = "loguniform(low,high), uniform(low,high), integer(low,high), choice(a,b,...)"


@dataclass(frozen=True, slots=True)
class Dimension:
    """A hyperparameter and its possible values."""

    name: str
    distribution: Literal["loguniform", "uniform", "integer", "choice"]
    values: tuple[Any, ...]
    """All choices; or the lowest and the highest value of a range, which can both be drawn."""

    def grid_values(self) -> tuple[Any, ...]:
        """Return the values that a grid search tries; for a range, both ends and the middle."""
        if self.distribution == "choice":
            return self.values
        low, high = self.values
        match self.distribution:
            case "loguniform":
                middle = math.sqrt(low * high)
            case "uniform":
                middle = (low + high) / 2
            case "integer":
                middle = round((low + high) / 2)
        return tuple(dict.fromkeys((low, middle, high)))

    def __str__(self) -> str:
        """Return the distribution as text, for example `loguniform(0.001, 0.1)`."""
        return f"{self.distribution}({', '.join(map(str, self.values))})"

    def contains(self, value: Any) -> bool:
        """Return whether a value can be drawn."""
        if self.distribution == "choice":
            return value in self.values
        low, high = self.values
        return bool(low <= value <= high)


def searchable_fields() -> dict[str, Any]:
    """Return the names that a space may contain, with their types."""
    types = get_type_hints(TrainConfig) | get_type_hints(AugmentConfig) | {LR_RATIO: float}
    left_out = {"augment", *_NOT_SEARCHABLE}
    return {name: field_type for name, field_type in types.items() if name not in left_out}


def parse_dimension(line: str) -> Dimension:
    """Parse `name=distribution(...)`.

    Raises:
        ConfigError: the name or the distribution is unknown, or the field cannot have the values.
    """
    try:
        dimension = _parse(line)
        _check_values(dimension)
    except ConfigError as error:
        raise ConfigError(f"space {line!r}: {error}") from None
    return dimension


def recipe_with(base: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Return a copy of a recipe in which the fields in `values` are replaced.

    Raises:
        ConfigError: a field cannot have its value.
    """
    changes = dict(values)
    if LR_RATIO in changes:
        changes["lr_min"] = changes.get("lr_max", base.lr_max) / changes.pop(LR_RATIO)
    nested = {item.name for item in dataclasses.fields(AugmentConfig)} & set(changes)
    augment = dataclasses.replace(base.augment, **{name: changes.pop(name) for name in nested})
    return dataclasses.replace(base, **changes, augment=augment)


def hyperparameters_of(recipe: TrainConfig, dimensions: tuple[Dimension, ...]) -> dict[str, Any]:
    """Return the recipe's value for each dimension, by name."""
    flat = recipe.to_dict() | dataclasses.asdict(recipe.augment)
    flat[LR_RATIO] = recipe.lr_max / recipe.lr_min
    return {dimension.name: flat[dimension.name] for dimension in dimensions}


def _parse(line: str) -> Dimension:
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(\w+)\s*\((.*)\)\s*", line)
    if match is None:
        raise ConfigError(f"it must be name=distribution(...) with {_DISTRIBUTIONS}")
    name, distribution, inside = match.groups()
    known = searchable_fields()
    if name in _NOT_SEARCHABLE:
        raise ConfigError(f"{name} cannot be searched: {_NOT_SEARCHABLE[name]}")
    if name not in known:
        raise ConfigError(f"no field {name}; known are {', '.join(sorted(known))}")
    values = tuple(_parse_value(text.strip(), known[name]) for text in inside.split(","))
    match distribution:
        case "choice":
            pass
        case "loguniform" | "uniform" | "integer":
            _check_range(distribution, values, known[name])
        case _:
            raise ConfigError(f"no distribution {distribution}; known are {_DISTRIBUTIONS}")
    return Dimension(name, distribution, values)


def _parse_value(text: str, field_type: Any) -> Any:
    """Convert the text of one value to the type of its field."""
    choices = get_args(field_type)
    try:
        if field_type is bool:
            return {"true": True, "false": False}[text.lower()]
        if field_type in (int, float):
            value = field_type(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        if choices and text not in choices:
            raise ValueError
    except (ValueError, KeyError):
        allowed = ", ".join(choices) if choices else f"of type {field_type.__name__}"
        raise ConfigError(f"{text!r} is not {allowed}") from None
    return text


def _check_range(distribution: str, values: tuple[Any, ...], field_type: Any) -> None:
    if len(values) != 2:
        raise ConfigError(f"{distribution} needs a low and a high value")
    if field_type not in (int, float) or (field_type is int) != (distribution == "integer"):
        usable = {int: "integer or choice", float: "loguniform, uniform or choice"}
        raise ConfigError(
            f"{distribution} does not fit a field of type {field_type.__name__}: use "
            f"{usable.get(field_type, 'choice')}"
        )
    low, high = values
    if low >= high:
        raise ConfigError(f"the low value {low:g} must be below the high value {high:g}")
    if distribution == "loguniform" and low <= 0:
        raise ConfigError(f"the low value is {low:g}, but it must be above 0")


def _check_values(dimension: Dimension) -> None:
    """Check that a recipe can have the values. Between two valid ends, all values are valid."""
    if dimension.name == LR_RATIO and min(dimension.values) <= 1:
        raise ConfigError("lr_max / lr_min must be above 1")
    for value in dimension.values:
        base = TrainConfig()
        if dimension.name == "lr_max" and value > 0:  # the value may be below the default lr_min
            base = dataclasses.replace(base, lr_min=value / 2, lr_max=value)
        recipe_with(base, {dimension.name: value})
