"""Figures of a search, from one row for each trial.

A row has the trial's number (`trial`), its `state`, the `feature` kind, the values that were
searched, and the scores of the selected epoch (`selected/ua`, `selected/loss`), which are None
until the trial has completed an epoch.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from ser_ray.plots.style import BLUE, GREEN, GREY, VERMILION, finish, legend_above, new_axes

TrialRow = Mapping[str, Any]

FEW_VALUES = 5
"""If there are at most this many different numbers, and some trials share a number, each number
gets a tick. These numbers were chosen from a list, so they have few digits."""

_KINDS = {"spectrogram": (BLUE, "o"), "mel": (VERMILION, "s"), "mfcc": (GREEN, "^")}
_ENCODERS = ((GREY, "D"), (BLUE, "v"), (VERMILION, "P"), (GREEN, "X"))


def history_figure(trials: Sequence[TrialRow], title: str = "") -> Figure:
    """Draw the validation UA of every trial in order, and the best UA so far."""
    axes = new_axes(3.4, xlabel="trial", ylabel="validation UA")
    scored = _scored(trials)
    for state, colour, marker in (("finished", BLUE, "o"), ("pruned", GREY, "x")):
        some = [row for row in scored if row["state"] == state]
        numbers, scores = ([row[key] for row in some] for key in ("trial", "selected/ua"))
        label = f"{state} ({len(some)})"
        axes.scatter(numbers, scores, color=colour, marker=marker, label=label)
    leaders = itertools.accumulate(scored, partial(max, key=rank_of))
    best = [leader["selected/ua"] for leader in leaders]
    numbers = [row["trial"] for row in scored]
    axes.step(numbers, best, where="post", color=VERMILION, label="best so far")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    legend_above(axes, columns=3)
    return finish(axes, title)


def parameter_figure(trials: Sequence[TrialRow], name: str, title: str = "") -> Figure:
    """Draw the validation UA of every trial against one searched value, by feature kind.

    The scale is logarithmic if the highest value is ten or more times the lowest. Trials that were
    stopped early have hollow points.
    """
    axes = new_axes(3.2, xlabel=name, ylabel="validation UA")
    scored = _scored(trials)
    places = _places(axes, [row[name] for row in scored])
    encoders = dict.fromkeys(str(row["feature"]) for row in scored if row["feature"] not in _KINDS)
    styles = _KINDS | dict(zip(encoders, itertools.cycle(_ENCODERS), strict=False))
    for kind, (colour, marker) in styles.items():
        some = [(x, row) for x, row in zip(places, scored, strict=True) if row["feature"] == kind]
        axes.scatter(
            [x for x, _ in some],
            [row["selected/ua"] for _, row in some],
            edgecolors=colour,
            facecolors=[colour if row["state"] == "finished" else "none" for _, row in some],
            marker=marker,
            label=f"{kind} ({len(some)})",
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_above(axes, columns=3)
    return finish(axes, title)


def _places(axes: Axes, values: Sequence[Any]) -> Sequence[float]:
    """Set the scale and ticks of the x-axis for values, and return their places on it."""
    distinct = sorted(set(values))
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        axes.set_xticks(range(len(distinct)), [str(value) for value in distinct])
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        return [distinct.index(value) for value in values]
    if distinct and distinct[0] > 0 and distinct[-1] >= 10 * distinct[0]:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        is_list = len(distinct) <= FEW_VALUES and len(distinct) < len(values)
        axes.xaxis.set_major_locator(FixedLocator(distinct) if is_list else MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g}")
    return values


def importance_figure(importance: Mapping[str, float], title: str = "") -> Figure:
    """Draw the share of the differences in UA that each searched value explains."""
    axes = new_axes(0.4 * len(importance) + 1.4, xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    names = sorted(importance, key=importance.__getitem__)
    axes.barh(names, [importance[name] for name in names], color=BLUE)
    return finish(axes, title)


def rank_of(row: TrialRow) -> tuple[float, ...]:
    """Sort key of a trial: finished after pruned, then the validation UA, then the negative loss.

    A trial without a score comes first.
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
