"""Shows a line whenever a trial starts or ends and, on a terminal, a bar below the lines."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from ser_ray.progress import bar_below, clock
from ser_ray.search.trial import TrialRecord, count_states

STYLE = {"finished": "green", "failed": "red"}
LINE_SECONDS = 60.0
"""Time between two lines about each running trial."""


@contextmanager
def show_trials(
    console: Console, total: int, label: str = "", *, compared: bool = True
) -> Iterator[Callable[[list[TrialRecord]], None]]:
    """Yield a function that shows the current state of the trials.

    Args:
        console: where to show them.
        total: number of trials.
        label: shown beside every score, such as `SPEAKER-DEPENDENT`.
        compared: whether to name the best trial.
    """
    shown: dict[str, str] = {}
    shown_at = time.monotonic()
    with bar_below(console) as bar:
        task = bar.add_task("starting", total=total)

        def show(trials: list[TrialRecord]) -> None:
            nonlocal shown_at
            is_time = time.monotonic() - shown_at >= LINE_SECONDS
            shown_at = time.monotonic() if is_time else shown_at
            for trial in trials:
                has_changed = trial.state not in ("waiting", shown.get(trial.trial_id))
                if has_changed or (is_time and trial.state == "running" and trial.rows):
                    console.print(_line(trial, total, label), style=STYLE.get(trial.state))
                shown[trial.trial_id] = trial.state
            text = f"{count_states(trials)} of {total} trials"
            scored = [trial for trial in trials if trial.rows and not trial.problem]
            if scored and compared:
                best = max(scored, key=lambda trial: trial.rank)
                text += f"  best UA {best.selected['val/ua']:.1%} in trial {best.number} {label}"
            done = sum(1 if trial.ended else trial.epochs / trial.recipe.epochs for trial in trials)
            bar.update(task, completed=done)
            if left := bar.tasks[0].time_remaining:
                text += f"  about {clock(left)} left"
            bar.update(task, description=text)

        yield show


def _line(trial: TrialRecord, total: int, label: str) -> str:
    drawn = ", ".join(
        f"{name} {value:.2e}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.values.items()
    )
    head = f"trial {trial.number:3d}/{total} {trial.state:8}  {drawn}"
    if trial.problem:
        return f"{head}  after {trial.epochs} epochs: {trial.problem}"
    if not trial.rows:
        return head
    score = f"{head}  UA {trial.selected['val/ua']:.1%} {label}".rstrip()
    return f"{score} after {trial.epochs} of {trial.recipe.epochs} epochs"
