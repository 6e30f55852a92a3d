"""Files to what the network can be shown: the features of a clip, or of a recording's windows.

The features are computed by the code and with the configuration of the shards that the model was
trained on. A recording with more sound than the longest training clip is cut into overlapping
windows as long as the network's crop, each treated as a clip of its own; windows without sound are
left out, not guessed. `list_audio` says which files a user means. Knows neither torch nor Ray, so
decoding workers start in a moment.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import BinaryIO

import numpy as np
from pyarrow import fs

from ser_ray.errors import CorpusError
from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.transforms import ENERGY_SECONDS, FeatureExtractor
from ser_ray.storage.listing import list_files
from ser_ray.storage.paths import filesystem_of

AUDIO_SUFFIXES = (
    ".wav", ".mp4", ".m4a", ".mp3", ".flac", ".ogg", ".opus", ".webm", ".mkv", ".mov", ".aac",
    ".aiff", ".amr", ".avi", ".wma",
)  # fmt: skip
"""What counts as audio or video in a folder; a file named itself may have any name."""
MAX_RECORDING_SECONDS = 3600.0
"""Longer recordings are `too_long`: they would not fit into a worker's memory."""

UNREACHABLE = "unreachable"
"""Status of a file whose storage did not answer: nothing is said of the file itself."""

