"""The figure of one recording: its waveform, its spectrogram and, if it is long, its timeline."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ser_ray.plots.style import BLUE, VERMILION, shortened

NUM_STROKES = 300
"""Largest number of stretches that a waveform is divided into."""
DYNAMIC_RANGE = 70.0
"""The colours of a spectrogram reach from its loudest point to this many dB below it."""


def clip_figure(
    waveform: np.ndarray,
    sample_rate: int,
    spectrogram: np.ndarray,
    timeline: Sequence[tuple[float, float, str]] = (),
) -> Figure:
    """Draw the waveform, the spectrogram below it, and the timeline below both.

    Args:
        waveform: [num_samples], full scale ±1.
        sample_rate: hertz.
        spectrogram: power in dB [bins, frames], from 0 Hz to half the sample rate.
        timeline: start in seconds, end in seconds and label of each window; windows may overlap.
    """
    seconds = len(waveform) / sample_rate
    labels = list(dict.fromkeys(label for _, _, label in timeline))
    height = 0.16 * (len(labels) + 1) if timeline else 0.0
    figure = Figure(figsize=(3.3, 2.5 + height), layout="constrained")
    ratios = (1.0, 2.0, height) if timeline else (1.0, 2.0)
    panels = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    upper, middle = panels[:2]
    # In each stretch, fill from the lowest to the highest sample, as audio editors do.
    stretches = np.array_split(waveform, min(NUM_STROKES, len(waveform)))
    times = np.linspace(0, seconds, len(stretches))
    lows, highs = [stretch.min() for stretch in stretches], [stretch.max() for stretch in stretches]
    upper.fill_between(times, lows, highs, color=BLUE, linewidth=0.5)
    peak = max(float(np.abs(waveform).max()), 1e-3)
    upper.set_ylim(-1.05 * peak, 1.05 * peak)
    upper.set_yticks([])
    upper.set_ylabel("wave", fontsize=8)
    loudest = float(spectrogram.max())
    middle.imshow(
        spectrogram, origin="lower", aspect="auto", cmap="cividis", vmin=loudest - DYNAMIC_RANGE,
        vmax=loudest, extent=(0, seconds, 0, sample_rate / 2000),
    )  # fmt: skip
    middle.set_ylabel("kHz", fontsize=8)
    if timeline:
        rows = [labels.index(label) for _, _, label in timeline]
        starts = [start for start, _, _ in timeline]
        lengths = [end - start for start, end, _ in timeline]
        panels[2].barh(rows, lengths, left=starts, height=0.7, color=VERMILION, alpha=0.6)
        panels[2].set_yticks(range(len(labels)), map(shortened, labels), parse_math=False)
        panels[2].set_xlim(0, seconds)
        panels[2].invert_yaxis()
    panels[-1].set_xlabel("seconds", fontsize=8)
    for axes in panels:
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
