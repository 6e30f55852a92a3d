"""Second stage of a clip: mono samples become spectrogram, mel and mfcc.

The silent ends are trimmed first, so that only sound is resampled. One Fourier transform serves all
three kinds. The values equal those of torchaudio's Spectrogram, MelScale and MFCC. scipy computes
them, because torch takes seconds to import in every worker, and its threads compete for the cores.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import scipy.fft
import scipy.sparse
import soxr

from ser_ray.features.config import FeatureConfig
from ser_ray.features.errors import ClipError
from ser_ray.features.mel import POWER_FLOOR, mel_bands

ENERGY_SECONDS = 0.01
"""Length of a stretch. The loudness of a recording is measured in every stretch."""
SILENCE_POWER = 1e-8
"""A recording whose loud stretches have less power is silent: -80 dB of full scale."""
STEADY_RATIO = 10**0.2
"""A recording has steady room noise if the 30th percentile of the stretches' power is less than
this ratio (2 dB) above the 10th percentile. In 300 clips of RAVDESS that were trimmed to their
sound, the difference is 3.4 dB or more."""
HEARD_RATIO = 10.0
"""Noise counts only if its 10th percentile is this ratio (10 dB) below the loudest stretch."""
NOISE_MARGIN_DB = (3.0, 9.0)
"""Smallest and largest margin between the 10th percentile of the noise and the threshold of sound.
Pink noise exceeds the percentile by up to 8 dB, and white noise at 48 kHz by 1.3 dB."""
NOISE_SPREADS = 8.0
"""Between these limits, the margin in dB is this many times the difference between the 30th and the
10th percentile. In 4 s, Gaussian noise exceeds the 10th percentile by 6 times the difference."""
LOUD_STRETCHES = 20
"""The level of a recording is that of its 20th loudest stretch, because clicks are shorter than
0.2 s. With fewer than 400 stretches, it is the 95th percentile."""
RUMBLE_SHARE = 1 / 8
"""With this share, rumble of up to 30 Hz alone is at most 11 dB above the noise. A voice with as
much power as the rumble in its stretches is at least 12 dB above the noise."""
BLOCK_STRETCHES = 10_000
"""Stretches that are measured together, to save memory."""


@dataclass(frozen=True, slots=True)
class Loudness:
    """The loudness of every stretch of `ENERGY_SECONDS`, and the threshold of sound."""

    stretch: int
    """Samples in a stretch."""
    power: np.ndarray
    """Power of every stretch `[num_stretches]`; the last stretch is shorter and may be empty."""
    threshold: float
    """A stretch with more power than this is sound."""
    above_noise_db: float
    """Difference in level between the loud stretches and the noise, in dB. The noise is the power
    of the quiet stretches, plus RUMBLE_SHARE of the power that rumble adds to a stretch."""

    @property
    def is_sound(self) -> np.ndarray:
        """Whether each stretch is sound, bool `[num_stretches]`."""
        return self.power > self.threshold


class FeatureExtractor:
    """Computes the features that a `FeatureConfig` describes. It can be pickled."""

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._window = np.hanning(config.window_length + 1)[:-1].astype(np.float32)
        self.mel_bands = scipy.sparse.csr_array(mel_bands(config))

    def waveform(
        self, samples: np.ndarray, sample_rate: int, loudness: Loudness | None = None
    ) -> np.ndarray:
        """Trim the silent ends and resample to the configured rate, `[num_samples]` float32.

        Args:
            samples: output of `decode`, `[num_samples]`, int16 or float32.
            sample_rate: rate of the samples in hertz.
            loudness: loudness of the samples with this configuration; measured if None.

        Raises:
            ClipError: `silent`, `too_short` or `too_long`.
        """
        if loudness is None:
            loudness = measure_loudness(samples, sample_rate, self.config.trim_db)
        first, end = self._trim(samples, sample_rate, loudness)
        if (seconds := (end - first) / sample_rate) > self.config.max_seconds:
            raise ClipError(
                "too_long", f"{seconds:.2f} s of sound, more than {self.config.max_seconds:g} s"
            )
        return self._resample(samples[first:end], sample_rate)

    def windows(self, samples: np.ndarray, sample_rate: int) -> list[np.ndarray]:
        """Return the waveform of a clip, or several windows if its sound exceeds `max_seconds`.

        The windows have equal length, and their number is the smallest that covers all sound.
        Windows with less than `min_seconds` of sound are left out, unless all windows have less.

        Raises:
            ClipError: `silent` or `too_short`.
        """
        config = self.config
        loudness = measure_loudness(samples, sample_rate, config.trim_db)
        first, end = self._trim(samples, sample_rate, loudness)
        count = math.ceil((end - first) / (config.max_seconds * sample_rate))
        bounds = np.linspace(first, end, count + 1).round().astype(int).tolist()
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
        fewest = config.min_seconds * sample_rate / loudness.stretch if count > 1 else 0
        kept = [
            part
            for part in parts
            if loudness.is_sound[
                part.start // loudness.stretch : part.stop // loudness.stretch
            ].sum()
            >= fewest
        ]
        return [self._resample(samples[part], sample_rate) for part in kept or parts]

    def _trim(self, samples: np.ndarray, sample_rate: int, loudness: Loudness) -> tuple[int, int]:
        """Return the first and last sample of the sound, including the margins."""
        config = self.config
        if np.count_nonzero(loudness.power >= SILENCE_POWER) < num_loud(len(loudness.power)):
            raise ClipError("silent", "nothing but clicks is louder than -80 dB of full scale")
        sounding = np.flatnonzero(loudness.is_sound)
        start = int(sounding[0]) * loudness.stretch
        stop = min((int(sounding[-1]) + 1) * loudness.stretch, len(samples))
        if (seconds := (stop - start) / sample_rate) < config.min_seconds:
            raise ClipError(
                "too_short", f"{seconds:.3f} s of sound, less than {config.min_seconds:g} s"
            )
        margin = round(config.trim_margin * sample_rate)
        return max(0, start - margin), min(stop + margin, len(samples))

    def _resample(self, sound: np.ndarray, sample_rate: int) -> np.ndarray:
        """Remove the constant offset and resample to the configured rate."""
        config = self.config
        is_integer = sound.dtype == np.int16
        sound = sound - np.float32(sound.mean(dtype=np.float64))
        if is_integer:
            sound *= np.float32(2**-15)
        if sample_rate == config.sample_rate:
            return sound
        resampled = soxr.resample(sound, sample_rate, config.sample_rate, quality="HQ")
        return resampled[: round(config.max_seconds * config.sample_rate)]  # soxr rounds up

    def features(self, waveform: np.ndarray) -> dict[str, np.ndarray]:
        """Return each kind of feature of a waveform `[num_samples]`: `[bins, frames]` float32.

        Hann windows are centred on every `hop_length`-th sample of the waveform, which is mirrored
        at its ends. This gives `FeatureConfig.frames_of(num_samples)` frames. Spectrogram and mel
        are powers in dB: 10 log10(max(power, 1e-10)). mfcc is the orthonormal DCT-II of mel (Davis
        and Mermelstein 1980).
        """
        length, hop = self.config.window_length, self.config.hop_length
        mirrored = np.pad(waveform, (length // 2, length - length // 2), mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(mirrored, length)[::hop]
        spectrum = scipy.fft.rfft(frames * self._window).T  # [bins, frames]
        power = spectrum.real**2
        power += spectrum.imag**2
        power = np.ascontiguousarray(power)
        mel = _decibels(self.mel_bands @ power)
        mfcc = scipy.fft.dct(mel, type=2, norm="ortho", axis=0)[: self.config.num_mfcc]
        return {"spectrogram": _decibels(power), "mel": mel, "mfcc": mfcc}


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
    powers, means = [], []
    for first in range(0, len(samples) + 1, BLOCK_STRETCHES * stretch):  # saves memory
        block = samples[first : first + BLOCK_STRETCHES * stretch] * scale
        even = len(block) // stretch * stretch
        stretches, rest = block[:even].reshape(-1, stretch), block[even:]
        powers.append(_squares(stretches))
        means.append(stretches.mean(axis=1))
    power = np.append(np.concatenate(powers), _squares(rest[None])) / stretch
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
    # If the slope of a parabola changes by `c` from one stretch to the next, its power without the
    # best-fitting line is c**2 / 720.
    rumble = np.sort(np.diff(np.concatenate(means), 2) ** 2 / 720)
    noise = quiet + RUMBLE_SHARE * (rumble[-num_loud(len(rumble))] if len(rumble) else 0.0)
    return Loudness(stretch, power, threshold, float(10 * np.log10(loud / noise)))


def num_loud(num_stretches: int) -> int:
    """Return the number of loud stretches; the quietest of them has the recording's level."""
    return min(max(num_stretches // 20, 1), LOUD_STRETCHES)


def _squares(stretches: np.ndarray) -> np.ndarray:
    """Sum the squared residuals of a linear fit to each row `[rows, samples]`."""
    num_samples = stretches.shape[1]
    line = np.arange(num_samples, dtype=np.float32) - np.float32((num_samples - 1) / 2)
    centred = stretches - stretches.sum(axis=1, keepdims=True) / max(num_samples, 1)
    sloping = np.vecdot(centred, line) ** 2 / max(np.vdot(line, line), np.float32(1))
    return np.maximum(np.vecdot(centred, centred) - sloping, 0)


def _decibels(power: np.ndarray) -> np.ndarray:
    return np.float32(10) * np.log10(np.maximum(power, np.float32(POWER_FLOOR)))