Window = tuple[float, float]
"""Start and end in seconds of the recording."""
Decode = Callable[..., tuple[np.ndarray, int]]
"""`decode`, or a sandbox's, which outlives a clip that kills the process decoding it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordingFeatures:
    """The features of one file, or why there are none."""

    path: str
    duration: float | None = None
    """Seconds of the whole recording; None where it could not be decoded."""
    windows: tuple[Window, ...] = ()
    """Where each of the features is from in a long recording; empty for a clip."""
    features: tuple[np.ndarray, ...] = ()
    """One array for a clip, one a window for a long recording, each [bins, frames] float16."""
    status: str = "ok"
    """ok, or why there are no features: unreadable, no_audio, too_short, too_long, silent, or
    `UNREACHABLE`.
    """
    reason: str | None = None
    """The status in words."""


class RecordingReader:
    """Turns files into features. Holds plain arrays, so it travels to workers.

    Args:
        config: the model's feature configuration.
        kind: the feature that the network sees.
        crop_frames: frames that the network sees at once, and so the length of a window.
    """

    def __init__(self, config: FeatureConfig, kind: Kind, crop_frames: int) -> None:
        self.extract = FeatureExtractor(config)
        self.kind = kind
        frames = min(crop_frames, config.num_frames)
        self.window_seconds = (frames - 1) * config.hop_length / config.sample_rate
        self.step_seconds = self.window_seconds / 2

    def read(self, location: str, decode: Decode = decode) -> RecordingFeatures:
        """Read the file at a path or URI, decoded here or where `decode` does it."""
        return self._read(location, location, decode)

    def read_stream(self, file: BinaryIO, name: str) -> RecordingFeatures:
        """Read the file behind a seekable stream; `name` is what the answer calls it."""
        return self._read(file, name, decode)

    def read_samples(self, samples: np.ndarray, sample_rate: int, name: str) -> RecordingFeatures:
        """Take mono samples [num_samples], float32 in [-1, 1] or int16, at a rate in hertz."""
        duration = len(samples) / sample_rate
        windows: tuple[Window, ...] = ()
        features: tuple[np.ndarray, ...]
        try:
            try:
                features = (self._features(samples, sample_rate),)
            except ClipError as error:
                if error.status != "too_long":
                    raise
                found = list(self._windows(samples, sample_rate))
                windows = tuple(window for window, _ in found)
                features = tuple(array for _, array in found)
                if not found:
                    raise ClipError("silent", "no window of it holds enough sound") from error
        except ClipError as error:
            return RecordingFeatures(
                path=name, duration=duration, status=error.status, reason=error.reason
            )
        return RecordingFeatures(path=name, duration=duration, windows=windows, features=features)

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
        """Yield the features of every window that holds sound.

        Sound is what a training clip's silent ends were told from: less than `trim_db` below the
        loudest of the recording, for `min_seconds` of the window.
        """
        stretch = round(ENERGY_SECONDS * sample_rate)
        loud = _loud_stretches(samples, stretch, self.extract.config.trim_db)
        for start in segment_starts(len(samples) / sample_rate, self.window_seconds):
            window = start, start + self.window_seconds
            samples_inside = slice(*(round(second * sample_rate) for second in window))
            sounding = loud[
                round(samples_inside.start / stretch) : round(samples_inside.stop / stretch)
            ].sum()
            if sounding * stretch / sample_rate < self.extract.config.min_seconds:
                continue
            try:
                yield window, self._features(samples[samples_inside], sample_rate)
            except ClipError:  # silent: quiet beside the recording's loudest, and in full scale
                continue


def segment_starts(seconds: float, window_seconds: float) -> list[float]:
    """First second of every window of a recording: one every half window, the last at its end."""
    last = max(seconds - window_seconds, 0.0)
    return [*np.arange(0.0, last, window_seconds / 2).tolist(), last]


def _loud_stretches(samples: np.ndarray, stretch: int, trim_db: float) -> np.ndarray:
    """Which stretches of so many samples are sound, bool [num_stretches]."""
    whole = len(samples) // stretch * stretch
    stretches = samples[:whole].reshape(-1, stretch)
    # Summed in blocks: an hour of int16 samples is not copied to float as a whole.
    power = np.einsum("ij,ij->i", stretches, stretches, dtype=np.float64, casting="safe")
    return power > power.max() * 10 ** (-trim_db / 10)


def list_audio(sources: Sequence[str]) -> list[str]:
    """Files to score, each once: those named, those of audio or video in the folders named, and
    those that a pattern matches (`*` and `?` within a name, `**` over any number of folders).

    Raises:
        CorpusError: a source does not exist or cannot be listed, or holds or matches no such file.
    """
    files: list[str] = []
    for source in sources:
        try:
            files += _files_of(source)
        except (OSError, UnicodeEncodeError) as error:
            name = os.fsencode(source).decode(errors="backslashreplace")
            raise CorpusError(f"{name}: cannot be listed ({error})") from error
    return list(dict.fromkeys(files))


def _files_of(source: str) -> list[str]:
    filesystem, path = filesystem_of(source)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.File:
        return [source]
    if kind == fs.FileType.Directory:
        found = [file for file in list_files(source) if _is_audio(file.inside)]
        if not found:
            raise CorpusError(f"{source}: no audio or video file in this folder")
        return sorted(file.location for file in found)
    if set("*?[") & set(source):
        return _matching(source)
    raise CorpusError(f"{source}: no such file or folder")


def _matching(pattern: str) -> list[str]:
    """Audio and video files that a pattern matches; other files only where it says their suffix."""
    fixed = re.match(r"(?:[^*?\[]*/)?", pattern)
    base = fixed[0] if fixed else ""
    wanted = pattern.removeprefix(base).split("/")
    found = [
        file.location
        for file in list_files(base or ".")
        if _matches(file.inside.split("/"), wanted)
        and (_is_audio(file.inside) or "." in wanted[-1])
    ]
    if not found:
        raise CorpusError(f"{pattern}: matches no audio or video file")
    return sorted(found)


def _matches(names: Sequence[str], wanted: Sequence[str]) -> bool:
    if not wanted:
        return not names
    if wanted[0] == "**":
        return any(_matches(names[skip:], wanted[1:]) for skip in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], wanted[0]) and _matches(names[1:], wanted[1:])


def _is_audio(name: str) -> bool:
    return name.lower().endswith(AUDIO_SUFFIXES)
