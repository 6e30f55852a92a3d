"""Shards to resident tensors, and from these to the batches of an epoch.

A training reads its feature column once and keeps it in the device's memory. The order of the rows
in an epoch is drawn from (seed, epoch), equally on every worker. No step reads from storage or
copies from the host.

Clips that do not fit into memory come from `training.streaming` instead. Both are a `Source`.

Shapes: features are kept as [clips, frames, bins] float16, so that a crop copies whole frames. The
features of an encoder have one frame per clip, and its bins are the values of all layers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Generic, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ser_ray.corpus.splits import Split, windows_of
from ser_ray.shards.read import ShardSet
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.world import World

MIN_STD = 1e-3
"""Smallest standard deviation to divide by, in dB, so that nearly constant bins are not amplified.
"""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of every bin over the training clips' valid frames."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray, num_frames: np.ndarray) -> "Normalisation":
        """Measure features [clips, bins, frames] over the first `num_frames` frames of each."""
        return cls.from_sums(frame_sums(features, num_frames), int(num_frames.sum()))

    @classmethod
    def from_sums(cls, sums: np.ndarray, num_frames: int) -> "Normalisation":
        """Compute mean and deviation from `frame_sums` [2, bins] over `num_frames` frames."""
        mean, squares = sums / max(num_frames, 1)
        std = np.sqrt(np.maximum(squares - mean**2, 0.0))
        return cls(mean, np.maximum(std, MIN_STD))

    def apply(self, features: np.ndarray) -> np.ndarray:
        """Normalise [..., bins, frames] to mean 0 and standard deviation 1, as float16."""
        scaled = (features - self.mean[:, None].astype(np.float32)) / self.std[:, None].astype(
            np.float32
        )
        return scaled.astype(np.float16)

    def frames_first(
        self, features: np.ndarray, num_frames: np.ndarray, max_frames: int
    ) -> np.ndarray:
        """Normalise clips [clips, bins, frames] for training: [clips, max_frames, bins] float16.

        Frames beyond a clip's `num_frames` are 0.
        """
        padded = np.zeros((len(features), max_frames, features.shape[1]), np.float16)
        for row, (clip, length) in enumerate(zip(features, num_frames, strict=True)):
            padded[row, :length] = self.apply(clip[:, :length]).T
        return padded


def frame_sums(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """Sum the valid frames of features [clips, bins, frames], and their squares [2, bins]."""
    sums = np.zeros((2, features.shape[1]))
    for clip, length in zip(features, num_frames, strict=True):
        valid = clip[:, :length].astype(np.float64)
        sums += valid.sum(axis=1), np.square(valid).sum(axis=1)
    return sums


@dataclass(frozen=True, slots=True)
class Clips:
    """Clips resident on a device.

    Args:
        features: [clips, frames, bins] float16, normalised, 0 beyond a clip's valid frames.
        num_frames: valid frames [clips].
        labels: label indices [clips].
        owners: if rows are windows of long clips, the index of each row's clip [clips], ascending
            from 0. All rows of a clip are scored together. If None, each row is a clip.
        weights: how often each clip is drawn (`sampling_weights`).
    """

    features: Tensor
    num_frames: Tensor
    labels: Tensor
    owners: np.ndarray | None = None
    weights: Tensor | None = None

    @classmethod
    def resident(
        cls,
        features: np.ndarray,
        num_frames: np.ndarray,
        labels: np.ndarray,
        normalisation: Normalisation,
        device: torch.device,
    ) -> "Clips":
        """Normalise raw features [clips, bins, frames] and put them on the device."""
        max_frames = int(num_frames.max(initial=1))
        padded = normalisation.frames_first(features, num_frames, max_frames)
        return cls(
            torch.from_numpy(padded).to(device),
            torch.from_numpy(num_frames.astype(np.int64)).to(device),
            torch.from_numpy(labels.astype(np.int64)).to(device),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def first_windows(self) -> np.ndarray:
        """The first row of every scored clip [scored]."""
        if self.owners is None:
            return np.arange(len(self))
        return np.unique(self.owners, return_index=True)[1]

    @property
    def truth(self) -> np.ndarray:
        """Label index of every scored clip [scored]."""
        labels: np.ndarray = self.labels.cpu().numpy()
        return labels[self.first_windows]

    def crop(self, rows: Tensor, starts: Tensor, crop_frames: int) -> tuple[Tensor, Tensor]:
        """Cut crops from clips.

        Args:
            rows: index of each crop's clip [crops].
            starts: first frame of each crop [crops]. Frames outside the clip are 0.
            crop_frames: length of every crop.

        Returns:
            The crops [crops, 1, bins, crop_frames] float32 and their valid frames
            [crops, 1, 1, crop_frames] bool.
        """
        frames = starts[:, None] + torch.arange(crop_frames, device=starts.device)
        valid = (frames >= 0) & (frames < self.num_frames[rows, None])
        inside = frames.clamp(0, self.features.shape[1] - 1)
        crops = self.features[rows[:, None], inside].float() * valid[:, :, None]
        return crops.transpose(1, 2).unsqueeze(1), valid[:, None, None, :]

    def batches(
        self, config: TrainConfig, world: World, epoch: int, step: int
    ) -> Iterator["Batch"]:
        """Yield batches (`Source`). Each worker gets the complete batch and its share of it."""
        size = min(config.batch_size, len(self))
        for number in count(epoch):
            order = epoch_order(config.seed, number, len(self), self.weights)
            order = order.to(self.labels.device)
            for index in range(step, steps_per_epoch(len(self), size)):
                rows = order[index * size : (index + 1) * size]
                yield Batch(self, rows, world.rank_slice, seed_of(config.seed, number, index))
            step = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's batch, for one worker.

    Args:
        clips: the clips that `rows` index.
        rows: clips to augment [rows].
        rank_slice: which of the augmented clips this worker trains on.
        seed: seed of the augmentation.
    """

    clips: Clips
    rows: Tensor
    rank_slice: slice
    seed: int


