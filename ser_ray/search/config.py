"""Settings of searches and cross-validations. Importing this is cheap, so `--help` is quick."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ser_ray.errors import ConfigError
from ser_ray.features.config import Condition
from ser_ray.search.space import DEFAULT_SPACE, Dimension, parse_dimension


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Settings of a search: the space, the searcher, and the scheduler."""

    trials: int = 32
    """Number of trials. A grid search ignores this: it has one trial for each point."""
    searcher: Literal["optuna", "random", "grid"] = "optuna"
    """Optuna's TPE, random draws, or a grid of both ends and the middle of every range."""
    scheduler: Literal["asha", "none"] = "asha"
    """Stop the worse trials early by their validation UA (Li 2018), or train all to the end."""
    grace_epochs: int = 4
    """ASHA: epochs that every trial completes."""
    reduction: int = 3
    """ASHA: one in this many trials continues at each rung, and the epochs between rungs grow by
    this factor."""
    space: tuple[str, ...] = ()
    """Further fields of the recipe to search, or other distributions than the defaults, for example
    weight_decay=loguniform(1e-4,1e-1) or feature=choice(mel). lr_min is lr_max / lr_ratio."""
    refit: bool = False
    """Train the best recipe afterwards, as ser-ray train does."""

    def __post_init__(self) -> None:
        for name, least in (("trials", 1), ("grace_epochs", 1), ("reduction", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        _ = self.dimensions

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The search space, in a fixed order.

        Raises:
            ConfigError: an unknown field or distribution, or bounds in the wrong order.
        """
        lines = {line.partition("=")[0].strip(): line for line in (*DEFAULT_SPACE, *self.space)}
        return tuple(parse_dimension(line) for line in lines.values())

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that identify a search. `refit` changes no trial, so it is left out."""
        space = {item.name: str(item) for item in self.dimensions}
        settings = dataclasses.asdict(self) | {"space": space}
        del settings["refit"]
        return settings


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossvalConfig:
    """Settings of a cross-validation: folds, seeds, and the part to score."""

    seeds: int = 1
    """Number of trainings of each fold. The first has the recipe's seed, the next this seed plus 1,
    and so on."""
    folds: tuple[int, ...] = ()
    """Folds to train; all folds of the protocol if empty."""
    part: Literal["test", "validation"] = "test"
    """Part of each fold to score: test, once and with the final recipe, or validation, to choose
    between recipes without reading any test part."""
    under: tuple[Condition, ...] = ()
    """Also score the clips under other recording conditions: noise, a phone, a codec, the echo of a
    room, or another level. Their files are decoded again."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}: it must be at least 1")
        if len(set(self.folds)) < len(self.folds):
            raise ConfigError(f"folds are {self.folds}: each must be given only once")
        object.__setattr__(self, "folds", tuple(sorted(self.folds)))  # their order has no meaning


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotConfig:
    """CPUs and GPUs of each trial."""

    cpus_per_worker: int = 1
    """CPUs of a trial."""
    gpus_per_worker: float = 0.25
    """GPUs of a trial, if trials run on GPUs: a share of a GPU, or a whole number."""

    def __post_init__(self) -> None:
        if self.cpus_per_worker < 1:
            raise ConfigError(f"cpus_per_worker is {self.cpus_per_worker}: it must be at least 1")
        gpus = self.gpus_per_worker
        if not gpus > 0 or (gpus > 1 and gpus != int(gpus)):
            raise ConfigError(
                f"gpus_per_worker is {gpus:g}: it must be a share above 0 and up to 1, or a whole "
                "number"
            )
