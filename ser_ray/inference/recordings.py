"""Files to features: of a clip, or of the windows of a long recording.

The features are computed by the code and with the configuration of the shards that the model was
trained on. A recording with more sound than the longest training clip is cut into overlapping
windows as long as the network's crop, and each is treated as a clip. Windows without sound are left
out. This module imports neither torch nor Ray, so that decoding processes start quickly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.transforms import ENERGY_SECONDS, FeatureExtractor

MAX_RECORDING_SECONDS = 3600.0
"""Longer recordings have the status `too_long`: they would not fit into a worker's memory."""

UNREACHABLE = "unreachable"
"""Status of a file whose storage did not answer; the file itself may be all right."""

Window = tuple[float, float]
"""Start and end in seconds of the recording."""
Decode = Callable[..., tuple[np.ndarray, int]]
"""`decode`, or the method of a sandbox, which survives a clip that kills the decoding process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingFeatures:
    """The features of one file, or why there are none."""

    path: str
    duration: float | None = None
    """Seconds of the complete recording; None if it could not be decoded."""
    windows: tuple[Window, ...] = ()
    """The window that each of the features covers in a long recording; empty for a clip."""
    features: tuple[np.ndarray, ...] = ()
    """One array for a clip, or one for each window; each is [bins, frames] float16."""
    status: str = "ok"
    """ok, or why there are no features: unreadable, no_audio, too_short, too_long, silent, or
    `UNREACHABLE`.
    """
    reason: str | None = None
    """The status in words."""


class RecordingReader:
    """Turns files into features; it holds plain arrays, so Ray can send it to workers.

    Args:
        config: the model's feature configuration.
        kind: the feature that is the network's input.
        crop_frames: frames of the network's input, which is the length of a window.
    """

    def __init__(self, config: FeatureConfig, kind: Kind, crop_frames: int) -> None:
        self.extract = FeatureExtractor(config)
        self.kind = kind
        frames = min(crop_frames, config.num_frames)
        self.window_seconds = (frames - 1) * config.hop_length / config.sample_rate

    def read(self, location: str, decode: Decode = decode) -> RecordingFeatures:
        """Read the file at a path or URI, which `decode` decodes."""
        return self._read(location, location, decode)

    def read_stream(self, file: BinaryIO, name: str) -> RecordingFeatures:
        """Read the file behind a seekable stream; `name` is what the answer calls it."""
        return self._read(file, name, decode)

    def read_samples(self, samples: np.ndarray, sample_rate: int, name: str) -> RecordingFeatures:
        """Read mono samples [num_samples], float32 in [-1, 1] or int16, at a rate in hertz."""
        duration = len(samples) / sample_rate
        try:
            features = (self._features(samples, sample_rate),)
        except ClipError as error:
            if error.status == "too_long":
                return self._read_windows(samples, sample_rate, name)
            return RecordingFeatures(
                path=name, duration=duration, status=error.status, reason=error.reason
            )
        return RecordingFeatures(path=name, duration=duration, features=features)

    def _read_windows(self, samples: np.ndarray, sample_rate: int, name: str) -> RecordingFeatures:
        """Read the windows of a recording with more sound than the longest training clip."""
        found = list(self._windows(samples, sample_rate))
        return RecordingFeatures(
            path=name,
            duration=len(samples) / sample_rate,
            windows=tuple(window for window, _ in found),
            features=tuple(features for _, features in found),
            status="ok" if found else "silent",
            reason=None if found else "no window of it holds enough sound",
        )

    def _read(self, source: str | BinaryIO, name: str, decode: Decode) -> RecordingFeatures:
        try:
            samples, sample_rate = decode(source, max_seconds=MAX_RECORDING_SECONDS)
        except ClipError as error:
            status = UNREACHABLE if error.failed == "storage" else error.status
            return RecordingFeatures(path=name, status=status, reason=error.reason)
        return self.read_samples(samples, sample_rate, name)

    def _features(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
        waveform = self.extract.waveform(samples, sample_rate)
        return self.extract.features(waveform)[self.kind].astype(np.float16)  # as in the shards

    def _windows(
        self, samples: np.ndarray, sample_rate: int
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield every window that holds sound, and its features.

        A window holds sound if `min_seconds` of it are louder than `trim_db` below the loudest
        part of the recording, which is how the silent ends of training clips are found.
        """
        stretch = round(ENERGY_SECONDS * sample_rate)
        loud = _loud_stretches(samples, stretch, self.extract.config.trim_db)
        for start in segment_starts(len(samples) / sample_rate, self.window_seconds):
            window = start, start + self.window_seconds
            first, end = (round(second * sample_rate) for second in window)
            num_loud = loud[round(first / stretch) : round(end / stretch)].sum()
            if num_loud * stretch / sample_rate < self.extract.config.min_seconds:
                continue
            try:
                yield window, self._features(samples[first:end], sample_rate)
            except ClipError:  # by itself, the window is silent or its sound too short
                continue


def segment_starts(seconds: float, window_seconds: float) -> list[float]:
    """Return the start in seconds of every window: one every half window, the last at the end."""
    last = max(seconds - window_seconds, 0.0)
    return [*np.arange(0.0, last, window_seconds / 2).tolist(), last]


def _loud_stretches(samples: np.ndarray, stretch: int, trim_db: float) -> np.ndarray:
    """Return which stretches of `stretch` samples are sound, bool [num_stretches]."""
    num_stretches = len(samples) // stretch
    stretches = samples[: num_stretches * stretch].reshape(-1, stretch)
    # Summed in blocks, so that an hour of int16 samples is not copied to float at once.
    power = np.einsum("ij,ij->i", stretches, stretches, dtype=np.float64, casting="safe")
    return power > power.max() * 10 ** (-trim_db / 10)
