"""Figures of a training: curves, learning rate, layer weights, and learning-rate range test."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ser_ray.plots.style import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    WIDTH,
    add_title,
    finish,
    format_percent,
    legend_above,
    new_axes,
    tidy,
)

_SERIES = {
    "train/loss": ("training", BLUE, "--"),
    "val/loss": ("validation", VERMILION, "-"),
    "train/wa": ("training WA", BLUE, "--"),
    "val/wa": ("validation WA", GREEN, "-."),
    "val/ua": ("validation UA", VERMILION, "-"),
}


def curves_figure(
    history: Sequence[Mapping[str, float]], selected: Mapping[str, float], title: str = ""
) -> Figure:
    """Draw the loss, WA and UA of every epoch, and mark the selected epoch.

    Args:
        history: rows with the keys epoch, train/loss, train/wa and, if the training has validation
            clips, val/loss, val/wa and val/ua.
        selected: the row of the selected epoch.
    """
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] for row in history]
    for key, (name, colour, dashes) in _SERIES.items():
        if key not in selected:
            continue
        axes = losses if key.endswith("loss") else accuracies
        values = [row[key] for row in history]
        axes.plot(epochs, values, dashes, color=colour, label=name, marker=".", markersize=4)
    caption = f"marked: epoch {selected['epoch']:.0f}"
    if "val/ua" in selected:
        point = selected["epoch"], selected["val/ua"]
        accuracies.plot(*point, "o", color=VERMILION, fillstyle="none")
        caption += f", validation UA {selected['val/ua']:.1%}"
    losses.set_ylabel("loss")
    accuracies.set_ylabel("accuracy")
    accuracies.set_ylim(0, 1)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    accuracies.set_xlabel("epoch")
    accuracies.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    accuracies.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    for axes in (losses, accuracies):
        axes.axvline(selected["epoch"], color=GREY, linestyle=":")
        legend_above(axes, columns=3)
        tidy(axes)
    return add_title(figure, title, caption)


def learning_rate_figure(learning_rates: Sequence[float], lr_min: float, lr_max: float) -> Figure:
    """Draw the learning rate of every step [steps] on a logarithmic scale, and both bounds."""
    axes = new_axes(2.8, xlabel="step", ylabel="learning rate", yscale="log")
    for name, bound, offset in (("lr_min", lr_min, -12), ("lr_max", lr_max, 4)):
        axes.axhline(bound, color=GREY, linestyle=":")
        axes.annotate(f"{name} {bound:.3g}", (1, bound), (0, offset), textcoords="offset points")
    axes.plot(np.arange(1, len(learning_rates) + 1), learning_rates, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.margins(y=0.12)
    return finish(axes)


def layer_weights_figure(weights: Sequence[float], title: str = "") -> Figure:
    """Draw the weights of an encoder's layers [layers], which sum to 1."""
    axes = new_axes(2.8, xlabel="layer of the encoder", ylabel="weight")
    axes.bar(np.arange(1, len(weights) + 1), weights, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.yaxis.set_major_formatter(format_percent)
    return finish(axes, title)


def range_figure(result: Mapping[str, Any], title: str = "") -> Figure:
    """Draw the loss of a range test against the learning rate, and the proposed bounds.

    Args:
        result: the fields of `ser_ray.training.lr_range.LrRange`.
    """
    axes = new_axes(3.4, xlabel="learning rate", ylabel="training loss", xscale="log")
    rates = result["learning_rates"]
    axes.plot(rates, result["losses"], color=GREY, linewidth=0.8, label="each step")
    axes.plot(rates, result["smooth"], color=BLUE, label="averaged")
    for name, dashes in (("lr_min", ":"), ("lr_max", "-.")):
        label = f"{name} {result[name]:.1e}"
        axes.axvline(result[name], color=VERMILION, linestyle=dashes, label=label)
    legend_above(axes, columns=2)
    return finish(axes, title)
