"""Figures of scores: confusion matrix, scores by speaker, and calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ser_ray.plots.style import (
    BLUE,
    DARK_BLUE,
    DARK_VERMILION,
    GREEN,
    GREY,
    VERMILION,
    WIDTH,
    add_title,
    finish,
    legend_above,
    new_axes,
    shortened,
    tidy,
)

# Maps -1 (wrong) to dark vermilion and 1 (correct) to dark blue. 0 is transparent, because the page
# may be light or dark.
_COLOURS = LinearSegmentedColormap.from_list(
    "confusion",
    [
        (0.0, to_rgba(DARK_VERMILION, 1)),
        (0.5, to_rgba(DARK_VERMILION, 0)),
        (0.5, to_rgba(DARK_BLUE, 0)),
        (1.0, to_rgba(DARK_BLUE, 1)),
    ],
)
_WHITE_ABOVE = 0.7
"""Share above which a cell is so dark that white text is easier to read than black text."""


def confusion_figure(confusion: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """Draw a confusion matrix.

    Each cell shows its count and its share of the row; cells with 0 are empty. Correct predictions
    are blue, and wrong ones are vermilion.

    Args:
        confusion: counts [labels, labels], with a row for each true label and a column for each
            predicted label.
        labels: the labels, in the order of the rows.
    """
    support = confusion.sum(axis=1)
    shares = confusion / np.maximum(support, 1)[:, None]
    side = max(0.46 * len(labels) + 1.5, WIDTH)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    # Shares of correct predictions are positive, and those of wrong predictions are negative.
    signed = np.where(np.eye(len(labels), dtype=bool), shares, -shares)
    axes.pcolormesh(signed, cmap=_COLOURS, vmin=-1, vmax=1, edgecolors=GREY, linewidth=0.2)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        share = shares[row, column]
        text = f"{confusion[row, column]}\n" + (f"{share:.0%}" if share >= 0.01 else "<1%")
        colour = "white" if share > _WHITE_ABOVE else "black"
        axes.text(column + 0.5, row + 0.5, text, color=colour, ha="center", va="center")
    middles = np.arange(len(labels)) + 0.5
    names = list(map(shortened, labels))
    row_labels = [f"{name} ({count})" for name, count in zip(names, support, strict=True)]
    axes.set_xticks(
        middles, names, rotation=45, ha="right", rotation_mode="anchor", parse_math=False
    )
    axes.set_yticks(middles, row_labels, parse_math=False)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xlabel("predicted label")
    axes.set_ylabel("true label (number of clips)")
    return add_title(figure, title)


def speakers_figure(rows: Sequence[Mapping[str, Any]], title: str = "") -> Figure:
    """Draw a bar for each speaker: the WA in blue, and the remainder up to 1 in vermilion.

    Args:
        rows: a mapping for each speaker with the keys speaker, clips and wa.
    """
    axes = new_axes(0.3 * len(rows) + 1.2, xlabel="clips recognised (WA)")
    positions, wa = range(len(rows)), np.array([row["wa"] for row in rows])
    axes.barh(positions, wa, color=BLUE, height=0.7)
    axes.barh(positions, 1 - wa, left=wa, color=VERMILION, alpha=0.3, height=0.7)
    for position, row in enumerate(rows):
        axes.text(1.02, position, f"{row['wa']:.1%} of {row['clips']}", va="center")
    axes.set_yticks(positions, [shortened(row["speaker"]) for row in rows], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4)  # room for the text
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure = finish(axes, title)
    axes.grid(visible=False, axis="y")
    return figure


def reliability_figure(
    confidence: np.ndarray,
    accuracy: np.ndarray,
    counts: np.ndarray,
    before: tuple[np.ndarray, np.ndarray] | None = None,
) -> Figure:
    """Draw a reliability diagram: the accuracy at each confidence, and the ideal diagonal.

    Args:
        confidence: mean probability of the predicted label in each bin [bins]; NaN for an empty
            bin.
        accuracy: share of correct predictions in each bin [bins]; NaN for an empty bin.
        counts: number of clips in each bin [bins].
        before: confidence and accuracy without calibration, drawn for comparison.
    """
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], ":", color=GREY, label="confidence = accuracy")
    # The frame must not cut off points at 0 or 100 %.
    on_top = {"clip_on": False, "zorder": 3}
    if before is not None:
        how = {"color": GREEN, "marker": "s", "alpha": 0.7, **on_top}
        upper.plot(*before, "--", label="uncalibrated", **how)
    upper.plot(confidence, accuracy, "-", color=VERMILION, marker="o", label="this model", **on_top)
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy")
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    legend_above(upper, columns=3)
    width = 1 / len(counts)
    lower.bar((np.arange(len(counts)) + 0.5) * width, counts, 0.9 * width, color=BLUE)
    lower.set_ylabel("clips")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    lower.set_xlabel("confidence: probability of the predicted emotion")
    for axes in (upper, lower):
        tidy(axes)
    return figure
