"""A checkpoint and an audio file to an emotion.

A file, a stream or samples become features of one or more windows (`RecordingReader`), these become
probabilities by the function that scores validation clips, and these become a `Prediction`. Every
other way to an answer, such as the batch pass, the packaged model and the demo, calls `Predictor`.
It imports neither Ray nor MLflow nor torchvision, so one file takes little more than the import of
torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

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
    """The answer for one window of a long recording."""

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
    """The answer for one file, or the reason why there is none."""

    path: str
    emotion: str | None = None
    probabilities: dict[str, float] | None = None
    """Probability of every label; they sum to 1. A long recording has the mean of its windows."""
    duration: float | None = None
    """Seconds of the complete recording."""
    timeline: tuple[Segment, ...] = ()
    """The windows with sound of a recording longer than the clips the model was trained on."""
    status: str = "ok"
    """ok, or what is wrong: unreadable, unreachable, no_audio, too_short, too_long or silent."""
    reason: str | None = None
    """The status in words."""

    def __str__(self) -> str:
        name = Path(self.path).name
        if self.probabilities is None or self.emotion is None:
            return f"{name}: {self.status} ({self.reason})"
        length = f" over {_clock(self.duration or 0)}" if self.timeline else ""
        return f"{name}: {self.emotion} ({self.probabilities[self.emotion]:.0%}){length}"


class Predictor:
    """A trained model and the reader that computes its features.

    Args:
        checkpoint: directory of a checkpoint.

    Raises:
        CheckpointError: the checkpoint is missing or incomplete.
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
        """Sixteen hex digits that change when the card or any weight changes."""
        digest = hashlib.blake2b(self.card.to_json().encode(), digest_size=8)
        for weight in self.network.parameters():
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Predictor":
        """Move the network to a device."""
        self.device, self.network = device, self.network.to(device)
        return self

    def predict(self, location: str) -> Prediction:
        """Score one file; a fault of the file is part of the answer and raises nothing."""
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
        by_file = zip(recordings, np.split(scores, ends), strict=True)
        return [self._answer(recording, rows) for recording, rows in by_file]

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
        """Make the answer from the probabilities [windows, labels] of one file."""
        if recording.status != "ok":
            return Prediction(
                path=recording.path,
                duration=recording.duration,
                status=recording.status,
                reason=recording.reason,
            )
        timeline = tuple(
            Segment(start=start, end=end, **self._most_probable(row))
            for (start, end), row in zip(recording.windows, scores, strict=False)  # a clip has none
        )
        return Prediction(
            path=recording.path,
            **self._most_probable(scores.mean(axis=0)),
            duration=recording.duration,
            timeline=timeline,
        )

    def _most_probable(self, probabilities: np.ndarray) -> dict[str, Any]:
        """Name the most probable label of probabilities [labels], and each by its label."""
        by_label = dict(zip(self.labels, probabilities.tolist(), strict=True))
        return {"emotion": self.labels[int(probabilities.argmax())], "probabilities": by_label}


def format_predictions(predictions: Sequence[Prediction]) -> str:
    """Write a line for each file with its timeline, and for a single file bars of probabilities."""
    lines = []
    for prediction in predictions:
        lines.append(str(prediction))
        lines += [f"  {segment}" for segment in prediction.timeline]
    if len(predictions) == 1 and predictions[0].probabilities:
        lines += _bars(predictions[0].probabilities)
    return "\n".join(lines)


def _bars(probabilities: Mapping[str, float]) -> list[str]:
    longest = max(len(label) for label in probabilities)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    return [f"  {label:{longest}}  {p:6.1%}  {'█' * round(p * BAR_WIDTH)}" for label, p in ranked]


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"
