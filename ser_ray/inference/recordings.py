"""Computes the features of a recording, or of the windows of a long recording.

The code and the settings are those of the shards that the model was trained on. A recording with
more sound than the longest training clip is cut into overlapping windows. Every window is treated
as a clip, and is as long as a training crop (for an encoder, as long as the longest training clip).
Windows without enough sound are left out. This module imports neither torch nor Ray, so that
decoding processes start quickly.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import BinaryIO

import numpy as np

from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.features.decode import MAX_RECORDING_SECONDS, decode
from ser_ray.features.errors import ClipError
from ser_ray.features.loudness import Loudness, measure_loudness
from ser_ray.features.samples import Sound
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.prediction import UNREACHABLE, Prediction
from ser_ray.storage.paths import as_utf8

CLEAR_DB = 12.0
"""A recording gets a warning if its loudest parts are less than this many dB above its background.
None of 400 clips of RAVDESS gets the warning. With added white noise, 4 % of them get it at a noise
level of -60 dB of full scale, 26 % at -50 dB, and 69 % at -40 dB. Recordings of noise alone always
get it."""

Window = tuple[float, float]
"""Start and end of a window, in seconds from the beginning of the recording."""
Decode = Callable[..., Sound]
"""`decode`, or `Sandbox.decode`, which survives a file that kills the decoding process."""


@dataclass(frozen=True, slots=True)
class RecordingFeatures:
    """The features of one recording. There are none if it cannot be scored."""

    prediction: Prediction
    """What is known before the network runs: all but the emotion, probabilities and timeline."""
    windows: tuple[Window, ...] = ()
    """The windows of a long recording; empty if the recording is scored as one clip."""
    features: tuple[np.ndarray, ...] = ()
    """One array for a clip, or one for each window. An encoder takes the waveform [num_samples]
    float32; every other network takes features [bins, frames] float16."""


class RecordingReader:
    """Computes features of recordings. It can be pickled, so Ray can send it to workers.

    Args:
        config: the model's feature configuration.
        kind: the kind of feature that the network takes. For an encoder, the reader returns the
            waveform.
        crop_frames: length of a training crop in frames, which is the length of a window, unless it
            is shorter than twice `min_seconds`. It is ignored for an encoder.
    """

    def __init__(self, config: FeatureConfig, kind: str, crop_frames: int) -> None:
        self.extract = FeatureExtractor(config)
        self.kind = kind
        frames = config.num_frames
        if kind in KINDS:  # a window of fewer frames could not have `min_seconds` of sound
            fewest = config.frames_of(round(2 * config.min_seconds * config.sample_rate))
            frames = min(max(crop_frames, fewest), frames)
        self.window_seconds = (frames - 1) * config.hop_length / config.sample_rate

    def read(
        self, file: str | BinaryIO, decode: Decode = decode, name: str = ""
    ) -> RecordingFeatures:
        """Compute the features of a file (path or URI) or seekable stream, shown as `name`."""
        name = name or as_utf8(str(file))
        try:
            sound = decode(file, max_seconds=MAX_RECORDING_SECONDS)
        except ClipError as error:
            status = UNREACHABLE if error.failed == "storage" else error.status
            return RecordingFeatures(Prediction(path=name, status=status, reason=error.reason))
        recording = self.read_samples(sound.samples, sound.sample_rate, name)
        warnings = [text for text in (sound.loss, recording.prediction.warning) if text]
        prediction = replace(recording.prediction, warning="; ".join(warnings) or None)
        return replace(recording, prediction=prediction)

    def read_samples(self, samples: np.ndarray, sample_rate: int, name: str) -> RecordingFeatures:
        """Compute the features of mono samples [num_samples]: float32 in [-1, 1], or int16."""
        if not len(samples):
            reason = "there are no samples"
            return RecordingFeatures(Prediction(path=name, status="unreadable", reason=reason))
        result = partial(Prediction, path=name, duration=len(samples) / sample_rate)
        loudness = measure_loudness(samples, sample_rate, self.extract.config.trim_db)
        warning = None
        if loudness.above_noise_db < CLEAR_DB:
            warning = (
                f"the loudest parts are only {loudness.above_noise_db:.0f} dB above the "
                "background, so the recording may contain no voice"
            )
        try:
            features = self._features(samples, sample_rate, loudness)
            return RecordingFeatures(result(warning=warning), features=(features,))
        except ClipError as error:
            if error.status != "too_long":
                return RecordingFeatures(result(status=error.status, reason=error.reason))
        pairs = list(self._windows(samples, sample_rate, loudness))
        if not pairs:
            reason = "no window of the recording has enough sound"
            return RecordingFeatures(result(status="silent", reason=reason))
        windows, all_features = zip(*pairs, strict=True)
        return RecordingFeatures(result(warning=warning), windows, all_features)

    def _features(
        self, samples: np.ndarray, sample_rate: int, loudness: Loudness | None = None
    ) -> np.ndarray:
        waveform = self.extract.waveform(samples, sample_rate, loudness)
        if self.kind not in KINDS:
            return waveform
        return self.extract.features(waveform)[self.kind].astype(np.float16)  # as in the shards

    def _windows(
        self, samples: np.ndarray, sample_rate: int, loudness: Loudness
    ) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield every window that has `min_seconds` of sound, and its features."""
        stretch, is_sound = loudness.stretch, loudness.is_sound
        # A window that is rounded up would be longer than `max_seconds`.
        size = math.floor(self.window_seconds * sample_rate + 1e-6)
        for start in window_start_seconds(len(samples) / sample_rate, self.window_seconds):
            window = start, start + self.window_seconds
            first = min(round(start * sample_rate), max(len(samples) - size, 0))
            end = first + size
            num_loud = is_sound[round(first / stretch) : round(end / stretch)].sum()
            if num_loud * stretch / sample_rate < self.extract.config.min_seconds:
                continue
            try:
                yield window, self._features(samples[first:end], sample_rate)
            except ClipError:  # this window by itself is silent or too short
                continue


def window_start_seconds(seconds: float, window_seconds: float) -> list[float]:
    """Return the start of each window in seconds.

    A window starts every half window length, and the last window ends with the recording.
    """
    last, step = max(seconds - window_seconds, 0.0), window_seconds / 2
    # Subtract a little, so that a rounding error does not add a second window at the last start.
    return [*(number * step for number in range(math.ceil(last / step - 1e-6))), last]
