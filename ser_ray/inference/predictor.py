"""Predicts the emotion in recordings with a checkpoint.

`RecordingReader` computes the features of a recording, or of the windows of a long recording.
`predict_clips`, which also scores validation clips, computes the probabilities. They are then
calibrated, and their mean over the windows becomes a `Prediction`. The batch pass, the packaged
model and the demo page call `Predictor`. This module imports neither Ray nor MLflow nor
torchvision, so that a first prediction takes little longer than importing torch.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np
import torch

from ser_ray.errors import ConfigError
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import SAMPLE_RATES, to_full_scale
from ser_ray.inference.prediction import UNSURE, Prediction, Predictions, WindowPrediction
from ser_ray.inference.recordings import RecordingFeatures, RecordingReader
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint import read_card, read_encoder, read_network
from ser_ray.training.data import Clips
from ser_ray.training.model import EncoderHead, fold_batch_norm, to_channels_last
from ser_ray.training.scoring import predict_clips

Recording = str | bytes | os.PathLike[str] | np.ndarray
Recordings = list[Any] | tuple[Any, ...] | Iterator[Any]


class Predictor:
    """A trained model, and the reader that computes its features.

    Args:
        checkpoint: directory of a checkpoint.
        min_confidence: lowest probability of a predicted emotion. If every emotion of a recording
            is less probable, its status is `unsure`, and it gets no emotion.

    Raises:
        CheckpointError: the checkpoint is missing or broken.
        EncoderError: the weights of the model's encoder are missing or broken, or differ from those
            of the training.
        ConfigError: `min_confidence` is not from 0 to 1.
    """

    def __init__(self, checkpoint: Path, min_confidence: float = 0.0) -> None:
        if not 0 <= min_confidence <= 1:
            raise ConfigError(f"min_confidence is {min_confidence}: it must be from 0 to 1")
        self.min_confidence = min_confidence
        self.card = read_card(checkpoint)
        self.labels = self.card.labels
        self.device = torch.device("cpu")
        network = read_network(checkpoint, self.card).requires_grad_(False)
        if not isinstance(network, EncoderHead):
            network = fold_batch_norm(network)
        self.network = to_channels_last(network, self.device)
        self.encoder = read_encoder(checkpoint, self.card)
        config = self.card.config
        self.reader = RecordingReader(self.card.features, config.feature, config.crop_frames)

    def __repr__(self) -> str:
        card = self.card
        return (
            f"{card.network} on {card.config.feature}, trained on {card.trained_on}, "
            f"{card.split['label']}; labels: {', '.join(self.labels)}"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of the card, the minimum confidence and the weights, as 16 hex digits."""
        settings = f"{self.min_confidence} {self.card.to_json()}"
        digest = hashlib.blake2b(settings.encode(), digest_size=8)
        for weight in self.network.parameters():
            digest.update(weight.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> "Predictor":
        """Move the network, and the encoder if there is one, to a device."""
        self.device, self.network = device, self.network.to(device)
        if self.encoder is not None:
            self.encoder.to(device)
        return self

    @overload
    def predict(self, audio: Recording, sample_rate: float | None = None) -> Prediction: ...

    @overload
    def predict(self, audio: Recordings, sample_rate: float | None = None) -> Predictions: ...

    def predict(self, audio: Any, sample_rate: float | None = None) -> Prediction | Predictions:
        """Predict the emotion in a recording, or in several recordings.

        A recording that cannot be scored raises no error: its prediction gives the reason.

        Args:
            audio: path or URI of an audio or video file, samples as for `predict_samples`, or an
                iterable of these. A list of numbers holds samples.
            sample_rate: sample rate of the samples in hertz.

        Raises:
            ConfigError: `audio` has another type, or holds samples without a sample rate.
        """
        if isinstance(audio, str | bytes | os.PathLike):
            return self.predict_file(os.fsdecode(audio))
        if isinstance(audio, list | tuple) and audio and isinstance(audio[0], Real):
            audio = np.asarray(audio)
        if not hasattr(audio, "__array__") or np.asarray(audio).dtype.kind in "OU":
            if isinstance(audio, Mapping) or not isinstance(audio, Iterable):
                raise ConfigError(
                    f"a recording is of type {type(audio).__name__}: give a path, an array of "
                    "samples and their rate, or a list of these"
                )
            return Predictions(self.predict(item, sample_rate) for item in audio)
        if sample_rate is None:
            raise ConfigError("samples need their rate in hertz, as in predict(samples, 16000)")
        return self.predict_samples(np.asarray(audio), sample_rate, "samples")

    def predict_file(self, file: str | BinaryIO, name: str = "") -> Prediction:
        """Predict the emotion in a file (path or URI) or seekable stream, shown as `name`."""
        return self.predict_features([self.reader.read(file, name=name)])[0]

    def predict_samples(self, samples: np.ndarray, sample_rate: float, name: str) -> Prediction:
        """Predict the emotion in mono samples.

        Args:
            samples: [num_samples], floats in [-1, 1] or integers on the scale of int16.
            sample_rate: rate of the samples in hertz.
            name: name of the recording in the prediction.
        """
        try:
            samples = _as_decoded(samples, sample_rate)
        except ClipError as error:
            return Prediction(path=name, status=error.status, reason=error.reason)
        return self.predict_features([self.reader.read_samples(samples, int(sample_rate), name)])[0]

    def predict_features(self, recordings: Sequence[RecordingFeatures]) -> list[Prediction]:
        """Predict the emotion in several recordings together, from their features."""
        probabilities = self._probabilities([clip for item in recordings for clip in item.features])
        ends = np.cumsum([len(item.features) for item in recordings])[:-1]
        by_recording = np.split(probabilities, ends)
        return [self._prediction(*pair) for pair in zip(recordings, by_recording, strict=True)]

    def _probabilities(self, features: Sequence[np.ndarray]) -> np.ndarray:
        """Compute calibrated probabilities, as for the validation clips of the training.

        Args:
            features: for each clip, [bins, frames] float16, or the waveform for an encoder.

        Returns:
            Probability of every label, float64 [clips, labels].
        """
        if not features:
            return np.zeros((0, len(self.labels)))
        if self.encoder is not None:
            layers = self.encoder.encode(features).astype(np.float16)  # as in the shards
            features = list(layers.reshape(len(layers), -1, 1))
        num_frames = np.array([clip.shape[1] for clip in features])
        rows, no_labels = np.arange(len(features)), np.zeros(len(features))
        normalisation = self.card.normalisation
        clips = Clips.resident(features, num_frames, no_labels, normalisation, self.device)
        scores = predict_clips(self.network, clips, rows, self.card.config, len(self.labels))
        return apply_temperature(scores, self.card.temperature)

    def _prediction(self, recording: RecordingFeatures, probabilities: np.ndarray) -> Prediction:
        """Make the prediction for a recording with these probabilities [windows, labels]."""
        if recording.prediction.status != "ok":
            return recording.prediction
        answer = self._most_probable(probabilities.mean(axis=0))
        if answer["emotion"] is None:
            label, highest = max(answer["probabilities"].items(), key=itemgetter(1))
            answer["status"] = UNSURE
            answer["reason"] = (
                f"{label}, the most probable emotion, has a probability of {highest:.0%}, below "
                f"{self.min_confidence:.0%}"
            )
        timeline = tuple(
            WindowPrediction(start=start, end=end, **self._most_probable(row))
            # A recording that is scored as one clip has probabilities, but no windows.
            for (start, end), row in zip(recording.windows, probabilities, strict=False)
        )
        return replace(recording.prediction, **answer, timeline=timeline)

    def _most_probable(self, probabilities: np.ndarray) -> dict[str, Any]:
        """Return the emotion (None below the minimum confidence) and the probability by label."""
        by_label = dict(zip(self.labels, probabilities.tolist(), strict=True))
        label, highest = max(by_label.items(), key=itemgetter(1))
        return {
            "emotion": label if highest >= self.min_confidence else None,
            "probabilities": by_label,
        }


def _as_decoded(samples: np.ndarray, sample_rate: Any) -> np.ndarray:
    """Convert a user's samples to the form that `decode` returns: float32 in [-1, 1] or int16.

    Integers of every type are on the scale of int16, because JSON has no types of integers.

    Raises:
        ClipError: the samples are not one channel of numbers, are too large to be sound, or have a
            rate that is not accepted.
    """
    if samples.ndim != 1 or not samples.size or samples.dtype.kind not in "iuf":
        raise ClipError(
            "unreadable",
            f"samples of shape {list(samples.shape)} and type {samples.dtype} are not one channel "
            "of numbers",
        )
    if not isinstance(sample_rate, Real):
        kind = type(sample_rate).__name__
        raise ClipError("unreadable", f"the sample rate is not a number but of type {kind}")
    if sample_rate not in SAMPLE_RATES:
        raise ClipError(
            "unreadable",
            f"the sample rate is {sample_rate}: it must be a whole number from {SAMPLE_RATES[0]} "
            f"to {SAMPLE_RATES[-1]} Hz",
        )
    scale = np.iinfo(np.int16)
    if samples.dtype.kind in "iu" and scale.min <= samples.min() and samples.max() <= scale.max:
        return to_full_scale(samples.astype(np.int16))
    return to_full_scale(samples.astype(np.float32))
