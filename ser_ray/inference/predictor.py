"""A checkpoint and an audio file to an emotion.

The features are computed by the same code and configuration as those the model was trained on, and
a clip is scored by the same windows as in validation. One file is answered in about the time that
Python needs to import torch: nothing here needs Ray, MLflow or torchvision.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ser_ray.inference.recordings import RecordingFeatures, RecordingReader
from ser_ray.training.checkpoint import read_card, read_network
from ser_ray.training.data import Clips
from ser_ray.training.model import fold_batch_norm, to_channels_last
from ser_ray.training.scoring import predict_clips

BAR_WIDTH = 40
"""Characters of a bar for 100 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """What the model says of one window of a long recording."""

    start: float
    """Seconds from the beginning."""
    end: float
    """Seconds from the beginning."""
    emotion: str
    probabilities: dict[str, float]
    """Probability of every label; they sum to 1."""

    def __str__(self) -> str:
        when = f"{_clock(self.start)}–{_clock(self.end)}"
        return f"{when:>15}  {self.emotion} ({self.probabilities[self.emotion]:.0%})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What the model says of one file, or why it says nothing."""

    path: str
    emotion: str | None = None
    probabilities: dict[str, float] | None = None
    """Probability of every label; they sum to 1. Of a long recording, the mean of its windows."""
    duration: float | None = None
    """Seconds of the whole recording."""
    timeline: tuple[Segment, ...] = ()
    """The windows with sound of a recording longer than the clips the model was trained on."""
    status: str = "ok"
    """ok, or what is wrong with the file: unreadable, no_audio, too_short, too_long, silent."""
    reason: str | None = None
    """The status in words."""

    def __str__(self) -> str:
        name = Path(self.path).name
        if self.probabilities is None or self.emotion is None:
            return f"{name}: {self.status} ({self.reason})"
        whole = f" over {_clock(self.duration or 0)}" if self.timeline else ""
        return f"{name}: {self.emotion} ({self.probabilities[self.emotion]:.0%}){whole}"


class Predictor:
    """A model ready to name emotions.

    Args:
        checkpoint: directory of a checkpoint.

    Raises:
        CheckpointError: no checkpoint there, or not a whole one.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.card = read_card(checkpoint)
        self.labels = self.card.labels
        self.device = torch.device("cpu")
        network = fold_batch_norm(read_network(checkpoint, self.card)).requires_grad_(False)
        self.network = to_channels_last(network, self.device)
        config = self.card.config
        self.reader = RecordingReader(self.card.features, config.feature, config.crop_frames)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ when the card or any weight does."""
        digest = hashlib.blake2b(self.card.to_json().encode(), digest_size=8)
        for weight in self.network.parameters():
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Predictor":
        """Move the network to a device."""
        self.device, self.network = device, self.network.to(device)
        return self

    def predict(self, location: str) -> Prediction:
        """Score one file; what is wrong with it ends in the answer, not in an exception."""
        return self.predict_features([self.reader.read(location)])[0]

    def predict_stream(self, file: BinaryIO, name: str) -> Prediction:
        """Score the file behind a seekable stream; `name` is what the answer calls it."""
        return self.predict_features([self.reader.read_stream(file, name)])[0]

    def predict_samples(self, samples: np.ndarray, sample_rate: int, name: str) -> Prediction:
        """Score mono samples [num_samples], float32 in [-1, 1] or int16, at a rate in hertz."""
        return self.predict_features([self.reader.read_samples(samples, sample_rate, name)])[0]

    def predict_features(self, recordings: Sequence[RecordingFeatures]) -> list[Prediction]:
        """Score the features of some files, together."""
        scores = self._probabilities([clip for item in recordings for clip in item.features])
        ends = np.cumsum([len(item.features) for item in recordings])[:-1]
        own = np.split(scores, ends)
        return [self._answer(item, rows) for item, rows in zip(recordings, own, strict=True)]

    def _probabilities(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Score clips as validation does.

        Args:
            features: [bins, frames] float16 of each clip.

        Returns:
            Probability of every label, float64 [clips, labels].
        """
        if not features:
            return np.zeros((0, len(self.labels)))
        num_frames = np.array([clip.shape[1] for clip in features])
        padded = np.zeros((len(features), len(features[0]), num_frames.max()), np.float16)
        for row, clip in zip(padded, features, strict=True):
            row[:, : clip.shape[1]] = clip
        rows, unlabelled = np.arange(len(features)), np.zeros(len(features))
        clips = Clips.resident(padded, num_frames, unlabelled, self.card.normalisation, self.device)
        return predict_clips(self.network, clips, rows, self.card.config, len(self.labels))

    def _answer(self, recording: RecordingFeatures, scores: np.ndarray) -> Prediction:
        """Put one file's scores [windows, labels] into words."""
        if recording.status != "ok":
            return Prediction(
                path=recording.path,
                duration=recording.duration,
                status=recording.status,
                reason=recording.reason,
            )
        emotion, probabilities = self._name(scores.mean(axis=0))
        timeline = []
        for (start, end), row in zip(
            recording.windows, scores if recording.windows else (), strict=True
        ):
            named, shares = self._name(row)
            timeline.append(Segment(start=start, end=end, emotion=named, probabilities=shares))
        return Prediction(
            path=recording.path,
            emotion=emotion,
            probabilities=probabilities,
            duration=recording.duration,
            timeline=tuple(timeline),
        )

    def _name(self, scores: np.ndarray) -> tuple[str, dict[str, float]]:
        best = self.labels[int(scores.argmax())]
        return best, dict(zip(self.labels, scores.tolist(), strict=True))


def format_predictions(found: Sequence[Prediction]) -> str:
    """A line for each file, its timeline below; of a single file the probabilities as bars."""
    lines = []
    for item in found:
        lines.append(str(item))
        lines += [f"  {segment}" for segment in item.timeline]
    if len(found) == 1 and found[0].probabilities:
        lines += _bars(found[0].probabilities)
    return "\n".join(lines)


def _bars(probabilities: Mapping[str, float]) -> list[str]:
    longest = max(len(label) for label in probabilities)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    return [f"  {label:{longest}}  {p:6.1%}  {'█' * round(p * BAR_WIDTH)}" for label, p in ranked]


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"
