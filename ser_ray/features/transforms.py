"""Second stage of a clip: mono samples become spectrogram, mel and mfcc.

The silent ends are trimmed first, so that only sound is resampled. One Fourier transform serves all
three kinds. Except for rounding, the values equal those of torchaudio's Spectrogram, MelScale and
MFCC. scipy computes them, because torch takes seconds to import in every worker, and torch's
threads compete for the cores.
"""

import itertools
import math

import numpy as np
import scipy.fft
import scipy.sparse
import soxr

from ser_ray.features.config import FeatureConfig
from ser_ray.features.errors import ClipError
from ser_ray.features.loudness import Loudness, measure_loudness
from ser_ray.features.mel import POWER_FLOOR, mel_bands


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
            loudness: result of `measure_loudness` with the configured `trim_db`; measured if None.

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
        stretch = loudness.stretch
        windows = list(itertools.pairwise(bounds))
        fewest = config.min_seconds * sample_rate / stretch
        kept = [
            (start, stop)
            for start, stop in windows
            if loudness.is_sound[start // stretch : stop // stretch].sum() >= fewest
        ]
        return [self._resample(samples[start:stop], sample_rate) for start, stop in kept or windows]

    def _trim(self, samples: np.ndarray, sample_rate: int, loudness: Loudness) -> tuple[int, int]:
        """Return the first sample of the sound and the sample after its last one, with the margins.

        Raises:
            ClipError: `silent` or `too_short`.
        """
        config = self.config
        if loudness.is_silent:
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
        if sample_rate != config.sample_rate:
            sound = soxr.resample(sound, sample_rate, config.sample_rate, quality="HQ")
        # soxr and the division into windows round lengths up.
        return sound[: round(config.max_seconds * config.sample_rate)]

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


def _decibels(power: np.ndarray) -> np.ndarray:
    return np.float32(10) * np.log10(np.maximum(power, np.float32(POWER_FLOOR)))
