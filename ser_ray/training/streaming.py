"""Training clips that do not fit into memory: every epoch reads them from the shards again.

As with resident clips, the order of the clips and the batches of an epoch depend on (seed, epoch),
but not on the number of workers. The steps and learning rates are the same, and a training can also
resume in mid-epoch. But the clips of a shard are stored together, so it is fastest to read them
together. `stream_order` shuffles the shards, and the clips within each shard, into one sequence.
The sequence is cut into *lanes*, as many as a batch has clips, and each step uses the next clip of
every lane. So the clips of a step come from different parts of the sequence, and mostly from
different shards. With N workers, each worker has every N-th lane, and reads only the shards of its
lanes.

Streamed clips differ from resident clips in three points:

- Each lane reads one shard after another, so the clips are shuffled less than by a random
  permutation of all clips.
- A worker augments only its own clips, not the complete batch. Therefore the augmentation depends
  on the number of workers, most of all the pairs of clips in MixStyle and mixup.
- A shard may be read by several workers, and several times by each of them.

The validation clips are resident in any case. This module does not use Ray: a `Fetch` decides where
and how early clips are read.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ser_ray.corpus.splits import windows_of
from ser_ray.shards.read import ShardSet
from ser_ray.training.data import (
    Batch,
    Clips,
    FoldData,
    Normalisation,
    epoch_order,
    frame_sums,
    label_indices,
    load_clips,
    num_input_frames,
    read_features,
    sampling_weights,
    seed_of,
    steps_per_epoch,
)
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.world import World

READ_BYTES = 128 * 2**20
"""How many bytes of clips a worker reads at once. Ray Data prefers blocks of this size."""

Fetch = Callable[[Callable[[Any], np.ndarray], Sequence[Any]], Iterable[np.ndarray]]
"""Calls a function for each item, and yields the results in order, as `map` does. It may call the
function early and in other processes, and may split an array into several along the first axis."""


class StepRange(NamedTuple):
    """The steps of an epoch from `first` up to, but not including, `last`."""

    epoch: int
    first: int
    last: int


def stream_order(
    seed: int, epoch: int, shard_of: np.ndarray, batch_size: int, weights: Tensor | None = None
) -> np.ndarray:
    """Return the training clips of every step of an epoch, int64 [steps, batch_size].

    Args:
        shard_of: index of the shard of each training clip [clips].
        weights: how often each clip is drawn (`ser_ray.training.data.sampling_weights`).
    """
    rng = np.random.default_rng(seed_of(seed, epoch))
    position_of_shard = rng.permutation(int(shard_of.max()) + 1)
    clips = epoch_order(seed, epoch, len(shard_of), weights).numpy()
    sequence = clips[np.argsort(position_of_shard[shard_of[clips]], kind="stable")]
    num_steps = steps_per_epoch(len(shard_of), batch_size)
    return sequence[: num_steps * batch_size].reshape(batch_size, num_steps).T


@dataclass(frozen=True, slots=True)
class Lanes:
    """The lanes of one worker. A `Fetch` may copy them to the processes that read the clips."""

    recipe: TrainConfig
    world: World
    shard_of: np.ndarray
    weights: Tensor | None = None
    """`shard_of` and `weights` are those of the `Stream`."""

    @property
    def batch_size(self) -> int:
        """Number of clips in a step over all workers."""
        return min(self.recipe.batch_size, len(self.shard_of))

    @property
    def clips_per_step(self) -> int:
        """Number of clips in a step for this worker."""
        return len(range(self.batch_size)[self.world.rank_slice])

    def step_ranges(self, epoch: int, step: int, length: int) -> list[StepRange]:
        """Divide the steps from this step to the end of the training into short ranges.

        A range has at most `length` steps, all of the same epoch.
        """
        num_steps = steps_per_epoch(len(self.shard_of), self.batch_size)
        return [
            StepRange(this_epoch, first, min(first + length, num_steps))
            for this_epoch in range(epoch, self.recipe.epochs)
            for first in range(step if this_epoch == epoch else 0, num_steps, length)
        ]

    def clips(self, steps: StepRange) -> np.ndarray:
        """Return this worker's clips in a range of steps [steps * clips_per_step]."""
        order = stream_order(
            self.recipe.seed, steps.epoch, self.shard_of, self.batch_size, self.weights
        )
        return order[steps.first : steps.last, self.world.rank_slice].ravel()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads training clips from the shards."""

    shards: ShardSet
    kind: str
    rows: np.ndarray
    """Row of each training clip in the shards [clips]."""
    num_frames: np.ndarray
    """Number of valid frames of each training clip, int64 [clips]."""

    @property
    def clips_at_once(self) -> int:
        """Number of clips that fit into READ_BYTES; at least 1."""
        num_values = self.shards.card.num_bins(self.kind) * int(self.num_frames.max(initial=1))
        return max(READ_BYTES // (num_values * np.dtype(np.float16).itemsize), 1)

    def sum_frames(self, clips: np.ndarray) -> np.ndarray:
        """Return the `frame_sums` of training clips [1, 2, bins]."""
        return frame_sums(self._features(clips), self.num_frames[clips])[None]

    def read(self, clips: np.ndarray, normalisation: Normalisation) -> np.ndarray:
        """Read training clips and normalise them, as in `Clips.features` [clips, frames, bins]."""
        max_frames = int(self.num_frames.max())
        return normalisation.frames_first(self._features(clips), self.num_frames[clips], max_frames)

    def _features(self, clips: np.ndarray) -> np.ndarray:
        return read_features(self.shards, self.kind, self.rows[clips])


@dataclass(frozen=True, slots=True)
class Stream:
    """Training clips that are read for a few steps at a time.

    Args:
        reader: reads the clips.
        shard_of: index of the shard of each clip [clips].
        labels: label indices [clips], on the device that trains.
        normalisation: how the clips are normalised.
        fetch: calls the reader for each range of steps.
        weights: how often each clip is drawn (`ser_ray.training.data.sampling_weights`).
    """

    reader: Reader
    shard_of: np.ndarray
    labels: Tensor
    normalisation: Normalisation
    fetch: Fetch
    weights: Tensor | None

    def __len__(self) -> int:
        return len(self.shard_of)

    def batches(self, recipe: TrainConfig, world: World, epoch: int, step: int) -> Iterator[Batch]:
        """Yield batches as `Source` defines them. A worker gets only its own clips of each batch.

        Clips are copied to the device for several steps at a time.
        """
        reader, normalisation = self.reader, self.normalisation
        lanes = Lanes(recipe, world, self.shard_of, self.weights)
        size, device = lanes.clips_per_step, self.labels.device
        ranges = lanes.step_ranges(epoch, step, max(reader.clips_at_once // size, 1))
        arrays = iter(self.fetch(lambda r: reader.read(lanes.clips(r), normalisation), ranges))
        num_frames = torch.from_numpy(reader.num_frames).to(device)
        all_rows = torch.arange(size, device=device)
        ready = torch.empty(0)
        for steps in ranges:
            clips = torch.from_numpy(lanes.clips(steps)).to(device)
            for this_step, rows in enumerate(clips.split(size), start=steps.first):
                while len(ready) < size:
                    array = torch.from_numpy(next(arrays)).to(device)
                    ready = torch.cat((ready, array)) if len(ready) else array
                rank = (world.rank,) if world.size > 1 else ()
                seed = seed_of(recipe.seed, steps.epoch, this_step, *rank)
                batch = Clips(ready[:size], num_frames[rows], self.labels[rows])
                yield Batch(batch, all_rows, slice(None), seed)
                ready = ready[size:]


def stream_fold(
    shards: ShardSet,
    recipe: TrainConfig,
    device: torch.device,
    world: World,
    fetch: Fetch,
    normalisation: Normalisation | None,
) -> FoldData[Stream]:
    """Prepare to stream the training clips of a fold, and read its validation clips into memory.

    Args:
        shards: the shard set.
        recipe: the recipe.
        device: where the network is trained.
        world: the workers.
        fetch: reads the training clips.
        normalisation: that of the checkpoint to resume from. If None, the workers together read
            all training clips once to measure it.
    """
    table = shards.clips()
    split = select_rows(table, recipe)
    labels = label_indices(table, shards.card.labels)
    num_frames = num_input_frames(shards, recipe.feature, table)
    reader = Reader(shards, recipe.feature, split.train, num_frames[split.train])
    normalisation = normalisation or _measure_normalisation(reader, device, world, fetch)
    validation = load_clips(shards, recipe.feature, table, split.validation, normalisation, device)
    sizes = shards.card.shard_sizes
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[split.train]
    train_labels = torch.from_numpy(labels[split.train]).to(device)
    weights = sampling_weights(table.take(split.train), recipe)
    train = Stream(reader, shard_of, train_labels, normalisation, fetch, weights)
    return FoldData(train, validation, split, shards.card.labels, normalisation)


def resident_bytes(shards: ShardSet, recipe: TrainConfig) -> int:
    """Return how much memory a fold's training and validation clips need if they are resident.

    Features are read as long as they are stored. Afterwards, they may be cut to the longest clip.
    """
    table = shards.clips()
    split = select_rows(table, recipe)
    validation, _ = windows_of(table["window"].to_numpy(), split.validation)
    num_values = math.prod(shards.card.shape_of(recipe.feature))
    return (len(split.train) + len(validation)) * num_values * np.dtype(np.float16).itemsize


def _measure_normalisation(
    reader: Reader, device: torch.device, world: World, fetch: Fetch
) -> Normalisation:
    """Measure the normalisation of the training clips. Each worker reads a share of the clips."""
    clips, length = np.argsort(reader.rows), reader.clips_at_once
    chunks = [clips[first : first + length] for first in range(0, len(clips), length)]
    my_chunks = chunks[world.rank_slice]
    sums = np.zeros((2, reader.shards.card.num_bins(reader.kind)))
    if my_chunks:
        for array in fetch(reader.sum_frames, my_chunks):
            sums += array.sum(axis=0)
    total = world.all_reduce_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
    return Normalisation.from_sums(total, int(reader.num_frames.sum()))
