"""Reads the clips of a fold from the shards into memory, and makes the batches of every epoch.

A training reads the features of its clips once, normalises them and keeps them in the device's
memory, so no step reads clips from storage or copies them from the host. The order of the clips in
an epoch depends only on (seed, epoch), so it is the same on every worker. `streaming` reads clips
that do not fit into memory. Both kinds of training clips are a `Source`.

Features in memory are [clips, frames, bins] float16, so that a crop copies whole frames. The
features of an encoder have one frame per clip, whose bins are the values of all layers.
"""

from collections.abc import Iterator, Sequence
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

MIN_STD = 1e-4
"""A bin with a smaller standard deviation is constant, such as a mel band without any bin of the
Fourier transform. Its deviation counts as 1, so that it is not amplified."""
BALANCE_PASSES = 100
"""How often labels and corpora are balanced in turn, because each unbalances the other."""


Features = np.ndarray | Sequence[np.ndarray]
"""Features of several clips [clips, bins, frames], or an array [bins, frames] for each clip."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of every bin over all valid training frames [bins]."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def from_sums(cls, sums: np.ndarray, num_frames: int) -> "Normalisation":
        """Compute mean and deviation from the `frame_sums` [2, bins] of `num_frames` frames."""
        mean, squares = sums / max(num_frames, 1)
        std = np.sqrt(np.maximum(squares - mean**2, 0.0))
        return cls(mean, np.where(std < MIN_STD, 1.0, std))

    def frames_first(
        self, features: Features, num_frames: np.ndarray, max_frames: int
    ) -> np.ndarray:
        """Normalise features to mean 0 and standard deviation 1, and put frames before bins.

        Returns:
            [clips, max_frames, bins] float16. The frames after `num_frames` [clips] are 0.
        """
        mean, std = self.mean.astype(np.float32), self.std.astype(np.float32)
        padded = np.zeros((len(features), max_frames, len(mean)), np.float16)
        for row, clip, length in zip(padded, features, num_frames, strict=True):
            row[:length] = (clip[:, :length].T - mean) / std
        return padded


def frame_sums(features: np.ndarray, num_frames: np.ndarray) -> np.ndarray:
    """Sum features [clips, bins, frames], and their squares, over all valid frames [2, bins]."""
    sums = np.zeros((2, features.shape[1]))
    for clip, length in zip(features, num_frames, strict=True):
        valid = clip[:, :length].astype(np.float64)
        sums += valid.sum(axis=1), np.square(valid).sum(axis=1)
    return sums


@dataclass(frozen=True, slots=True)
class Clips:
    """Clips in the memory of a device. A clip that is too long for one row has several rows.

    Args:
        features: [rows, frames, bins] float16, normalised; 0 after the valid frames of a row.
        num_frames: number of valid frames [rows].
        labels: label indices [rows].
        owners: index of the clip of each row [rows], ascending from 0. The scores of a clip cover
            all of its rows. If None, each row is a clip of its own.
        weights: how often each row is drawn (`sampling_weights`) [rows].
    """

    features: Tensor
    num_frames: Tensor
    labels: Tensor
    owners: np.ndarray | None = None
    weights: Tensor | None = None

    @classmethod
    def resident(
        cls,
        features: Features,
        num_frames: np.ndarray,
        labels: np.ndarray,
        normalisation: Normalisation,
        device: torch.device,
    ) -> "Clips":
        """Normalise raw features and copy them to the device."""
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
    def first_rows(self) -> np.ndarray:
        """The first row of every clip [clips]."""
        if self.owners is None:
            return np.arange(len(self))
        return np.unique(self.owners, return_index=True)[1]

    @property
    def truth(self) -> np.ndarray:
        """Label index of every clip [clips]."""
        labels: np.ndarray = self.labels.cpu().numpy()
        return labels[self.first_rows]

    def crop(self, rows: Tensor, starts: Tensor, crop_frames: int) -> tuple[Tensor, Tensor]:
        """Cut crops from rows.

        Args:
            rows: row of each crop [crops].
            starts: first frame of each crop [crops]. It may be negative.
            crop_frames: length of every crop.

        Returns:
            The crops [crops, 1, bins, crop_frames] float32, and a mask of their valid frames
            [crops, 1, 1, crop_frames] bool. The other frames are 0.
        """
        frames = starts[:, None] + torch.arange(crop_frames, device=starts.device)
        valid = (frames >= 0) & (frames < self.num_frames[rows, None])
        inside = frames.clamp(0, self.features.shape[1] - 1)
        crops = self.features[rows[:, None], inside].float() * valid[:, :, None]
        return crops.transpose(1, 2).unsqueeze(1), valid[:, None, None, :]

    def batches(
        self, recipe: TrainConfig, world: World, epoch: int, step: int
    ) -> Iterator["Batch"]:
        """Yield batches as `Source` defines them. Every worker gets complete batches."""
        size = min(recipe.batch_size, len(self))
        first_step = step
        for this_epoch in count(epoch):
            order = epoch_order(recipe.seed, this_epoch, len(self), self.weights)
            order = order.to(self.labels.device)
            for this_step in range(first_step, steps_per_epoch(len(self), size)):
                rows = order[this_step * size : (this_step + 1) * size]
                seed = seed_of(recipe.seed, this_epoch, this_step)
                yield Batch(self, rows, world.rank_slice, seed)
            first_step = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch of a step, as one worker gets it.

    Args:
        clips: the clips that the batch is taken from.
        rows: rows of `clips` to augment [rows].
        rank_slice: which of the augmented clips this worker trains on.
        seed: seed of the augmentation.
    """

    clips: Clips
    rows: Tensor
    rank_slice: slice
    seed: int