class Source(Protocol):
    """Training clips, resident or streamed."""

    def __len__(self) -> int:
        """Number of training clips."""

    def batches(self, config: TrainConfig, world: World, epoch: int, step: int) -> Iterator[Batch]:
        """Yield the batches from this step of this epoch to the end of the training.

        The arguments alone determine the batches. Every epoch has `steps_per_epoch` of them, and
        the clips of a batch over all workers do not depend on the number of workers.
        """


Train_co = TypeVar("Train_co", bound=Source, covariant=True)


@dataclass(frozen=True, slots=True)
class FoldData(Generic[Train_co]):
    """A fold's training and validation clips, with its split, labels and normalisation."""

    train: Train_co
    validation: Clips
    split: Split
    labels: tuple[str, ...]
    normalisation: Normalisation


def load_fold(shards: ShardSet, config: TrainConfig, device: torch.device) -> FoldData[Clips]:
    """Read a fold's training and validation clips into the device's memory."""
    table = shards.clips()
    parts = select_rows(table, config)
    labels = label_indices(table, shards.card.labels)
    num_frames = frames_of(shards, config.feature, table)
    raw = inputs_of(shards, config.feature, parts.train)
    normalisation = Normalisation.of(raw, num_frames[parts.train])
    train = Clips.resident(raw, num_frames[parts.train], labels[parts.train], normalisation, device)
    train = replace(train, weights=sampling_weights(table.take(parts.train), config))
    validation = load_clips(shards, config.feature, table, parts.validation, normalisation, device)
    return FoldData(train, validation, parts, shards.card.labels, normalisation)


def frames_of(shards: ShardSet, kind: str, clips: pa.Table) -> np.ndarray:
    """Valid frames of every clip in a network's input, int64 [clips]."""
    if shards.card.encoder_of(kind) is not None:
        return np.ones(len(clips), np.int64)
    return clips["num_frames"].to_numpy().astype(np.int64)


def inputs_of(shards: ShardSet, kind: str, rows: np.ndarray) -> np.ndarray:
    """Read features [rows, bins, frames] float16; those of an encoder have one frame."""
    features = shards.features(kind, rows)
    if shards.card.encoder_of(kind) is not None:
        return features.reshape(len(rows), shards.card.num_bins(kind), 1)
    return features


def load_clips(
    shards: ShardSet,
    kind: str,
    table: pa.Table,
    rows: np.ndarray,
    normalisation: Normalisation,
    device: torch.device,
    labels: tuple[str, ...] = (),
) -> Clips:
    """Read the clips to be scored, with all windows of long clips, into the device's memory.

    Args:
        shards: the shard set.
        kind: kind of the features.
        table: `shards.clips()`.
        rows: row of the first window of every clip [scored].
        normalisation: the normalisation that the network was trained with.
        device: where the clips are scored.
        labels: the network's labels; those of the shards if empty.
    """
    windows, owners = windows_of(table["window"].to_numpy(), rows)
    found = table.select(["emotion", "num_frames"]).take(windows)
    raw = inputs_of(shards, kind, windows)
    classes = label_indices(found, labels or shards.card.labels)
    num_frames = frames_of(shards, kind, found)
    clips = Clips.resident(raw, num_frames, classes, normalisation, device)
    return replace(clips, owners=owners)


def label_indices(clips: pa.Table, labels: tuple[str, ...]) -> np.ndarray:
    """Index of every clip's emotion among the labels, int64 [clips]."""
    position = {label: index for index, label in enumerate(labels)}
    return np.asarray([position[name] for name in clips["emotion"].to_pylist()], dtype=np.int64)


def seed_of(*parts: int) -> int:
    """Hash integers, such as (seed, epoch, step), into one 63-bit seed."""
    high, low = np.random.SeedSequence(parts).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Number of full batches in an epoch; 1 if there are fewer rows than a batch has."""
    return max(num_rows // batch_size, 1)


def sampling_weights(clips: pa.Table, config: TrainConfig) -> Tensor | None:
    """Compute how often each training clip is drawn, relative to the others, float64 [clips].

    Returns:
        None if the recipe balances nothing: every clip is drawn once in an epoch.
    """
    powers = {"emotion": float(config.balanced), "corpus": config.corpus_balance}
    powers = {name: power for name, power in powers.items() if name in clips.column_names and power}
    weights = np.ones(len(clips))
    for name, power in powers.items():
        groups = np.unique(clips[name].to_pylist(), return_inverse=True)[1]
        weights *= (1.0 / np.bincount(groups)[groups]) ** power
    return torch.from_numpy(weights) if powers else None


def epoch_order(seed: int, epoch: int, num_rows: int, weights: Tensor | None = None) -> Tensor:
    """Order of the training rows in an epoch, int64 [rows], equal on every worker.

    Without weights, the order is a permutation. With weights, rows are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    if weights is None:
        return torch.randperm(num_rows, generator=generator)
    return torch.multinomial(weights, num_rows, replacement=True, generator=generator)
