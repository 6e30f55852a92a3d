"""Measures the loudness of a recording every 10 ms, and decides what is silence, noise or sound.

`transforms` uses this module to refuse silent clips and to trim silent ends. `inference` also warns
about recordings whose sound is little louder than their noise.
"""

from dataclasses import dataclass

import numpy as np

from ser_ray.features.mel import POWER_FLOOR

ENERGY_SECONDS = 0.01
"""The power of a recording is measured in stretches of this length."""
SILENCE_POWER = 1e-8
"""A recording is silent if fewer than `num_loud` stretches have at least this power, which is
-80 dB relative to full scale."""
STEADY_RATIO = 10**0.2
"""A recording has steady room noise if the 30th percentile of the stretches' power is less than
this ratio (2 dB) above the 10th percentile. In 300 trimmed clips of RAVDESS, the difference is
3.4 dB or more."""
HEARD_RATIO = 10.0
"""Steady noise raises the threshold of sound only if the loudest stretch is more than this ratio
(10 dB) above the 10th percentile."""
NOISE_MARGIN_DB = (3.0, 9.0)
"""Smallest and largest margin between the 10th percentile of the power and the threshold of sound.
Pink noise exceeds the percentile by up to 8 dB, and white noise at 48 kHz by up to 1.3 dB."""
NOISE_SPREADS = 8.0
"""Between the limits of NOISE_MARGIN_DB, the margin in dB is this many times the difference between
the 30th and the 10th percentile. The loudest stretch in 4 s of Gaussian noise exceeds the 10th
percentile by 6 times this difference."""
LOUD_STRETCHES = 20
"""The level of a recording is that of its 20th loudest stretch, because clicks are shorter than
0.2 s. With fewer than 400 stretches, the level is the 95th percentile."""
RUMBLE_SHARE = 1 / 8
"""This share of the power of rumble counts as noise. With it, `above_noise_db` is at most 11 for
rumble of up to 30 Hz without a voice, and at least 12 if a voice has as much power in its stretches
as the rumble."""
PERIOD_STRETCHES = 3
"""These stretches contain a whole period of mains hum of 50 or 60 Hz. The hum of lamps is a short
pulse in each period, so the stretches between the pulses are not its level."""
HUM_SHARE = 0.7
"""This share of the 10th percentile of the periods' power counts as noise. With it,
`above_noise_db` is less than 12 for hum without a voice, and does not change for a clear voice."""
BLOCK_STRETCHES = 10_000
"""Stretches are measured in blocks of this many, to save memory."""


@dataclass(frozen=True, slots=True)
class Loudness:
    """The loudness of every stretch of `ENERGY_SECONDS`, and the threshold of sound."""

    stretch: int
    """Number of samples in a stretch."""
    power: np.ndarray
    """Power of each stretch `[num_stretches]`. The last stretch is shorter and may be empty."""
    threshold: float
    """A stretch with more power than this is sound."""
    above_noise_db: float
    """Level of the recording (`num_loud`) above the noise, in dB. The noise is the 10th percentile
    of the power, plus RUMBLE_SHARE of the power that rumble adds to a stretch. If HUM_SHARE of the
    10th percentile of the periods' power is greater, that is the noise."""

    @property
    def is_silent(self) -> bool:
        """Whether the recording is silent: nothing but clicks reaches `SILENCE_POWER`."""
        num_audible = np.count_nonzero(self.power >= SILENCE_POWER)
        return bool(num_audible < num_loud(len(self.power)))

    @property
    def is_sound(self) -> np.ndarray:
        """Whether each stretch is sound, bool `[num_stretches]`."""
        return self.power > self.threshold


def measure_loudness(samples: np.ndarray, sample_rate: int, trim_db: float) -> Loudness:
    """Measure the loudness of samples `[num_samples]`, int16 or float32.

    The best-fitting straight line is subtracted from each stretch before its power is computed, so
    constant and drifting offsets do not count, and rumble below 50 Hz counts little. A stretch is
    sound if it is less than `trim_db` below the loudest stretch. If there is steady room noise
    (`STEADY_RATIO`), sound must also exceed the noise by a margin that grows with the fluctuation
    of the noise (`NOISE_SPREADS`).
    """
    stretch = round(ENERGY_SECONDS * sample_rate)
    scale = np.float32(2**-15 if samples.dtype == np.int16 else 1)
    fits = []
    for first in range(0, len(samples) + 1, BLOCK_STRETCHES * stretch):
        block = samples[first : first + BLOCK_STRETCHES * stretch] * scale
        even = len(block) // stretch * stretch
        fits.append(_fit_lines(block[:even].reshape(-1, stretch)))
    means, squares = (np.concatenate(parts) for parts in zip(*fits, strict=True))
    power = np.append(squares, _fit_lines(block[None, even:])[1]) / stretch
    loudest = power.max()
    threshold = loudest * 10 ** (-trim_db / 10)
    heard = np.sort(power[:-1][power[:-1] > POWER_FLOOR])
    if not len(heard):
        return Loudness(stretch, power, threshold, 0.0)
    last = len(heard) - 1
    quiet, less_quiet = heard[last // 10], heard[last * 3 // 10]
    loud = heard[-num_loud(len(heard))]
    if less_quiet < quiet * STEADY_RATIO and loudest > quiet * HEARD_RATIO:
        margin_db = np.clip(10 * NOISE_SPREADS * np.log10(less_quiet / quiet), *NOISE_MARGIN_DB)
        threshold = max(threshold, quiet * 10 ** (margin_db / 10))
    # Within a stretch, rumble is almost a parabola. If the second difference of the means is `c`, a
    # parabola has a power of c**2 / 720 after the best-fitting line is subtracted.
    rumble = np.sort(np.diff(means, 2) ** 2 / 720)
    periods = np.convolve(power[:-1], np.full(PERIOD_STRETCHES, 1 / PERIOD_STRETCHES), "valid")
    periods = np.sort(periods[periods > POWER_FLOOR / PERIOD_STRETCHES])
    noise = max(
        HUM_SHARE * periods[(len(periods) - 1) // 10],
        quiet + RUMBLE_SHARE * (rumble[-num_loud(len(rumble))] if len(rumble) else 0.0),
    )
    return Loudness(stretch, power, threshold, float(10 * np.log10(loud / noise)))


def num_loud(num_stretches: int) -> int:
    """Return how many stretches count as loud. The level is that of the quietest of them."""
    return min(max(num_stretches // 20, 1), LOUD_STRETCHES)


def _fit_lines(stretches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit a line to each row `[rows, samples]`.

    Returns:
        The mean of each row `[rows]`, and the sum of its squared residuals `[rows]`.
    """
    num_samples = stretches.shape[1]
    line = np.arange(num_samples, dtype=np.float32) - np.float32((num_samples - 1) / 2)
    mean = stretches.sum(axis=1) / max(num_samples, 1)
    centred = stretches - mean[:, None]
    sloping = np.vecdot(centred, line) ** 2 / max(np.vdot(line, line), np.float32(1))
    return mean, np.maximum(np.vecdot(centred, centred) - sloping, 0)
