"""Training clips that do not fit into memory: every epoch reads them again from storage.

As with resident clips, the clips of an epoch and its batches follow from (seed, epoch) for any
number of workers. Steps, learning rates and resuming in mid-epoch are therefore the same. But the
clips of a shard are stored together and are best read together, so the shards are
shuffled, and the clips within each shard. This sequence is cut into *lanes*, as many as a batch has
clips, and each step uses the next clip of every lane. The clips of a step therefore come from all
over the sequence. With N workers, a worker owns every N-th lane, and reads only the shards that its
lanes reach.

Streaming differs from resident clips in this:

- Each lane reads one shard after another, so batches are shuffled less than by a permutation.
- A worker augments only its own clips. With resident clips, it augments the complete batch. The
  augmentation of streamed clips therefore depends on the number of workers, most of all the pairs
  of MixStyle and mixup.
- Several workers may read the same shard, and each of them reads it once for each window that needs
  it.
- The validation clips are still resident.

This module does not use Ray: a `Fetch` decides how clips are read ahead.
"""

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
    frames_of,
    inputs_of,
    label_indices,
    load_clips,
    sampling_weights,
    seed_of,
    steps_per_epoch,
)
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.world import World

WINDOW_BYTES = 128 * 2**20
"""Size of the clips that a worker reads at once; also the block size that Ray Data prefers."""

Fetch = Callable[[Callable[[Any], np.ndarray], Sequence[Any]], Iterable[np.ndarray]]
"""Maps a function over items, in order, as `map` does. It may work ahead, also in other processes,
and may split an array into several along the first axis."""


class Window(NamedTuple):
    """Steps of an epoch from `first` up to, but not including, `last`."""

    epoch: int
    first: int
    last: int


def stream_order(
    seed: int, epoch: int, shard_of: np.ndarray, batch_size: int, weights: Tensor | None = None
) -> np.ndarray:
    """Training clips of every step of an epoch, int64 [steps, batch].

    Args:
        shard_of: index of the shard of each training clip [clips].
        weights: how often each clip is drawn (`ser_ray.training.data.sampling_weights`).
    """
    rng = np.random.default_rng(seed_of(seed, epoch))
    shard_position = rng.permutation(int(shard_of.max()) + 1)
    clips = epoch_order(seed, epoch, len(shard_of), weights).numpy()
    sequence = clips[np.argsort(shard_position[shard_of[clips]], kind="stable")]
    steps = steps_per_epoch(len(shard_of), batch_size)
    return sequence[: steps * batch_size].reshape(batch_size, steps).T


