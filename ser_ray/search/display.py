"""Shows the trials of a study: as a table on a terminal, as lines in a log."""

import time
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table

from ser_ray.search.record import TrialRecord

STYLE = {
    "waiting": "dim",
    "running": "bold",
    "finished": "green",
    "pruned": "dim",
    "failed": "red",
}
LINE_SECONDS = 60.0
"""In a log, the time between two lines about each running trial."""
COLUMNS = ("trial", "state", "feature", "fold", "seed", "lr min", "lr max", "epoch", "UA")


class TrialTable:
    """Shows trials until its block ends.

    Args:
        console: where to show them.
        total: number of trials.
        label: shown beside every score, such as `SPEAKER-DEPENDENT`.
    """

    def __init__(self, console: Console, total: int, label: str = "") -> None:
        self.console, self.total, self.label = console, total, label
        self._trials: list[TrialRecord] = []
        self._logged_states: dict[str, str] = {}
        self._logged_at = time.monotonic()
        self._live = Live(
            get_renderable=self.table, console=console, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()
            if self._trials:
                self.console.print(self.table())

    def __call__(self, trials: list[TrialRecord]) -> None:
        """Show the current state of the trials."""
        self._trials = trials
        if self.console.is_terminal:
            return
        for trial in trials:
            if trial.state not in ("waiting", self._logged_states.get(trial.trial_id)):
                self._logged_states[trial.trial_id] = trial.state
                self.console.print(self._line(trial))
        if (now := time.monotonic()) - self._logged_at >= LINE_SECONDS:
            self._logged_at = now
            for trial in trials:
                if trial.state == "running" and trial.rows:
                    self.console.print(self._line(trial))

    def table(self) -> RenderableType:
        """The running trials and the best of the others, as many as fit on the screen."""
        done = sum(trial.ended for trial in self._trials)
        table = Table(caption=f"{done} of {self.total} trials done {self.label}", box=None)
        for name in COLUMNS:
            table.add_column(name, justify="right")
        for trial in self._shown():
            recipe = trial.recipe
            table.add_row(
                str(trial.number),
                trial.state,
                recipe.feature,
                str(recipe.fold),
                str(recipe.seed),
                f"{recipe.lr_min:.1e}",
                f"{recipe.lr_max:.1e}",
                f"{trial.epochs}/{recipe.epochs}",
                f"{trial.selected['val/ua']:.1%}" if trial.rows else trial.problem[:30],
                style=STYLE[trial.state],
            )
        return table

    def _shown(self) -> list[TrialRecord]:
        room = max(self.console.height - 4, 5)
        ranked = sorted(
            self._trials,
            key=lambda trial: (trial.ended, -trial.selected.get("val/ua", 0.0)),
        )
        return sorted(ranked[:room], key=lambda trial: trial.number)

    def _line(self, trial: TrialRecord) -> str:
        drawn = ", ".join(f"{name} {_text(value)}" for name, value in trial.values.items())
        head = f"trial {trial.number:3d}/{self.total} {trial.state:8}  {drawn}"
        if trial.problem:
            return f"{head}  after {trial.epochs} epochs: {trial.problem}"
        if not trial.rows:
            return head
        score = f"{head}  UA {trial.selected['val/ua']:.1%} {self.label}".rstrip()
        return f"{score} after {trial.epochs} of {trial.recipe.epochs} epochs"


def _text(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
