"""Figures of a search, drawn from one row for each trial.

A row has the trial's number (`trial`), its `state`, the `feature` kind, the values of the searched
hyperparameters, and the scores of the selected epoch (`selected/ua`, `selected/loss`). The scores
are None until the trial has completed an epoch.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter

from ser_ray.plots.style import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    finish,
    format_percent,
    legend_above,
    new_axes,
    shortened,
)

TrialRow = Mapping[str, Any]

MAX_TICKS = 5
"""If a hyperparameter has at most this many different values, and some repeat, each value gets a
tick. Such values are probably from a `choice(...)`, so their labels are short."""

AXIS_CHARACTERS = 40
"""If the names of a choice need more characters than this, they are slanted."""

_KINDS = {"spectrogram": (BLUE, "o"), "mel": (VERMILION, "s"), "mfcc": (GREEN, "^")}
_ENCODERS = ((GREY, "D"), (BLUE, "v"), (VERMILION, "P"), (GREEN, "X"))


def history_figure(trials: Sequence[TrialRow], title: str = "") -> Figure:
    """Draw the validation UA of each finished or pruned trial in order, and of the best so far."""
    axes = new_axes(3.4, xlabel="trial", ylabel="validation UA")
    scored = _scored(trials)
    for state, colour, marker in (("finished", BLUE, "o"), ("pruned", GREY, "x")):
        of_state = [row for row in scored if row["state"] == state]
        if not of_state:
            continue
        numbers, scores = ([row[key] for row in of_state] for key in ("trial", "selected/ua"))
        label = f"{state} ({len(of_state)})"
        axes.scatter(numbers, scores, color=colour, marker=marker, label=label)
    best_so_far = itertools.accumulate(scored, partial(max, key=trial_sort_key))
    best_scores = [row["selected/ua"] for row in best_so_far]
    numbers = [row["trial"] for row in scored]
    axes.step(numbers, best_scores, where="post", color=VERMILION, label="best so far")
    axes.yaxis.set_major_formatter(format_percent)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    legend_above(axes, columns=3)
    return finish(axes, title)


def parameter_figure(trials: Sequence[TrialRow], name: str, title: str = "") -> Figure:
    """Draw the validation UA of finished and pruned trials against a hyperparameter, by feature.

    The scale is logarithmic if all values are above 0 and the highest is at least ten times the
    lowest. Pruned trials have hollow points.
    """
    axes = new_axes(3.2, xlabel=name, ylabel="validation UA")
    scored = _scored(trials)
    positions = _set_up_x_axis(axes, [row[name] for row in scored])
    trials_at = list(zip(positions, scored, strict=True))
    encoders = dict.fromkeys(str(row["feature"]) for row in scored if row["feature"] not in _KINDS)
    styles = _KINDS | dict(zip(encoders, itertools.cycle(_ENCODERS), strict=False))
    for kind, (colour, marker) in styles.items():
        points = [(x, row) for x, row in trials_at if row["feature"] == kind]
        if not points:
            continue
        axes.scatter(
            [x for x, _ in points],
            [row["selected/ua"] for _, row in points],
            edgecolors=colour,
            facecolors=[colour if row["state"] == "finished" else "none" for _, row in points],
            marker=marker,
            label=f"{kind} ({len(points)})",
        )
    axes.yaxis.set_major_formatter(format_percent)
    legend_above(axes, columns=3)
    return finish(axes, title)


def _set_up_x_axis(axes: Axes, values: Sequence[Any]) -> Sequence[float]:
    """Set the scale and the ticks of the x-axis, and return the position of each value."""
    distinct = sorted(set(values))
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        names = [shortened(str(value)) for value in distinct]
        axes.set_xticks(range(len(names)), names, parse_math=False)
        if len(names) * max(map(len, names)) > AXIS_CHARACTERS:
            for label in axes.get_xticklabels():
                label.set(rotation=20, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        return [distinct.index(value) for value in values]
    if distinct and distinct[0] > 0 and distinct[-1] >= 10 * distinct[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        is_choice = len(distinct) <= MAX_TICKS and len(distinct) < len(values)
        axes.xaxis.set_major_locator(FixedLocator(distinct) if is_choice else MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g}")
    return values


def importance_figure(importance: Mapping[str, float], title: str = "") -> Figure:
    """Draw the importance of each hyperparameter by PED-ANOVA. The importances sum to 1."""
    axes = new_axes(0.4 * len(importance) + 1.4, xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    names = sorted(importance, key=importance.__getitem__)
    axes.barh(names, [importance[name] for name in names], color=BLUE)
    return finish(axes, title)


def trial_sort_key(row: TrialRow) -> tuple[float, ...]:
    """Return a key that sorts trials from worst to best: by state, then UA, then negative loss.

    A finished trial is better than every pruned one, whose training is incomplete.
    """
    if row["selected/ua"] is None:
        return ()
    return row["state"] == "finished", row["selected/ua"], -row["selected/loss"]


def _scored(trials: Sequence[TrialRow]) -> list[TrialRow]:
    return [
        row
        for row in trials
        if row["state"] in ("finished", "pruned") and row["selected/ua"] is not None
    ]
