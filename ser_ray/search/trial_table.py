"""Shows the trials of a study, as a table on a terminal or as lines in a log."""

import time
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ser_ray.progress import clock
from ser_ray.search.trial import TrialRecord

STYLE = {"waiting": "dim", "running": "bold", "finished": "green", "pruned": "dim", "failed": "red"}
LOG_SECONDS = 60.0
"""In a log, the time between two lines about a running trial."""


class TrialTable:
    """Shows trials while its `with` block runs.

    Args:
        console: where to show them.
        total: number of trials.
        label: shown beside every score, such as `SPEAKER-DEPENDENT`.
        mark_best: whether to mark the best trial.
    """

    def __init__(
        self, console: Console, total: int, label: str = "", *, mark_best: bool = True
    ) -> None:
        self.console, self.total, self.label, self.mark_best = console, total, label, mark_best
        self._first_shown: tuple[float, float] | None = None
        """Time at which the trials were first shown, and the value of `_num_done` at that time."""
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
        self._live.stop()
        if self.console.is_terminal and self._trials:
            self.console.print(self.table())

    def __call__(self, trials: list[TrialRecord]) -> None:
        """Show the current state of the trials."""
        self._trials = trials
        self._first_shown = self._first_shown or (time.monotonic(), self._num_done())
        if self.console.is_terminal:
            return
        for trial in trials:
            if trial.state not in ("waiting", self._logged_states.get(trial.trial_id)):
                self._logged_states[trial.trial_id] = trial.state
                self.console.print(self._line(trial))
        if (now := time.monotonic()) - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            for trial in trials:
                if trial.state == "running" and trial.rows:
                    self.console.print(self._line(trial))

    def table(self) -> Table:
        """Return a table of the trials that fit on the screen: those not ended, and the best."""
        ended = sum(trial.ended for trial in self._trials)
        caption = f"{ended} of {self.total} trials done{self._time_left()}"
        if self.label:
            caption += f", {self.label}"
        # Four searched names fit on 80 columns, and what is left is for the problems of trials.
        table = Table(caption=caption, box=None, pad_edge=False, collapse_padding=True)
        names = list(dict.fromkeys(name for trial in self._trials for name in trial.values))
        for name in ("trial", "state", *names, "epoch", "val UA"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column()
        scored = [trial for trial in self._trials if trial.rows and not trial.problem]
        best = max(scored, key=lambda trial: trial.rank, default=None) if self.mark_best else None
        for trial in self._shown():
            mark = "best" if trial is best else trial.problem
            table.add_row(
                str(trial.number),
                trial.state,
                *(_text(trial.values.get(name, "")) for name in names),
                f"{trial.epochs}/{trial.recipe.epochs}",
                f"{trial.selected['val/ua']:.1%}" if trial.rows else "",
                Text(mark, no_wrap=True, overflow="ellipsis"),
                style=STYLE[trial.state],
            )
        return table

    def _num_done(self) -> float:
        """Return the number of ended trials, plus the completed share of each running trial."""
        return sum(
            1.0 if trial.ended else trial.epochs / trial.recipe.epochs for trial in self._trials
        )

    def _time_left(self) -> str:
        if self._first_shown is None:
            return ""
        (started_at, done_before), done = self._first_shown, self._num_done()
        if done <= done_before or done >= self.total:
            return ""
        seconds_per_trial = (time.monotonic() - started_at) / (done - done_before)
        return f", about {clock((self.total - done) * seconds_per_trial)} left"

    def _shown(self) -> list[TrialRecord]:
        max_rows = max(self.console.height - 4, 5)
        ranked = sorted(
            self._trials,
            key=lambda trial: (not trial.ended, trial.rank if trial.rows else ()),
            reverse=True,
        )
        return sorted(ranked[:max_rows], key=lambda trial: trial.number)

    def _line(self, trial: TrialRecord) -> str:
        values = ", ".join(f"{name} {_text(value)}" for name, value in trial.values.items())
        head = f"trial {trial.number:3d} {trial.state:8}  {values}"
        if trial.problem:
            return f"{head}  after {trial.epochs} epochs: {trial.problem}"
        if not trial.rows:
            return head
        score = f"{head}  validation UA {trial.selected['val/ua']:.1%} {self.label}".rstrip()
        return f"{score} after {trial.epochs} of {trial.recipe.epochs} epochs"


def _text(value: object) -> str:
    return f"{value:.2e}" if isinstance(value, float) else str(value)
