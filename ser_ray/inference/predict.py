"""A checkpoint and an audio file to an emotion.

The features are computed by the same code and configuration as those the model was trained on, and
a clip is scored by the same windows as in validation; nothing here needs Ray.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np
import torch
from pyarrow import fs

from ser_ray.errors import CorpusError
from ser_ray.features.decode import ClipError, decode
from ser_ray.features.extract import Extractor
from ser_ray.storage import filesystem_of
from ser_ray.training.checkpoint import read_card, read_network
from ser_ray.training.data import Clips
from ser_ray.training.loop import predict_clips

AUDIO_SUFFIXES = (".wav", ".mp4", ".m4a", ".mp3", ".flac", ".ogg", ".opus", ".webm", ".mkv", ".mov")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the model says of one file, or why it says nothing."""

    path: str
    emotion: str | None = None
    probabilities: dict[str, float] | None = None
    """Probability of every label; they sum to 1."""
    duration: float | None = None
    """Seconds of the whole recording."""
    status: str = "ok"
    """ok, or what is wrong with the file: unreadable, no_audio, too_short, silent."""
    reason: str | None = None


class Predictor:
    """A model ready to name emotions.

    Args:
        checkpoint: directory of a checkpoint.

    Raises:
        CheckpointError: no checkpoint there, or not a whole one.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.card = read_card(checkpoint)
        self.extract = Extractor(self.card.features)
        self.network = read_network(checkpoint, self.card)
        self.device = torch.device("cpu")

    def probabilities(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
        """Score one recording.

        Args:
            samples: mono, [num_samples] float32 in [-1, 1].
            sample_rate: hertz.

        Returns:
            Probability of every label [labels].

        Raises:
            ClipError: too short or silent.
        """
        waveform = self.extract.waveform(samples, sample_rate)
        features = self.extract.features(waveform)[self.card.config.feature]
        clip = Clips.resident(
            features[None].astype(np.float16),  # as stored in the shards
            np.array([features.shape[1]]),
            np.array([0]),
            self.card.normalisation,
            self.device,
        )
        rows = np.array([0])
        labels = len(self.card.labels)
        return predict_clips(self.network, clip, rows, self.card.config, labels)[0]

    def predict(self, location: str) -> Prediction:
        """Score one file; what is wrong with it ends in the answer, not in an exception."""
        filesystem, path = filesystem_of(location)
        try:
            with filesystem.open_input_file(path) as file:
                return self.predict_stream(file, location)
        except OSError as error:
            return Prediction(path=location, status="unreadable", reason=str(error))

    def predict_stream(self, file: BinaryIO, name: str) -> Prediction:
        """Score the file behind a seekable stream; `name` is what the answer calls it."""
        try:
            samples, sample_rate = decode(file, name)
            scores = self.probabilities(samples, sample_rate)
        except ClipError as error:
            return Prediction(path=name, status=error.status, reason=error.reason)
        return Prediction(
            path=name,
            emotion=self.card.labels[int(scores.argmax())],
            probabilities=dict(zip(self.card.labels, scores.tolist(), strict=True)),
            duration=len(samples) / sample_rate,
        )


@contextmanager
def local_checkpoint(location: str) -> Iterator[Path]:
    """A checkpoint as a local directory, copied there for the block where it is remote."""
    filesystem, path = filesystem_of(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        yield Path(path)
        return
    with TemporaryDirectory() as folder:
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            fs.copy_files(path, folder, source_filesystem=filesystem)
        yield Path(folder)


def list_audio(sources: tuple[str, ...]) -> list[str]:
    """Files to score: the files named, and those of audio or video in the folders named.

    Raises:
        CorpusError: a source does not exist or a folder holds no such file.
    """
    files: list[str] = []
    for source in sources:
        filesystem, path = filesystem_of(source)
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.NotFound:
            raise CorpusError(f"{source}: no such file or folder")
        if info.type == fs.FileType.File:
            files.append(source)
            continue
        prefix = source.rstrip("/")
        found = [
            f"{prefix}/{entry.path.removeprefix(path.rstrip('/') + '/')}"
            for entry in filesystem.get_file_info(fs.FileSelector(path, recursive=True))
            if entry.type == fs.FileType.File and entry.path.lower().endswith(AUDIO_SUFFIXES)
        ]
        if not found:
            raise CorpusError(f"{source}: no audio or video file in this folder")
        files += sorted(found)
    return files
