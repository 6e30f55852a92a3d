"""Pictures and tables of a run: plain numbers in, matplotlib figures and rows of a CSV out.

The figures are drawn without pyplot, so that they hold no global state and need no display; the
tracker stores them as PNG, a page holds them as SVG. Colours are told apart with any kind of
colour vision (Okabe and Ito 2008), and lines differ in their dashes as well.
"""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ser_ray.training.metrics import Scores, count_confusion

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#808080"
WIDTH = 5.2
"""Inches. A phone shows three quarters of it, so no text is smaller than matplotlib's 10 points."""

# From nothing to dark blue, so that the page's own background, light or dark, shows through.
_SHADES = LinearSegmentedColormap.from_list("share", [(0.03, 0.32, 0.61, a) for a in (0.0, 1.0)])
_WHITE_ABOVE = 0.7  # share of a row from which white text is the more readable one

CLIP_STROKES = 300
"""Strokes that a waveform is drawn with."""

Row = dict[str, str | int | float]
"""Of a table: names and counts as they are, scores as shares from 0 to 1."""

_SERIES = {
    "train_loss": ("training", BLUE, "--"),
    "val_loss": ("validation", VERMILION, "-"),
    "train_wa": ("training WA", BLUE, "--"),
    "val_wa": ("validation WA", GREEN, "-."),
    "val_ua": ("validation UA", VERMILION, "-"),
}


def confusion_figure(confusion: np.ndarray, labels: Sequence[str], title: str) -> Figure:
    """Draw counts [labels, labels] with their share of the row; an empty cell is 0.

    Rows are true labels, columns predicted ones.
    """
    support = confusion.sum(axis=1)
    shares = confusion / np.maximum(support, 1)[:, None]
    side = 0.46 * len(labels) + 1.5
    figure = Figure(figsize=(max(side, WIDTH), max(side, WIDTH)), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(shares, cmap=_SHADES, vmin=0, vmax=1, edgecolors=GREY, linewidth=0.2)
    for row, column in zip(*np.nonzero(confusion), strict=True):
        share = shares[row, column]
        percent = f"{share:.0%}" if share >= 0.01 else "<1%"
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{confusion[row, column]}\n{percent}",
            color="white" if share > _WHITE_ABOVE else "black",
            ha="center",
            va="center",
        )
    middles = np.arange(len(labels)) + 0.5
    named = [f"{label} ({count})" for label, count in zip(labels, support, strict=True)]
    axes.set_xticks(middles, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(middles, named)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true (clips)")
    return entitle(figure, title)


def curves_figure(
    history: Sequence[Mapping[str, float]], selected: Mapping[str, float], title: str
) -> Figure:
    """Draw the loss, and WA and UA, of every epoch, and mark the selected one.

    Args:
        history: rows with the keys epoch, train_loss, train_wa, val_loss, val_wa and val_ua.
        selected: the row whose weights were kept.
        title: shown above.
    """
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    losses, accuracies = figure.subplots(2, 1, sharex=True)
    epochs = [row["epoch"] for row in history]
    for key, (name, colour, dashes) in _SERIES.items():
        axes = losses if key.endswith("loss") else accuracies
        values = [row[key] for row in history]
        axes.plot(epochs, values, dashes, color=colour, label=name, marker=".", markersize=4)
    accuracies.plot(selected["epoch"], selected["val_ua"], "o", color=VERMILION, fillstyle="none")
    losses.set_ylabel("loss")
    accuracies.set_ylabel("accuracy")
    accuracies.set_ylim(0, 1)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1))
    accuracies.set_xlabel("epoch")
    accuracies.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    accuracies.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    for axes in (losses, accuracies):
        axes.axvline(selected["epoch"], color=GREY, linestyle=":")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=3)
        tidy(axes)
    marked = f"marked: epoch {selected['epoch']:.0f}, validation UA {selected['val_ua']:.1%}"
    return entitle(figure, title, marked)


