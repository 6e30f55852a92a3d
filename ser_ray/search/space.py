"""The space of a search: which fields of the recipe are searched, and their possible values.

A search space is a few lines of `name=distribution(...)`: each name is a field of the recipe, and
its distribution is `loguniform`, `uniform`, `integer` or `choice`. The lower bound of the learning
rate is drawn as a ratio, `lr_min = lr_max / lr_ratio`, so it is always below the upper bound.
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
"""The default space. `--space` adds names, or replaces the distributions of these names."""
RATIO = "lr_ratio"
"""The space holds lr_max / lr_min instead of lr_min."""

_NOT_SEARCHED = {
    "lr_min": "draw lr_ratio instead, which is lr_max / lr_min",
    "protocol": "trials of different folds cannot be compared",
    "fold": "trials of different folds cannot be compared",
    "validation_speakers": "trials validated on different clips cannot be compared",
    "channel": "trials validated on different clips cannot be compared",
    "keep": "the best of many epochs nearly always validates better than the last one, by luck",
    "allow_seen_labels": "it only decides whether the training is allowed",
}
_DISTRIBUTIONS = "loguniform(low,high), uniform(low,high), integer(low,high), choice(a,b,...)"


@dataclass(frozen=True, slots=True)
class Dimension:
    """A searched name and its possible values."""

    name: str
    kind: Literal["loguniform", "uniform", "integer", "choice"]
    values: tuple[Any, ...]
    """Lowest and highest value, both included, or the choices."""

    def grid(self) -> tuple[Any, ...]:
        """The values that a grid search tries; for a range, both ends and the middle."""
        if self.kind == "choice":
            return self.values
        low, high = self.values
        middle = math.sqrt(low * high) if self.kind == "loguniform" else (low + high) / 2
        points = (low, round(middle) if self.kind == "integer" else middle, high)
        return tuple(dict.fromkeys(points))

    def __str__(self) -> str:
        """The distribution as a space has it, for example `loguniform(0.001, 0.1)`."""
        return f"{self.kind}({', '.join(map(str, self.values))})"

    def holds(self, value: Any) -> bool:
        """Whether a value can be drawn."""
        if self.kind == "choice":
            return value in self.values
        return bool(self.values[0] <= value <= self.values[1])


def searchable() -> dict[str, Any]:
    """Names that a space may contain, each with its type: the recipe's fields and `lr_ratio`."""
    types = get_type_hints(TrainConfig) | get_type_hints(AugmentConfig) | {RATIO: float}
    return {name: kind for name, kind in types.items() if name not in ("augment", *_NOT_SEARCHED)}


def parse_dimension(line: str) -> Dimension:
    """Parse `name=distribution(...)`.

    Raises:
        ConfigError: the name or the distribution is unknown, or the field cannot have the values.
    """
    match = re.fullmatch(r"\s*(\w+)\s*=\s*(\w+)\s*\((.*)\)\s*", line)
    if match is None:
        raise ConfigError(
            f"space {line!r}: it must be name=distribution(...) with {_DISTRIBUTIONS}"
        )
    name, kind, inside = match.groups()
    known = searchable()
    if name in _NOT_SEARCHED:
        raise ConfigError(f"space {line!r}: {name} cannot be searched: {_NOT_SEARCHED[name]}")
    if name not in known:
        raise ConfigError(f"space {line!r}: no field {name}; known are {', '.join(sorted(known))}")
    values = tuple(_value(text.strip(), known[name], line) for text in inside.split(","))
    match kind:
        case "choice":
            pass
        case "loguniform" | "uniform" | "integer":
            _check_range(kind, values, known[name], line)
        case _:
            raise ConfigError(f"space {line!r}: no distribution {kind}; known are {_DISTRIBUTIONS}")
    dimension = Dimension(name, kind, values)
    _check_field(dimension, line)
    return dimension


def recipe_of(base: TrainConfig, drawn: dict[str, Any]) -> TrainConfig:
    """Put drawn values into a recipe.

    Raises:
        ConfigError: a field cannot have its value.
    """
    values = dict(drawn)
    if RATIO in values:
        values["lr_min"] = values.get("lr_max", base.lr_max) / values.pop(RATIO)
    nested = {item.name for item in dataclasses.fields(AugmentConfig)} & set(values)
    if nested:
        changes = {name: values.pop(name) for name in nested}
        values["augment"] = dataclasses.replace(base.augment, **changes)
    return dataclasses.replace(base, **values)


def values_of(recipe: TrainConfig, dimensions: tuple[Dimension, ...]) -> dict[str, Any]:
    """Return the recipe's values of the searched names."""
    flat = recipe.to_dict() | dataclasses.asdict(recipe.augment)
    flat[RATIO] = recipe.lr_max / recipe.lr_min
    return {dimension.name: flat[dimension.name] for dimension in dimensions}


def _value(text: str, kind: Any, line: str) -> Any:
    """Convert a value of a distribution to the field's type."""
    choices = get_args(kind)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind in (int, float):
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        if choices and text not in choices:
            raise ValueError
    except (ValueError, KeyError):
        allowed = ", ".join(choices) if choices else f"of type {kind.__name__}"
        raise ConfigError(f"space {line!r}: {text!r} is not {allowed}") from None
    return text


def _check_range(kind: str, values: tuple[Any, ...], field_type: Any, line: str) -> None:
    if len(values) != 2:
        raise ConfigError(f"space {line!r}: {kind} takes a low and a high value")
    if field_type not in (int, float) or (field_type is int) != (kind == "integer"):
        wanted = {int: "integer or choice", float: "loguniform, uniform or choice"}
        raise ConfigError(
            f"space {line!r}: {kind} does not fit a field of type "
            f"{getattr(field_type, '__name__', 'name')}: use {wanted.get(field_type, 'choice')}"
        )
    low, high = values
    if low >= high:
        raise ConfigError(
            f"space {line!r}: the low value {low:g} must be below the high value {high:g}"
        )
    if kind == "loguniform" and low <= 0:
        raise ConfigError(f"space {line!r}: the low value is {low:g}: it must be above 0")


def _check_field(dimension: Dimension, line: str) -> None:
    """Check that a recipe can have the values. Values between valid ends of a range are valid."""
    if dimension.name == RATIO and min(dimension.values) <= 1:
        raise ConfigError(f"space {line!r}: lr_max / lr_min must be above 1")
    for value in dimension.values:
        base = TrainConfig()
        if dimension.name == "lr_max":
            base = dataclasses.replace(base, lr_min=abs(value) / 2 or 1.0, lr_max=abs(value) or 2.0)
        try:
            recipe_of(base, {dimension.name: value})
        except ConfigError as error:
            raise ConfigError(f"space {line!r}: {error}") from None
