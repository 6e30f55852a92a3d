"""A checkpoint and an audio file to an emotion.

`RecordingReader` turns a file, a stream or samples into the features of one or more windows. The
function that scores validation clips turns these into probabilities, and these become a
`Prediction`. Every other way to an answer, such as the batch pass, the packaged model and the demo,
calls `Predictor`. It imports neither Ray nor MLflow nor torchvision, so one file takes little more
than the import of torch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch

from ser_ray.errors import ConfigError
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import SAMPLE_RATES, full_scale
from ser_ray.inference.prediction import UNSURE, Prediction, Predictions, Segment
from ser_ray.inference.recordings import RecordingFeatures, RecordingReader
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint import read_card, read_network
from ser_ray.training.data import Clips
from ser_ray.training.model import fold_batch_norm, to_channels_last
from ser_ray.training.scoring import predict_clips


class Predictor:
    """A trained model and the reader that computes its features.

    Args:
        checkpoint: directory of a checkpoint.
        min_confidence: a recording whose most probable emotion has a lower probability than this
            is `unsure`: it gets its probabilities, but no emotion.

    Raises:
        CheckpointError: the checkpoint is missing or incomplete.
        ConfigError: the confidence is not from 0 to 1.
    """

    def __init__(self, checkpoint: Path, min_confidence: float = 0.0) -> None:
        if not 0 <= min_confidence <= 1:
            raise ConfigError(f"min_confidence is {min_confidence}: it must be from 0 to 1")
        self.min_confidence = min_confidence
        self.card = read_card(checkpoint)
        self.labels = self.card.labels
        self.device = torch.device("cpu")
        network = fold_batch_norm(read_network(checkpoint, self.card)).requires_grad_(False)
        self.network = to_channels_last(network, self.device)
        config = self.card.config
        self.reader = RecordingReader(self.card.features, config.feature, config.crop_frames)

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change when the card, the confidence or any weight changes."""
        settings = f"{self.min_confidence} {self.card.to_json()}"
        digest = hashlib.blake2b(settings.encode(), digest_size=8)
        for weight in self.network.parameters():
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Predictor":
        """Move the network to a device."""
        self.device, self.network = device, self.network.to(device)
        return self

    @overload
    def predict(
        self, audio: str | Path | np.ndarray, sample_rate: float | None = None
    ) -> Prediction: ...

    @overload
    def predict(
        self,
        audio: list[Any] | tuple[Any, ...] | Iterator[Any],
        sample_rate: float | None = None,
    ) -> Predictions: ...

    def predict(self, audio: Any, sample_rate: float | None = None) -> Prediction | Predictions:
        """Name the emotion in a recording, or in each of several.

        A fault of a recording is part of its answer and raises nothing.

        Args:
            audio: path or URI of an audio or video file, samples as `predict_samples` takes them,
                or several of these.
            sample_rate: of the samples, in hertz.

        Raises:
            ConfigError: samples without a sample rate.
        """
        if isinstance(audio, str | Path):
            return self.predict_features([self.reader.read(str(audio))])[0]
        if not hasattr(audio, "__array__"):
            return Predictions(self.predict(item, sample_rate) for item in audio)
        if sample_rate is None:
            raise ConfigError("samples need their rate in hertz, as in predict(samples, 16000)")
        return self.predict_samples(np.asarray(audio), sample_rate, "samples")

    def predict_stream(self, file: BinaryIO, name: str) -> Prediction:
        """Score the file behind a seekable stream; `name` is what the answer calls it."""
        return self.predict_features([self.reader.read_stream(file, name)])[0]

    def predict_samples(self, samples: np.ndarray, sample_rate: float, name: str) -> Prediction:
        """Score mono samples [num_samples] at a rate in hertz; `name` is what the answer calls it.

        Floats are in [-1, 1], integers on the scale of int16.
        """
        try:
            samples = _as_decoded(samples, sample_rate)
        except ClipError as error:
            return Prediction(path=name, status=error.status, reason=error.reason)
        return self.predict_features([self.reader.read_samples(samples, int(sample_rate), name)])[0]

    def predict_features(self, recordings: Sequence[RecordingFeatures]) -> list[Prediction]:
        """Score the features of some files, together."""
        scores = self._probabilities([clip for item in recordings for clip in item.features])
        ends = np.cumsum([len(item.features) for item in recordings])[:-1]
        by_file = zip(recordings, np.split(scores, ends), strict=True)
        return [self._answer(recording, rows) for recording, rows in by_file]

    def _probabilities(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Score clips as validation does, and calibrate the probabilities.

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
        scores = predict_clips(self.network, clips, rows, self.card.config, len(self.labels))
        return apply_temperature(scores, self.card.temperature)

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
        mean = scores.mean(axis=0)
        status, reason = "ok", None
        if mean.max() < self.min_confidence:
            status = UNSURE
            reason = (
                f"{self.labels[int(mean.argmax())]}, the most probable emotion, has a probability "
                f"of {mean.max():.0%}, below {self.min_confidence:.0%}"
            )
        return Prediction(
            path=recording.path,
            **self._most_probable(mean),
            status=status,
            reason=reason,
            duration=recording.duration,
            timeline=timeline,
            warning=recording.warning,
        )

    def _most_probable(self, probabilities: np.ndarray) -> dict[str, Any]:
        """Name the most probable label of probabilities [labels], if any is probable enough."""
        by_label = dict(zip(self.labels, probabilities.tolist(), strict=True))
        is_sure = probabilities.max() >= self.min_confidence
        emotion = self.labels[int(probabilities.argmax())] if is_sure else None
        return {"emotion": emotion, "probabilities": by_label}


def _as_decoded(samples: np.ndarray, sample_rate: float) -> np.ndarray:
    """Return somebody's samples as `decode` does: float32 in [-1, 1] or int16.

    Raises:
        ClipError: they are not one channel of numbers, or their rate is not possible.
    """
    if samples.ndim != 1 or not samples.size or samples.dtype.kind not in "iuf":
        raise ClipError(
            "unreadable",
            f"samples of shape {list(samples.shape)} and type {samples.dtype} are not one channel "
            "of numbers",
        )
    if sample_rate not in SAMPLE_RATES:
        raise ClipError(
            "unreadable",
            f"the sample rate is {sample_rate}, but {SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} Hz are "
            "read, in whole numbers",
        )
    return full_scale(samples if samples.dtype == np.int16 else samples.astype(np.float32))
