"""What is known of one trial of a search or cross-validation."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from ser_ray.errors import SerRayError
from ser_ray.search.space import recipe_of
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_row, validation_rank

State = Literal["waiting", "running", "finished", "pruned", "failed"]


@dataclass(slots=True)
class TrialRecord:
    """What is known of one trial."""

    trial_id: str
    number: int
    """In the order in which the trials were drawn, from 1."""
    values: dict[str, Any]
    """What was drawn for it."""
    recipe: TrainConfig
    rows: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch."""
    learning_rates: list[list[float]] = field(default_factory=list)
    """For each epoch, the learning rate of every step."""
    times_ms: list[int] = field(default_factory=list)
    """When each epoch ended."""
    selected_confusion: list[list[int]] = field(default_factory=list)
    """Validation counts of the selected epoch."""
    started_ms: int = 0
    """When its process last started."""
    ended_ms: int = 0
    state: State = "waiting"
    problem: str = ""
    """Why it failed."""
    stopped: bool = False
    """The scheduler stopped it."""
    run_id: str = ""
    """Its run in MLflow."""
    delivered: int = 0
    """Epochs that MLflow has."""
    recorded: bool = False
    """MLflow has everything."""

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], recipe: TrainConfig) -> Self:
        """Read what `to_dict` wrote.

        Args:
            saved: what `to_dict` returned.
            recipe: the recipe that the drawn values go into.
        """
        return cls(**saved, recipe=recipe_of(recipe, saved["values"]))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the recipe, in JSON's own types."""
        names = [item.name for item in dataclasses.fields(self) if item.name != "recipe"]
        return {name: getattr(self, name) for name in names}

    def update(self, result: Mapping[str, Any]) -> None:
        """Copy what the trial reported last (`ser_ray.search.actor.Progress`)."""
        self.rows, self.learning_rates = result["history"], result["learning_rates"]
        self.times_ms = result["times_ms"]
        self.selected_confusion = result["selected_confusion"]
        self.problem, self.stopped = result.get("problem", ""), result.get("stopped", False)

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.rows)

    @property
    def selected(self) -> Mapping[str, float]:
        """Row of the selected epoch so far; empty before the first."""
        return selected_row(self.rows, self.recipe.keep)

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Higher is better. Finished trials come first, because only they have selected weights."""
        return self.state == "finished", *validation_rank(self.selected)

    @property
    def ended(self) -> bool:
        """Whether it neither waits nor runs."""
        return self.state not in ("waiting", "running")

    @property
    def succeeded(self) -> bool:
        """Whether it ended without an error and has a score."""
        return self.state in ("finished", "pruned") and bool(self.rows)

    @property
    def end_state(self) -> State:
        """Its state once it has ended."""
        if self.problem:
            return "failed"
        # A scheduler also stops a trial whose epochs are all done.
        return "pruned" if self.stopped and self.epochs < self.recipe.epochs else "finished"


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord:
    """The trial whose selected epoch validates best, among the finished ones if there are any.

    Raises:
        SerRayError: no trial succeeded.
    """
    scored = [trial for trial in trials if trial.succeeded]
    if not scored:
        reasons = [trial.problem for trial in trials if trial.problem]
        raise SerRayError(
            f"none of {len(trials)} trials succeeded; the first failed with: "
            f"{reasons[0] if reasons else 'no reason given'}"
        )
    return max(scored, key=lambda trial: trial.rank)
