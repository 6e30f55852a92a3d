"""Training clips that memory does not hold: read again in every epoch, in an order that suits it.

As with resident clips an epoch's batches follow from (seed, epoch), for any number of workers, and
no clip is in two of them; so steps, learning rates and going on in mid-epoch are the same. But the
clips of a part lie together on the storage, and are best read together. So the parts are shuffled,
and the clips in each; this sequence is cut into *lanes*, as many as a batch has clips, and a step
takes the next clip of every lane. Its clips come from all over the sequence, and a worker, which
owns every W-th lane, reads the parts of its own lanes alone.

What a stream does not keep:

- A lane passes through one part after another: batches are shuffled less than by a permutation.
- A worker augments its own clips alone, where with resident clips it draws the whole batch. So with
  several workers the augmentation, the pairs of MixStyle and mixup above all, depends on their
  number.
- There are no balanced draws, which take clips again and again.
- A part is read by each worker that has a lane in it, and again for each window it reaches into.
- The validation clips are resident all the same.

It knows nothing of Ray: a `Fetch` reads ahead in whatever way.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ser_ray.errors import ConfigError
from ser_ray.features.config import Kind
from ser_ray.shards.read import ShardSet
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import (
    Batch,
    Clips,
    FoldData,
    Normalisation,
    frame_sums,
    label_indices,
    load_clips,
    seed_of,
    select_rows,
    steps_per_epoch,
)
from ser_ray.training.world import World

WINDOW_BYTES = 128 * 2**20
"""What a worker reads at once; also the size that Ray Data likes its blocks to have."""

Fetch = Callable[[Callable[[Any], np.ndarray], Sequence[Any]], Iterable[np.ndarray]]
"""A `map` of a function over items, in order. It may work ahead, in other processes too, and may
give an array in several pieces along its first axis."""


class Window(NamedTuple):
    """Steps `first` to `last`, exclusive, of an epoch."""

    epoch: int
    first: int
    last: int


def stream_order(seed: int, epoch: int, parts: np.ndarray, batch_size: int) -> np.ndarray:
    """Training clips of every step of an epoch, int64 [steps, batch].

    Args:
        parts: the part that each training clip is in [clips].
    """
    rng = np.random.default_rng(seed_of(seed, epoch))
    turn = rng.permutation(int(parts.max()) + 1)
    clips = rng.permutation(len(parts))
    sequence = clips[np.argsort(turn[parts[clips]], kind="stable")]
    steps = steps_per_epoch(len(parts), batch_size)
    return sequence[: steps * batch_size].reshape(batch_size, steps).T


@dataclass(frozen=True, slots=True)
class Lanes:
    """The clips of one worker's lanes; goes to other processes, as the reader does."""

    config: TrainConfig
    world: World
    parts: np.ndarray
    """The part that each training clip is in [clips]."""

    @property
    def batch_size(self) -> int:
        """Clips in a step, over all workers."""
        return min(self.config.batch_size, len(self.parts))

    @property
    def share(self) -> int:
        """Clips in a step for this worker."""
        return len(range(self.batch_size)[self.world.rank_slice])

    def windows(self, epoch: int, step: int, length: int) -> list[Window]:
        """The steps from one on to the end of the training, `length` at a time."""
        steps = steps_per_epoch(len(self.parts), self.batch_size)
        return [
            Window(number, first, min(first + length, steps))
            for number in range(epoch, self.config.epochs)
            for first in range(step if number == epoch else 0, steps, length)
        ]

    def clips(self, window: Window) -> np.ndarray:
        """This worker's clips in a window [steps * share]."""
        order = stream_order(self.config.seed, window.epoch, self.parts, self.batch_size)
        return order[window.first : window.last, self.world.rank_slice].ravel()


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads training clips."""

    shards: ShardSet
    kind: Kind
    rows: np.ndarray
    """Row of every training clip in the shards [clips]."""
    num_frames: np.ndarray
    """Their valid frames, int64 [clips]."""

    @property
    def clips_at_once(self) -> int:
        """How many clips WINDOW_BYTES hold."""
        num_bins = self.shards.card.features.num_bins(self.kind)
        return max(WINDOW_BYTES // clip_bytes(num_bins, self.num_frames), 1)

    def measure(self, clips: np.ndarray) -> np.ndarray:
        """`frame_sums` of some clips [1, 2, bins]."""
        return frame_sums(self._features(clips), self.num_frames[clips])[None]

    def read(self, clips: np.ndarray, normalisation: Normalisation) -> np.ndarray:
        """Some clips as `Clips` holds them [clips, frames, bins]."""
        longest = int(self.num_frames.max())
        return normalisation.frames_first(self._features(clips), self.num_frames[clips], longest)

    def _features(self, clips: np.ndarray) -> np.ndarray:
        return self.shards.features(self.kind, self.rows[clips])


@dataclass(frozen=True, slots=True)
class Stream:
    """Training clips that pass by, a window at a time.

    Args:
        parts: the part that each clip is in [clips].
        labels: label indices [clips], on the device where batches are wanted.
        fetch: how windows are read.
    """

    reader: Reader
    parts: np.ndarray
    labels: Tensor
    normalisation: Normalisation
    fetch: Fetch

    def __len__(self) -> int:
        return len(self.parts)

    def batches(self, config: TrainConfig, world: World, epoch: int, step: int) -> Iterator[Batch]:
        """Every worker reads and augments its own share of every batch, and learns from it.

        Clips come to the device once a window: nothing is copied to it, or waited for, in a step.
        """
        reader, normalisation = self.reader, self.normalisation
        lanes = Lanes(config, world, self.parts)
        share, device = lanes.share, self.labels.device
        windows = lanes.windows(epoch, step, max(reader.clips_at_once // share, 1))
        pieces = iter(self.fetch(lambda w: reader.read(lanes.clips(w), normalisation), windows))
        num_frames = torch.from_numpy(reader.num_frames).to(device)
        whole = torch.arange(share, device=device)
        ready = torch.empty(0)
        for window in windows:
            clips = torch.from_numpy(lanes.clips(window)).to(device)
            for index, rows in enumerate(clips.split(share), start=window.first):
                while len(ready) < share:
                    piece = torch.from_numpy(next(pieces)).to(device)
                    ready = torch.cat((ready, piece)) if len(ready) else piece
                place = (config.seed, window.epoch, index)
                seed = seed_of(*place, world.rank) if world.size > 1 else seed_of(*place)
                batch = Clips(ready[:share], num_frames[rows], self.labels[rows])
                yield Batch(batch, whole, slice(None), seed)
                ready = ready[share:]


def require_streamable(config: TrainConfig) -> None:
    """Refuse a recipe whose training clips cannot be streamed.

    Raises:
        ConfigError: it draws labels equally often.
    """
    if config.balanced:
        raise ConfigError(
            "balanced draws take clips again and again, a stream passes each once an epoch: train "
            "with --ingest resident, or without --balanced"
        )


def stream_fold(
    shards: ShardSet,
    config: TrainConfig,
    device: torch.device,
    world: World,
    fetch: Fetch,
    normalisation: Normalisation | None,
) -> FoldData[Stream]:
    """Prepare to stream a fold's training clips; its validation clips are read at once.

    Args:
        normalisation: that of the checkpoint to go on from; without one, all workers read the
            training clips once and measure it.

    Raises:
        ConfigError: the recipe draws clips in a way that a stream cannot.
    """
    require_streamable(config)
    table = shards.clips()
    split = select_rows(table, config)
    labels = label_indices(table, shards.card.labels)
    num_frames = table["num_frames"].to_numpy().astype(np.int64)
    reader = Reader(shards, config.feature, split.train, num_frames[split.train])
    normalisation = normalisation or _measure(reader, device, world, fetch)
    validation = load_clips(
        shards, config.feature, split.validation, labels, num_frames, normalisation, device
    )
    part_of = np.repeat(np.arange(len(shards.card.clips)), shards.card.clips)
    own_labels = torch.from_numpy(labels[split.train]).to(device)
    train = Stream(reader, part_of[split.train], own_labels, normalisation, fetch)
    return FoldData(train, validation, split, shards.card.labels, normalisation)


def resident_bytes(shards: ShardSet, config: TrainConfig) -> int:
    """Memory that a fold's training and validation clips take when they are resident."""
    table = shards.clips()
    split = select_rows(table, config)
    num_frames = table["num_frames"].to_numpy()
    num_bins = shards.card.features.num_bins(config.feature)
    sides = (split.train, split.validation)
    return sum(len(side) * clip_bytes(num_bins, num_frames[side]) for side in sides)


def clip_bytes(num_bins: int, num_frames: np.ndarray) -> int:
    """Memory of one clip among clips of so many frames [clips]."""
    return num_bins * int(num_frames.max()) * np.dtype(np.float16).itemsize


def _measure(reader: Reader, device: torch.device, world: World, fetch: Fetch) -> Normalisation:
    """Normalisation of the training clips; each worker reads its share of them."""
    clips, length = np.argsort(reader.rows), reader.clips_at_once
    chunks = [clips[first : first + length] for first in range(0, len(clips), length)][
        world.rank_slice
    ]
    sums = np.zeros((2, reader.shards.card.features.num_bins(reader.kind)))
    for piece in fetch(reader.measure, chunks) if chunks else ():
        sums += piece.sum(axis=0)
    total = world.all_reduce_sum(torch.from_numpy(sums).to(device)).cpu().numpy()
    return Normalisation.from_sums(total, int(reader.num_frames.sum()))
