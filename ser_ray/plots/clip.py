"""The figure of one clip."""

import numpy as np
from matplotlib.figure import Figure

from ser_ray.plots.style import BLUE

STROKES = 300
"""Number of vertical strokes that a waveform is drawn with."""
DYNAMIC_RANGE = 70.0
"""Decibels below its loudest point that a spectrogram shows."""


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
    # One stroke from the lowest to the highest sample of each stretch, as audio editors draw it.
    stretches = np.array_split(waveform, min(STROKES, len(waveform)))
    times = np.linspace(0, seconds, len(stretches))
    lows, highs = [s.min() for s in stretches], [s.max() for s in stretches]
    wave.fill_between(times, lows, highs, color=BLUE, linewidth=0.5)
    peak = max(float(np.abs(waveform).max()), 1e-3)
    wave.set_ylim(-1.05 * peak, 1.05 * peak)
    wave.set_yticks([])
    wave.set_ylabel("wave", fontsize=8)
    top = float(spectrogram.max())
    image.imshow(
        spectrogram, origin="lower", aspect="auto", cmap="cividis", vmin=top - DYNAMIC_RANGE,
        vmax=top, extent=(0, seconds, 0, sample_rate / 2000),
    )  # fmt: skip
    image.set_ylabel("kHz", fontsize=8)
    image.set_xlabel("seconds", fontsize=8)
    for axes in (wave, image):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
