"""The record of a trial, and what the results of searches and cross-validations have in common."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import SerRayError
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.evaluation.rendering import notebook_cell
from ser_ray.search.space import recipe_with
from ser_ray.storage.paths import location_inside
from ser_ray.training.checkpoint import learning_rates_by_epoch
from ser_ray.training.metrics import selected_row, validation_rank
from ser_ray.training.recipe import TrainConfig

RECORDS = "trials.json"
"""File in the folder of a study with the records of its ended trials."""
State = Literal["waiting", "running", "finished", "pruned", "failed"]


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """State and results of a trial. Records are immutable, because threads share them."""

    trial_id: str
    number: int
    """Number of the trial, from 1, in the order in which the trials were added."""
    values: dict[str, Any]
    """Values of this trial by name: the drawn hyperparameters, or its seed and fold."""
    recipe: TrainConfig
    rows: list[dict[str, float]] = field(default_factory=list)
    """One row per epoch."""
    learning_rates: list[list[float]] = field(default_factory=list)
    """For each epoch, the learning rate of every step."""
    times_ms: list[int] = field(default_factory=list)
    """Time at which each epoch ended, in milliseconds since 1970."""
    selected_confusion: list[list[int]] = field(default_factory=list)
    """Validation confusion matrix of the selected epoch."""
    started_ms: int = 0
    """Time at which the process of the trial last started, in milliseconds since 1970."""
    state: State = "waiting"
    problem: str = ""
    """Why the trial failed; empty if it did not fail."""
    stopped: bool = False
    """Whether the scheduler stopped the trial."""
    run_id: str = ""
    """Id of the trial's MLflow run; empty until the run is started."""

    def updated(self, result: dict[str, Any]) -> Self:
        """Return the record after a report of the trial (`ser_ray.search.actor.Reporter`)."""
        record = replace(
            self, problem=result.get("problem", ""), stopped=result.get("stopped", False)
        )
        if "history" not in result:  # the trial failed before its first epoch ended
            return record
        return replace(
            record,
            rows=result["history"],
            learning_rates=learning_rates_by_epoch(result),
            **{name: result[name] for name in ("times_ms", "selected_confusion", "started_ms")},
        )

    @property
    def report(self) -> dict[str, Any]:
        """The report from which `updated` makes this record."""
        return {
            "epoch": self.epochs,
            "step": 0,
            "history": self.rows,
            "learning_rates": [rate for epoch in self.learning_rates for rate in epoch],
            "times_ms": self.times_ms,
            "selected_confusion": self.selected_confusion,
            "started_ms": self.started_ms,
        }

    @property
    def name(self) -> str:
        """Name of the trial's MLflow run, made of values that differ between trials."""
        if "fold" in self.values:
            return f"fold {self.recipe.fold} seed {self.recipe.seed}"
        lr_max = f"{self.recipe.lr_max:.1e}".replace("e-0", "e-")
        return f"{self.number:03d} {self.recipe.feature} {lr_max}"

    @property
    def page(self) -> str:
        """Path of the trial's page in the study's folder."""
        return f"trials/{self.number:03d}.html"

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return len(self.rows)

    @property
    def selected(self) -> Mapping[str, float]:
        """Row of the epoch that is selected so far; empty before the first epoch."""
        return selected_row(self.rows, self.recipe.keep)

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Sort key, which is higher for a better trial. Finished trials rank above all others."""
        return self.state == "finished", *validation_rank(self.selected)

    @property
    def ended(self) -> bool:
        """Whether the trial is neither waiting nor running."""
        return self.state not in ("waiting", "running")

    @property
    def succeeded(self) -> bool:
        """Whether the trial ended without an error and has a score."""
        return self.state in ("finished", "pruned") and bool(self.rows)

    @property
    def end_state(self) -> State:
        """The state of the trial once it has ended."""
        if self.problem:
            return "failed"
        # The scheduler also stops a trial that has completed all its epochs.
        return "pruned" if self.stopped and self.epochs < self.recipe.epochs else "finished"

    def outcome(self, label: str) -> dict[str, str]:
        """Return two lines for the description of the MLflow run, which say how the trial ended.

        Args:
            label: protocol and corpus, as shown beside every score.

        Returns:
            The lines by their titles. One of them is empty, and removes the line of an earlier
            attempt, because a failed trial may be trained again.
        """
        if self.problem:
            problem = f"failed after {self.epochs} epochs: {self.problem}"
            return {"Result": problem, "Validation": ""}
        ua, wa = self.selected["val/ua"], self.selected["val/wa"]
        ended = f"{self.state} after {self.epochs} of {self.recipe.epochs} epochs"
        return {"Result": "", "Validation": f"UA {ua:.1%}, WA {wa:.1%} ({label}); {ended}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyResult:
    """What the results of a search and of a cross-validation have in common."""

    name: str
    trials: list[TrialRecord]
    run_id: str
    """Id of the study's MLflow run, in which the runs of the trials are nested."""
    tracking_uri: str
    location: str
    """The study's folder."""

    @property
    def report(self) -> str:
        """Location of the study's page."""
        return location_inside(self.location, REPORT)

    def _repr_html_(self) -> str:
        return notebook_cell(repr(self), self.report)


def write_records(folder: RunFolder, trials: Sequence[TrialRecord]) -> None:
    """Write the records of a study's trials into its folder, without their recipes and run ids."""
    names = [item.name for item in fields(TrialRecord) if item.name not in ("recipe", "run_id")]
    records = [{name: getattr(trial, name) for name in names} for trial in trials]
    folder.write(RECORDS, json.dumps(records))


def read_records(folder: RunFolder, recipe: TrainConfig) -> list[TrialRecord]:
    """Read the records that `write_records` wrote; empty if there is no such file.

    Args:
        recipe: the recipe of the study, in which each trial replaces some fields.
    """
    try:
        saved = json.loads(folder.read(RECORDS))
    except FileNotFoundError:
        return []
    return [TrialRecord(**values, recipe=recipe_with(recipe, values["values"])) for values in saved]


def best_of(trials: Sequence[TrialRecord]) -> TrialRecord:
    """Return the trial with the best selected epoch. Finished trials are preferred.

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


def count_states(trials: Sequence[TrialRecord]) -> str:
    """Return the number of trials in each state as text, for example `3 finished, 1 failed`."""
    counts = Counter(trial.state for trial in trials)
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def trial_rows(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Return one row per trial of a search, for its page, its plots and its table."""
    return [
        {
            "trial": trial.number,
            "state": trial.state,
            **trial.values,
            "lr_min": trial.recipe.lr_min,
            "completed": trial.epochs,
            "selected/epoch": trial.selected.get("epoch"),
            "selected/ua": trial.selected.get("val/ua"),
            "selected/wa": trial.selected.get("val/wa"),
            "selected/loss": trial.selected.get("val/loss"),
            "problem": trial.problem,
            "run_id": trial.run_id,
        }
        for trial in trials
    ]