class Source(Protocol):
    """Training clips, resident (`Clips`) or streamed (`ser_ray.training.streaming.Stream`)."""

    def __len__(self) -> int:
        """Return the number of training rows."""

    def batches(self, recipe: TrainConfig, world: World, epoch: int, step: int) -> Iterator[Batch]:
        """Yield the batches of all steps, beginning with this step of this epoch.

        The batches depend only on the arguments. Every epoch has `steps_per_epoch` batches. The
        clips of a step, over all workers, do not depend on the number of workers.
        """


Train_co = TypeVar("Train_co", bound=Source, covariant=True)


@dataclass(frozen=True, slots=True)
class FoldData(Generic[Train_co]):
    """The training and validation clips of a fold, with its split, labels and normalisation."""

    train: Train_co
    validation: Clips
    split: Split
    labels: tuple[str, ...]
    normalisation: Normalisation


def load_fold(shards: ShardSet, recipe: TrainConfig, device: torch.device) -> FoldData[Clips]:
    """Read the training and validation clips of a fold into the device's memory."""
    table = shards.clips()
    split = select_rows(table, recipe)
    labels = label_indices(table, shards.card.labels)
    num_frames = num_input_frames(shards, recipe.feature, table)
    raw, num_frames = read_features(shards, recipe.feature, split.train), num_frames[split.train]
    normalisation = Normalisation.from_sums(frame_sums(raw, num_frames), int(num_frames.sum()))
    train = Clips.resident(raw, num_frames, labels[split.train], normalisation, device)
    train = replace(train, weights=sampling_weights(table.take(split.train), recipe))
    validation = load_clips(shards, recipe.feature, table, split.validation, normalisation, device)
    return FoldData(train, validation, split, shards.card.labels, normalisation)


def num_input_frames(shards: ShardSet, kind: str, clips: pa.Table) -> np.ndarray:
    """Return the number of valid frames that the network gets from each row, int64 [rows]."""
    if shards.card.encoder_of(kind) is not None:
        return np.ones(len(clips), np.int64)
    return clips["num_frames"].to_numpy().astype(np.int64)


def read_features(shards: ShardSet, kind: str, rows: np.ndarray) -> np.ndarray:
    """Read features [rows, bins, frames] float16. The features of an encoder have one frame."""
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
    """Read the clips to score, with all rows of long clips, into the device's memory.

    Args:
        shards: the shard set.
        kind: kind of the features.
        table: `shards.clips()`.
        rows: first row of every clip to score [clips].
        normalisation: the normalisation that the network was trained with.
        device: where the clips are scored.
        labels: the network's labels. If empty, those of the shards are used.
    """
    windows, owners = windows_of(table["window"].to_numpy(), rows)
    selected = table.select(["emotion", "num_frames"]).take(windows)
    raw = read_features(shards, kind, windows)
    indices = label_indices(selected, labels or shards.card.labels)
    num_frames = num_input_frames(shards, kind, selected)
    clips = Clips.resident(raw, num_frames, indices, normalisation, device)
    return replace(clips, owners=owners)


def label_indices(clips: pa.Table, labels: tuple[str, ...]) -> np.ndarray:
    """Return the index of each clip's emotion in `labels`, int64 [clips]."""
    position = {label: index for index, label in enumerate(labels)}
    return np.asarray([position[name] for name in clips["emotion"].to_pylist()], dtype=np.int64)


def seed_of(*integers: int) -> int:
    """Hash integers, such as seed, epoch and step, into one 63-bit seed."""
    high, low = np.random.SeedSequence(integers).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Return the number of full batches in an epoch; 1 if there are too few rows for one."""
    return max(num_rows // batch_size, 1)


def sampling_weights(clips: pa.Table, recipe: TrainConfig) -> Tensor | None:
    """Return the relative sampling weight of each training row, float64 [rows].

    Return None if the recipe balances neither labels nor corpora, or if there is only one corpus to
    balance. Then no row is drawn twice in an epoch.
    """
    powers = {"emotion": float(recipe.balanced), "corpus": recipe.corpus_balance}
    powers = {name: power for name, power in powers.items() if name in clips.column_names and power}
    weights = np.ones(len(clips))
    groups = {name: np.unique(clips[name].to_pylist(), return_inverse=True)[1] for name in powers}
    for _ in range(BALANCE_PASSES if len(powers) > 1 else 1):
        for name, power in powers.items():
            counts, sums = np.bincount(groups[name]), np.bincount(groups[name], weights)
            weights *= (counts ** (1.0 - power) / sums)[groups[name]]
    return torch.from_numpy(weights) if powers else None


def epoch_order(seed: int, epoch: int, num_rows: int, weights: Tensor | None = None) -> Tensor:
    """Return the order of the training rows in an epoch, int64 [rows], the same on all workers.

    Without weights, the order is a permutation. With weights, rows are drawn with replacement.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, epoch))
    if weights is None:
        return torch.randperm(num_rows, generator=generator)
    return torch.multinomial(weights, num_rows, replacement=True, generator=generator)