def learning_rate_figure(
    lr_per_step: Sequence[float], lr_min: float, lr_max: float, title: str
) -> Figure:
    """Draw the learning rate of every step on a logarithmic scale, between its two bounds."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yscale("log")
    for name, bound, shift in (("lr_min", lr_min, -12), ("lr_max", lr_max, 4)):
        axes.axhline(bound, color=GREY, linestyle=":")
        axes.annotate(f"{name} {bound:.3g}", (1, bound), (0, shift), textcoords="offset points")
    axes.plot(np.arange(1, len(lr_per_step) + 1), lr_per_step, color=BLUE)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.margins(y=0.12)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    tidy(axes)
    return entitle(figure, title)


def bars_figure(
    names: Sequence[str],
    values: Sequence[float],
    counts: Sequence[int],
    title: str,
    xlabel: str,
) -> Figure:
    """Draw one bar a name: a share from 0 to 1, with the number of clips it is a share of."""
    figure = Figure(figsize=(WIDTH, 0.3 * len(names) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(names)), values, color=BLUE, height=0.7)
    for place, (value, count) in enumerate(zip(values, counts, strict=True)):
        axes.text(value + 0.01, place, f"{value:.1%} of {count}", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35)  # room for the text of a full bar
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(xlabel)
    tidy(axes)
    axes.grid(visible=False, axis="y")
    return entitle(figure, title)


def reliability_figure(
    confidence: Sequence[float], accuracy: Sequence[float], counts: Sequence[int], title: str
) -> Figure:
    """Draw how often the model is right at each confidence, beside what it should be.

    Args:
        confidence: mean probability of the label named, in every bin; NaN in an empty one.
        accuracy: share named right, in every bin; NaN in an empty one.
        counts: clips in every bin.
        title: shown above.
    """
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], ":", color=GREY, label="confidence = accuracy")
    # A point at 0 or 100 % lies on the frame and is drawn over it.
    over = {"clip_on": False, "zorder": 3}
    upper.plot(confidence, accuracy, "-", color=VERMILION, marker="o", label="this model", **over)
    upper.set_ylim(0, 1)
    upper.set_ylabel("accuracy")
    upper.yaxis.set_major_formatter(PercentFormatter(1))
    upper.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)
    width = 1 / len(counts)
    lower.bar((np.arange(len(counts)) + 0.5) * width, counts, 0.9 * width, color=BLUE)
    lower.set_ylabel("clips")
    lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    lower.set_xlim(0, 1)
    lower.xaxis.set_major_formatter(PercentFormatter(1))
    lower.set_xlabel("confidence: probability of the emotion named")
    for axes in (upper, lower):
        tidy(axes)
    return entitle(figure, title)


def clip_figure(waveform: np.ndarray, sample_rate: int, spectrogram: np.ndarray) -> Figure:
    """Draw a clip's waveform above its spectrogram.

    Args:
        waveform: [num_samples], full scale ±1.
        sample_rate: hertz.
        spectrogram: power in dB [bins, frames], from 0 Hz to half the sample rate.
    """
    seconds = len(waveform) / sample_rate
    figure = Figure(figsize=(3.3, 2.5), layout="constrained")
    wave, image = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    # One stroke from the lowest to the highest sample of each stretch, as an editor draws it.
    stretches = np.array_split(waveform, min(CLIP_STROKES, len(waveform)))
    times = np.linspace(0, seconds, len(stretches))
    lows, highs = [s.min() for s in stretches], [s.max() for s in stretches]
    wave.fill_between(times, lows, highs, color=BLUE, linewidth=0.5)
    peak = max(float(np.abs(waveform).max()), 1e-3)
    wave.set_ylim(-1.05 * peak, 1.05 * peak)
    wave.set_yticks([])
    wave.set_ylabel("wave", fontsize=8)
    top = float(spectrogram.max())
    image.imshow(
        spectrogram, origin="lower", aspect="auto", cmap="cividis", vmin=top - 70, vmax=top,
        extent=(0, seconds, 0, sample_rate / 2000),
    )  # fmt: skip
    image.set_ylabel("kHz", fontsize=8)
    image.set_xlabel("seconds", fontsize=8)
    for axes in (wave, image):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def tidy(axes: Axes) -> None:
    """Leave of a frame what is read."""
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def entitle(figure: Figure, *lines: str) -> Figure:
    """Write lines above a figure, broken to its width."""
    letters = round(figure.get_figwidth() * 12)
    figure.suptitle("\n".join(textwrap.fill(line, letters) for line in lines), fontsize=10)
    return figure


def per_class_rows(confusion: np.ndarray, labels: Sequence[str]) -> list[Row]:
    """Tabulate precision, recall, F1 (shares) and support (clips) of every label.

    What would be a division by zero is 0: precision of a label never predicted, recall of one that
    does not occur, F1 of one with neither.

    Args:
        confusion: counts [labels, labels], row = true, column = predicted.
        labels: names of the rows.
    """
    scores = Scores(confusion, loss=0.0)
    columns = zip(
        labels, scores.precision, scores.recall, scores.f1, confusion.sum(axis=1), strict=True
    )
    return [
        {
            "label": label,
            "precision": float(precision),
            "recall": float(recall),
            "f1": float(f1),
            "support": int(support),
        }
        for label, precision, recall, f1, support in columns
    ]


def group_rows(
    kind: str, groups: Sequence[str], truth: np.ndarray, predicted: np.ndarray
) -> list[Row]:
    """Tabulate clips, WA and UA (shares) of every group of clips, by name.

    Args:
        kind: what the groups are: speaker, sex, ...; heads their column.
        groups: of every clip [clips].
        truth: label indices [clips].
        predicted: label indices [clips].
    """
    num_labels = int(max(truth.max(), predicted.max())) + 1
    rows: list[Row] = []
    for group in sorted(set(groups)):
        mine = np.asarray(groups) == group
        scores = Scores(count_confusion(truth[mine], predicted[mine], num_labels), loss=0.0)
        rows.append({kind: group, "clips": scores.num_clips, "wa": scores.wa, "ua": scores.ua})
    return rows
