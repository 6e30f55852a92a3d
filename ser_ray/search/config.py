"""Settings of searches and cross-validations. `--help` imports this module, so it imports no slow
library."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ser_ray.errors import ConfigError
from ser_ray.features.config import Condition, require_range
from ser_ray.search.space import DEFAULT_SPACE, Dimension, parse_dimension


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings of a search: its space, searcher and scheduler."""

    trials: int = 32
    """Number of trials. A grid search ignores this number: it has one trial for each point of the
    grid, and one for the given recipe if the space contains this recipe but the grid does not."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """Optuna's TPE, random draws, or a grid of all choices and, for each range, both ends and the
    middle."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops the worse trials early by their validation UA (Li 2018); none trains all trials to
    the end."""
    grace_epochs: int = 4
    """ASHA: number of epochs that a trial completes before it can be stopped."""
    reduction: int = 3
    """ASHA's reduction factor. With 3, a third of the trials continues at each rung, and each rung
    has three times as many epochs as the previous rung."""
    space: tuple[str, ...] = ()
    """Further fields of the recipe to search, or other distributions for the default fields, as in
    weight_decay=loguniform(1e-4,1e-1) or feature=choice(mel). lr_min is lr_max / lr_ratio."""
    refit: bool = False
    """Train the best recipe afterwards, as ser-ray train does."""

    def __post_init__(self) -> None:
        require_range(self, "trials", "grace_epochs", low=1)
        require_range(self, "reduction", low=2)
        _ = self.dimensions  # raises ConfigError if the space is wrong

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The dimensions of the space: the default ones, then those that `space` adds.

        Raises:
            ConfigError: a line of `space` is wrong (`parse_dimension`).
        """
        lines = {line.partition("=")[0].strip(): line for line in (*DEFAULT_SPACE, *self.space)}
        return tuple(parse_dimension(line) for line in lines.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify a search. `refit` is left out because it changes no trial."""
        space = {item.name: str(item) for item in self.dimensions}
        settings = dataclasses.asdict(self) | {"space": space}
        del settings["refit"]
        return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossvalConfig:
    """Settings of a cross-validation: its folds, its seeds, and the part to score."""

    seeds: int = 1
    """Number of trainings of each fold. Their seeds are the recipe's seed, this seed plus 1, and so
    on."""
    folds: tuple[int, ...] = ()
    """Folds to train. By default, all folds of the protocol."""
    part: Literal["test", "validation"] = "test"
    """Part of each fold to score. Score the validation parts to choose between recipes, without
    reading any test part. Then score the test parts once, with the final recipe: networks that were
    trained for the validation parts are not trained again."""
    under: tuple[Condition, ...] = ()
    """Also score the clips under simulated recording conditions: noise, a phone, a codec, the echo
    of a room, or a different loudness. The clips' files are decoded again."""

    def __post_init__(self) -> None:
        require_range(self, "seeds", low=1)
        if len(set(self.folds)) < len(self.folds):
            raise ConfigError(f"folds are {self.folds}: give each fold only once")
        object.__setattr__(self, "folds", tuple(sorted(self.folds)))  # their order has no meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotConfig:
    """CPUs and GPUs of each trial. As many trials run at the same time as fit on the cluster."""

    cpus_per_worker: int = 1
    """CPUs of a trial."""
    gpus_per_worker: float = 0.25
    """GPUs of a trial, if trials run on GPUs: a share of a GPU, or a whole number."""

    def __post_init__(self) -> None:
        require_range(self, "cpus_per_worker", low=1)
        gpus = self.gpus_per_worker
        if not (0 < gpus <= 1 or (gpus > 1 and gpus % 1 == 0)):
            raise ConfigError(
                f"gpus_per_worker is {gpus:g}: it must be above 0 and at most 1, or a whole number"
            )
