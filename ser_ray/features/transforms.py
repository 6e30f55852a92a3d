"""Second stage of a clip: mono samples become spectrogram, mel and mfcc.

The silent ends are cut off first, so that only sound is resampled. One Fourier transform serves all
three kinds. They equal torchaudio's Spectrogram, MelScale and MFCC, but scipy computes them:
importing torch would take seconds in every worker, and on matrices as small as these the threads of
BLAS would only compete for the cores.
"""

import numpy as np
import scipy.fft
import scipy.sparse
import soxr

from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.features.errors import ClipError

ENERGY_SECONDS = 0.01
"""Loudness is measured over stretches of this many seconds."""
SILENCE_POWER = 1e-8
"""A clip whose loudest stretch has a lower mean square is silent: -80 dB of full scale."""
POWER_FLOOR = 1e-10
"""Lower power is raised to this value: -100 dB."""


class FeatureExtractor:
    """Computes the features of a `FeatureConfig`. It holds plain arrays, so it can be pickled."""

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self._window = np.hanning(config.window_length + 1)[:-1].astype(np.float32)
        self.mel_bands = scipy.sparse.csr_array(_mel_bands(config))

    def waveform(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
        """Cut off the silent ends and resample to the configured rate, `[num_samples]` float32.

        Args:
            samples: `[num_samples]`, int16 or float32, as `decode` returns them.
            sample_rate: their rate in hertz.

        Raises:
            ClipError: `silent`, `too_short` or `too_long`.
        """
        config = self.config
        if samples.dtype == np.int16:
            samples = samples.astype(np.float32) * np.float32(2**-15)
        start, stop = _sound_bounds(samples, sample_rate, config.trim_db)
        if (seconds := (stop - start) / sample_rate) < config.min_seconds:
            raise ClipError(
                "too_short", f"{seconds:.3f} s of sound, less than {config.min_seconds:g} s"
            )
        margin = round(config.trim_margin * sample_rate)
        sound = samples[max(0, start - margin) : stop + margin]
        if (seconds := len(sound) / sample_rate) > config.max_seconds:
            raise ClipError(
                "too_long", f"{seconds:.2f} s of sound, more than {config.max_seconds:g} s"
            )
        if sample_rate == config.sample_rate:
            return sound
        resampled = soxr.resample(sound, sample_rate, config.sample_rate, quality="HQ")
        return resampled[: round(config.max_seconds * config.sample_rate)]  # soxr rounds up

    def features(self, waveform: np.ndarray) -> dict[Kind, np.ndarray]:
        """Return each kind of feature of a waveform `[num_samples]`, `[bins, frames]` float32.

        Spectrogram and mel are powers in dB, 10 log10(max(power, 1e-10)), of Hann windows centred
        on every `hop_length`-th sample of the waveform, which is mirrored at its ends. mfcc is the
        orthonormal DCT-II of the mel dB (Davis and Mermelstein 1980). There are
        `FeatureConfig.frames_of(num_samples)` frames.
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


def _sound_bounds(samples: np.ndarray, sample_rate: int, trim_db: float) -> tuple[int, int]:
    """Return the index of the first sample of the sound and of the one after its last, to 10 ms.

    Raises:
        ClipError: `silent`.
    """
    stretch = round(ENERGY_SECONDS * sample_rate)
    even = len(samples) // stretch * stretch
    stretches, rest = samples[:even].reshape(-1, stretch), samples[even:]
    power = np.append(np.vecdot(stretches, stretches), np.vdot(rest, rest)) / stretch
    if power.max() < SILENCE_POWER:
        raise ClipError("silent", "nothing in it is louder than -80 dB of full scale")
    loud = np.flatnonzero(power > power.max() * 10 ** (-trim_db / 10))
    return int(loud[0]) * stretch, min((int(loud[-1]) + 1) * stretch, len(samples))


def _mel_bands(config: FeatureConfig) -> np.ndarray:
    """Return triangles of height 1, evenly spaced on the HTK mel scale, `[mels, bins]` float32."""
    top = config.sample_rate / 2
    lowest, highest = (2595 * np.log10(1 + hertz / 700) for hertz in (config.f_min, top))
    corners = 700 * (10 ** (np.linspace(lowest, highest, config.num_mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, top, config.num_bins("spectrogram"))
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _decibels(power: np.ndarray) -> np.ndarray:
    return np.float32(10) * np.log10(np.maximum(power, np.float32(POWER_FLOOR)))
