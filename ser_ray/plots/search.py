"""Figures of a search, from one row for each trial.

A row holds at least `trial` (its number), `state`, `feature`, `lr_min` and `lr_max`, and the scores
of the selected epoch, `selected/ua` and `selected/loss`. These are None until the trial has
completed an epoch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from ser_ray.plots.style import BLUE, GREEN, GREY, VERMILION, WIDTH, entitle, legend_above, tidy

TrialRow = Mapping[str, Any]

_KINDS = {"spectrogram": (BLUE, "o"), "mel": (VERMILION, "s"), "mfcc": (GREEN, "^")}
_BOUNDS = {"lr_min": "lr_min, lower bound", "lr_max": "lr_max, upper bound"}


def history_figure(trials: Sequence[TrialRow], title: str = "") -> Figure:
    """Draw the validation UA of every trial by number, and the best so far."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel="validation UA")
    scored = _scored(trials)
    for state, colour, marker in (("finished", BLUE, "o"), ("pruned", GREY, "x")):
        some = [row for row in scored if row["state"] == state]
        axes.scatter(
            [row["trial"] for row in some],
            [row["selected/ua"] for row in some],
            color=colour,
            marker=marker,
            label=f"{state} ({len(some)})",
        )
    leaders: list[TrialRow] = []
    for row in scored:
        leaders.append(max([*leaders[-1:], row], key=rank_of))
    axes.step(
        [row["trial"] for row in scored],
        [leader["selected/ua"] for leader in leaders],
        where="post",
        color=VERMILION,
        label="best so far",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    legend_above(axes, columns=3)
    tidy(axes)
    return entitle(figure, title)


def bounds_figure(trials: Sequence[TrialRow], title: str = "") -> Figure:
    """Draw the validation UA against each bound of the learning rate, by feature kind."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, (name, label) in zip(panels, _BOUNDS.items(), strict=True):
        for kind, (colour, marker) in _KINDS.items():
            some = [row for row in _scored(trials) if row["feature"] == kind]
            axes.scatter(
                [row[name] for row in some],
                [row["selected/ua"] for row in some],
                color=colour,
                marker=marker,
                label=f"{kind} ({len(some)})",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("validation UA")
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        tidy(axes)
    legend_above(panels[0], columns=3)
    return entitle(figure, title)


def importance_figure(importance: Mapping[str, float], title: str = "") -> Figure:
    """Draw the share of the differences in UA that each searched name explains."""
    figure = Figure(figsize=(WIDTH, 0.4 * len(importance) + 1.4), layout="constrained")
    axes = figure.add_subplot(xlabel="importance (PED-ANOVA)", xlim=(0, 1))
    names = sorted(importance, key=importance.__getitem__)
    axes.barh(names, [importance[name] for name in names], color=BLUE)
    tidy(axes)
    return entitle(figure, title)


def rank_of(row: TrialRow) -> tuple[float, ...]:
    """Sort key of a trial, the higher the better; finished trials come before pruned ones."""
    if row["selected/ua"] is None:
        return ()
    return row["state"] == "finished", row["selected/ua"], -row["selected/loss"]


def _scored(trials: Sequence[TrialRow]) -> list[TrialRow]:
    return [
        row
        for row in trials
        if row["state"] in ("finished", "pruned") and row["selected/ua"] is not None
    ]