@dataclass(frozen=True, slots=True)
class Lanes:
    """The clips of one worker's lanes. Lanes and reader are copied to other processes."""

    config: TrainConfig
    world: World
    shard_of: np.ndarray
    """Index of the shard of each training clip [clips]."""
    weights: Tensor | None = None
    """How often each clip is drawn (`ser_ray.training.data.sampling_weights`)."""

    @property
    def batch_size(self) -> int:
        """Clips per step over all workers."""
        return min(self.config.batch_size, len(self.shard_of))

    @property
    def share(self) -> int:
        """Clips per step for this worker."""
        return len(range(self.batch_size)[self.world.rank_slice])

    def windows(self, epoch: int, step: int, length: int) -> list[Window]:
        """Windows of at most `length` steps, from this step to the end of the training."""
        steps = steps_per_epoch(len(self.shard_of), self.batch_size)
        return [
            Window(number, first, min(first + length, steps))
            for number in range(epoch, self.config.epochs)
            for first in range(step if number == epoch else 0, steps, length)
        ]

    def clips(self, window: Window) -> np.ndarray:
        """This worker's clips in a window [steps * share]."""
        order = stream_order(
            self.config.seed, window.epoch, self.shard_of, self.batch_size, self.weights
        )
        return order[window.first : window.last, self.world.rank_slice].ravel()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads training clips from the shards."""

    shards: ShardSet
    kind: str
    rows: np.ndarray
    """Row of every training clip in the shards [clips]."""
    num_frames: np.ndarray
    """Valid frames of every training clip, int64 [clips]."""

    @property
    def clips_at_once(self) -> int:
        """Number of clips that fit into WINDOW_BYTES; at least 1."""
        num_bins = self.shards.card.num_bins(self.kind)
        return max(WINDOW_BYTES // clip_bytes(num_bins, self.num_frames), 1)

    def measure(self, clips: np.ndarray) -> np.ndarray:
        """Compute `frame_sums` over these clips [1, 2, bins]."""
        return frame_sums(self._features(clips), self.num_frames[clips])[None]

    def read(self, clips: np.ndarray, normalisation: Normalisation) -> np.ndarray:
        """Read these clips in the layout of `Clips.features` [clips, frames, bins]."""
        max_frames = int(self.num_frames.max())
        return normalisation.frames_first(self._features(clips), self.num_frames[clips], max_frames)

    def _features(self, clips: np.ndarray) -> np.ndarray:
        return inputs_of(self.shards, self.kind, self.rows[clips])


@dataclass(frozen=True, slots=True)
class Stream:
    """Training clips that are read one window at a time.

    Args:
        reader: reads the clips.
        shard_of: index of the shard of each clip [clips].
        labels: label indices [clips], on the device that trains.
        normalisation: applied to the clips.
        fetch: maps the reader over the windows.
        weights: how often each clip is drawn (`ser_ray.training.data.sampling_weights`).
    """

    reader: Reader
    shard_of: np.ndarray
    labels: Tensor
    normalisation: Normalisation
    fetch: Fetch
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.shard_of)

    def batches(self, config: TrainConfig, world: World, epoch: int, step: int) -> Iterator[Batch]:
        """Yield batches (`Source`). Each worker gets only its own share of every batch.

        Clips are copied to the device once per window, not in every step.
        """
        reader, normalisation = self.reader, self.normalisation
        lanes = Lanes(config, world, self.shard_of, self.weights)
        share, device = lanes.share, self.labels.device
        windows = lanes.windows(epoch, step, max(reader.clips_at_once // share, 1))
        pieces = iter(self.fetch(lambda w: reader.read(lanes.clips(w), normalisation), windows))
        num_frames = torch.from_numpy(reader.num_frames).to(device)
        all_rows = torch.arange(share, device=device)
        ready = torch.empty(0)
        for window in windows:
            clips = torch.from_numpy(lanes.clips(window)).to(device)
            for index, rows in enumerate(clips.split(share), start=window.first):
                while len(ready) < share:
                    piece = torch.from_numpy(next(pieces)).to(device)
                    ready = torch.cat((ready, piece)) if len(ready) else piece
                rank = (world.rank,) if world.size > 1 else ()
                seed = seed_of(config.seed, window.epoch, index, *rank)
                batch = Clips(ready[:share], num_frames[rows], self.labels[rows])
                yield Batch(batch, all_rows, slice(None), seed)
                ready = ready[share:]


def stream_fold(
    shards: ShardSet,
    config: TrainConfig,
    device: torch.device,
    world: World,
    fetch: Fetch,
    normalisation: Normalisation | None,
) -> FoldData[Stream]:
    """Prepare to stream a fold's training clips, and read its validation clips into memory.

    Args:
        shards: the shard set.
        config: the recipe.
        device: where the batches and the validation clips are needed.
        world: the workers.
        fetch: maps the reader over the windows.
        normalisation: the normalisation in the checkpoint to resume from. If None, the workers
            read all training clips once to measure it.
    """
    table = shards.clips()
    split = select_rows(table, config)
    labels = label_indices(table, shards.card.labels)
    num_frames = frames_of(shards, config.feature, table)
    reader = Reader(shards, config.feature, split.train, num_frames[split.train])
    normalisation = normalisation or _measure(reader, device, world, fetch)
    validation = load_clips(shards, config.feature, table, split.validation, normalisation, device)
    sizes = shards.card.shard_sizes
    shard_of = np.repeat(np.arange(len(sizes)), sizes)
    train_labels = torch.from_numpy(labels[split.train]).to(device)
    weights = sampling_weights(table.take(split.train), config)
    train = Stream(reader, shard_of[split.train], train_labels, normalisation, fetch, weights)
    return FoldData(train, validation, split, shards.card.labels, normalisation)


def resident_bytes(shards: ShardSet, config: TrainConfig) -> int:
    """Bytes of memory that a fold's training and validation clips need if they are resident."""
    table = shards.clips()
    split = select_rows(table, config)
    num_frames = frames_of(shards, config.feature, table)
    num_bins = shards.card.num_bins(config.feature)
    validation, _ = windows_of(table["window"].to_numpy(), split.validation)
    parts = (split.train, validation)
    return sum(len(part) * clip_bytes(num_bins, num_frames[part]) for part in parts)


def clip_bytes(num_bins: int, num_frames: np.ndarray) -> int:
    """Bytes of memory of a clip that is padded to the longest of `num_frames` [clips] frames."""
    return num_bins * int(num_frames.max(initial=1)) * np.dtype(np.float16).itemsize


def _measure(reader: Reader, device: torch.device, world: World, fetch: Fetch) -> Normalisation:
    """Measure the normalisation of the training clips. Each worker reads a share of them."""
    clips, length = np.argsort(reader.rows), reader.clips_at_once
    chunks = [clips[first : first + length] for first in range(0, len(clips), length)][
        world.rank_slice
    ]
    sums = np.zeros((2, reader.shards.card.num_bins(reader.kind)))
    for piece in fetch(reader.measure, chunks) if chunks else ():
        sums += piece.sum(axis=0)
    total = world.all_reduce_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
    return Normalisation.from_sums(total, int(reader.num_frames.sum()))
