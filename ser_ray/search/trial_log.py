"""What is known of one trial of a search or cross-validation, as its journal tells it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ser_ray.errors import SerRayError
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_epoch, selected_row, validation_rank

State = Literal["waiting", "running", "finished", "pruned", "failed", "lost"]


@dataclass(slots=True)
class TrialLog:
    """What is known of one trial."""

    trial_id: str
    number: int
    """In the order in which they were drawn, from 1."""
    values: dict[str, Any]
    """What was drawn for it."""
    recipe: TrainConfig
    rows: list[dict[str, float]] = field(default_factory=list)
    """A row for every epoch."""
    rates: list[list[float]] = field(default_factory=list)
    """The learning rates of every epoch, one a step."""
    confusions: list[list[list[int]]] = field(default_factory=list)
    """Validation counts of every epoch."""
    times_ms: list[int] = field(default_factory=list)
    """When each epoch was reported."""
    started_ms: int = 0
    """When its process was ready for it, the last time."""
    ended_ms: int = 0
    state: State = "waiting"
    problem: str = ""
    """Why it failed."""
    run_id: str = ""
    """Its run in MLflow."""
    recorded: bool = False
    """Everything of it is in MLflow."""
    stopped: bool = False
    delivered: int = 0
    """Epochs handed to the tracker."""

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def selected(self) -> Mapping[str, float]:
        """Row of the epoch whose weights are kept, so far; empty before the first."""
        return selected_row(self.rows, self.recipe.keep)

    @property
    def selected_confusion(self) -> list[list[int]]:
        """Validation counts of that epoch."""
        return self.confusions[selected_epoch(self.rows, self.recipe.keep)]

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The higher the better: those that went to their end, of which alone weights are kept."""
        return self.state == "finished", *validation_rank(self.selected)

    @property
    def ended(self) -> bool:
        """Nothing more happens to it."""
        return self.state not in ("waiting", "running")

    @property
    def succeeded(self) -> bool:
        """Ended with a score that counts."""
        return self.state in ("finished", "pruned") and bool(self.rows)

    @property
    def end_state(self) -> State:
        """State of one that has ended."""
        if self.problem:
            return "failed"
        # Tune also stops a trial whose epochs are all done.
        return "pruned" if self.stopped and self.epochs < self.recipe.epochs else "finished"


def best_of(trials: Sequence[TrialLog]) -> TrialLog:
    """The trial whose kept epoch validates best, of those that went to their end, if any did.

    Raises:
        SerRayError: none did.
    """
    scored = [trial for trial in trials if trial.succeeded]
    if not scored:
        reasons = [trial.problem for trial in trials if trial.problem]
        raise SerRayError(
            f"none of {len(trials)} trials succeeded; the first failed with: "
            f"{reasons[0] if reasons else 'no reason given'}"
        )
    return max(scored, key=lambda trial: trial.rank)
