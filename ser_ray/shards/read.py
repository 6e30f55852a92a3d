"""Reads shards: a table that describes the clips, and arrays of their features.

    shards = ser_ray.open_shards("ser-ray-out/shards")
    shards.clips().to_pandas()                                  # a row per clip or window
    shards.features("mel")                                      # [rows, bins, frames] float16
    shards.features("wavlm_base_plus")                          # [rows, layers, dim] float16
    shards.torch_dataset("mel", protocol="speaker-3", fold=0, part="train")
    shards.ray_dataset("mel", protocol="speaker-3", fold=0, part="train")

pandas, polars, `datasets` and `ray.data.read_parquet` can also read the Parquet files in the folder
`clips` of a shard set. `ShardSet.to_array` turns their feature columns into arrays:

    table = pandas.read_parquet("ser-ray-out/shards/clips", columns=["emotion", "mel"])
    mel = shards.to_array("mel", table["mel"])
"""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ser_ray.cluster.shared_files import require_kept
from ser_ray.corpus.splits import one_clip_per_take, split, windows_of
from ser_ray.errors import ShardsError
from ser_ray.features.config import KINDS
from ser_ray.shards import layout
from ser_ray.shards.card import ShardCard, UsedCorpus, read_card
from ser_ray.storage.paths import filesystem_of, location_inside

if TYPE_CHECKING:
    from ray.data import Dataset
    from torch.utils.data import TensorDataset

Part = Literal["train", "validation", "test"]

READ_THREADS = 4
"""Number of shards that are read in parallel."""


@dataclass(frozen=True)
class ShardSet:
    """A committed shard set. Its rows are sorted by shard, and by path within a shard."""

    uri: str
    """Folder or URI of the shards."""
    card: ShardCard

    def __repr__(self) -> str:
        kinds = (*KINDS, *(encoder.name for encoder in self.card.encoders))
        return (
            f"{' and '.join(self.locations)}: {self.card.num_rows} rows, "
            f"{len(self.card.labels)} labels ({', '.join(self.card.labels)}), "
            f"features {', '.join(kinds)}"
        )

    @property
    def locations(self) -> tuple[str, ...]:
        """Folder or URI of each shard set. Only `ser_ray.shards.corpora` can have several."""
        return (self.uri,)

    @property
    def corpora(self) -> tuple[UsedCorpus, ...]:
        """Which clips of each corpus are used; empty except in `ser_ray.shards.corpora`."""
        return ()

    @property
    def num_clips(self) -> int:
        """Number of clips. A clip that is cut into windows counts once."""
        if self.corpora:
            return sum(corpus.clips for corpus in self.corpora)
        return self.card.counts.get(layout.OK, 0)

    def clips(self) -> pa.Table:
        """Return all columns except the features, one row per clip or per window of a long clip."""
        tables = []
        for number, num_rows in zip(self.card.shard_numbers, self.card.shard_sizes, strict=True):
            filesystem, path = filesystem_of(location_inside(self.uri, layout.clips_name(number)))
            with _reading(path), pq.ParquetFile(path, filesystem=filesystem) as file:
                names = [name for name in file.schema_arrow.names if name not in KINDS]
                tables.append(file.read(names))
                if len(tables[-1]) != num_rows or tables[-1].schema != tables[0].schema:
                    raise ValueError("it does not have the rows that the card counts")
        return pa.concat_tables(tables)

    def outcomes(self) -> pa.Table:
        """Return the manifest with the final status and reason, one row per listed file.

        The column `encoders` lists the encoders that the card has, as NAME:HASH with the hash of
        the weights. The list is empty for files without a clip.
        """
        tables = []
        for name in map(layout.outcomes_name, self.card.shard_numbers):
            with _reading(f"{self.uri}/{name}"):
                tables.append(layout.read_table(self.uri, name))
        table = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
        names = pa.list_(pa.string())
        listed = pa.scalar([f"{item.name}:{item.weights}" for item in self.card.encoders], names)
        encoders = pc.if_else(pc.equal(table["status"], layout.OK), listed, pa.scalar([], names))
        return table.append_column("encoders", encoders)

    def to_array(self, kind: str, column: pa.ChunkedArray | Iterable[bytes]) -> np.ndarray:
        """Turn a feature column of this set's Parquet files into an array.

        Args:
            kind: the kind of feature.
            column: a pyarrow column (which is not copied if it is one chunk), a series of pandas or
                polars, or a list of bytes.

        Returns:
            `[len(column), bins, num_frames]` float16, read-only. Spectrogram and mel are in
            decibels. Frames from the row's `num_frames` on are zero. For an encoder,
            `[len(column), layers, dim]`.
        """
        shape = self.card.shape_of(kind)
        if not isinstance(column, pa.ChunkedArray):
            return np.frombuffer(b"".join(column), np.float16).reshape(-1, *shape)
        if len(column) == 0:
            return np.empty((0, *shape), np.float16)
        array = column.cast(pa.binary(2 * math.prod(shape))).combine_chunks()
        numbers = np.frombuffer(array.buffers()[1], np.float16)
        return numbers.reshape(-1, *shape)[array.offset : array.offset + len(array)]

    def features(self, kind: str, rows: np.ndarray | None = None) -> np.ndarray:
        """Return one kind of feature; the other kinds are not read.

        Args:
            kind: the kind of feature.
            rows: row numbers of `clips()`, `[num_rows]` in any order; None for all rows.

        Returns:
            `[num_rows, bins, num_frames]` float16. Frames from the row's `num_frames` on are zero.
            For an encoder, `[num_rows, layers, dim]`.

        Raises:
            ShardsError: a file cannot be read, or the features do not fit into memory.
            ConfigError: the shards do not have this kind of feature.
            IndexError: a row does not exist.
        """
        rows = np.arange(self.card.num_rows) if rows is None else np.asarray(rows)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self.card.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {self.card.num_rows}")
        shape = len(rows), *self.card.shape_of(kind)
        try:
            features = np.empty(shape, np.float16)
        except (MemoryError, ValueError) as error:
            raise ShardsError(
                f"{self.uri}: {kind} of {len(rows)} rows does not fit into memory ({error})"
            ) from error
        self.read_into(features, np.arange(len(rows)), kind, rows)
        return features

    def read_into(
        self, features: np.ndarray, places: np.ndarray, kind: str, rows: np.ndarray
    ) -> None:
        """Read the features of rows of `clips()` into an array.

        At most `READ_THREADS` shards are read at the same time, to save memory.

        Args:
            features: the array, with the shape of `features(kind)` except for the number of rows.
            places: index in the array for each row [num_rows].
            kind: the kind of feature.
            rows: row numbers of `clips()` [num_rows].
        """
        starts = np.cumsum((0, *self.card.shard_sizes))
        owners = np.searchsorted(starts, rows, side="right") - 1  # index of each row's shard

        def read_shard(index: int) -> None:
            wanted = np.flatnonzero(owners == index)
            if len(wanted) == 0:
                return
            name = layout.feature_name(kind, self.card.shard_numbers[index])
            with _reading(f"{self.uri}/{name}"):
                array = self.to_array(kind, layout.read_table(self.uri, name, [kind])[kind])
                if len(array) != self.card.shard_sizes[index]:
                    raise ValueError("it does not have the rows that the card counts")
                features[places[wanted]] = array[rows[wanted] - starts[index]]

        with ThreadPoolExecutor(READ_THREADS) as pool:
            list(pool.map(read_shard, range(len(self.card.shard_numbers))))

    def rows_of(self, protocol: str, fold: int = 0, part: Part = "train") -> np.ndarray:
        """Return the rows of one part of a fold, with one clip for each RAVDESS take.

        A long clip has several rows, one for each window.

        Args:
            protocol: name of the protocol, such as `emobox-6` or `speaker-5`.
            fold: number of the fold, counted from 0.
            part: train, validation or test.

        Returns:
            Row numbers of `clips()`, `[num_rows]`, ascending.

        Raises:
            ConfigError: the protocol does not fit the speakers, or there is no such fold.
        """
        clips = self.clips()
        rows = one_clip_per_take(clips)
        chosen: np.ndarray = getattr(split(protocol, fold, clips.take(rows)), part)
        return windows_of(clips["window"].to_numpy(), rows[chosen])[0]

    def torch_dataset(
        self, kind: str, *, protocol: str, fold: int = 0, part: Part = "train"
    ) -> "TensorDataset":
        """Read the rows of `rows_of` for a `DataLoader` of torch.

        Returns:
            Each item is a feature `[bins, num_frames]` float16, the index of the label in
            `card.labels`, and the number of frames that are not padding.

        Raises:
            ShardsError: a file cannot be read, or the features do not fit into memory.
            ConfigError: the protocol does not fit the speakers, there is no such fold, or the
                shards do not have this kind of feature.
        """
        import torch
        from torch.utils.data import TensorDataset

        rows = self.rows_of(protocol, fold, part)
        clips = self.clips().take(rows)
        labels = pc.index_in(clips["emotion"], value_set=pa.array(self.card.labels))
        return TensorDataset(
            torch.from_numpy(self.features(kind, rows)),
            torch.from_numpy(labels.to_numpy().astype(np.int64)),
            torch.from_numpy(clips["num_frames"].to_numpy().astype(np.int64)),
        )

    def ray_dataset(
        self, kind: str, *, protocol: str, fold: int = 0, part: Part = "train"
    ) -> "Dataset":
        """Make a Ray Data dataset of the rows of `rows_of`.

        Each task reads one shard. Ray Data joins a Ray cluster or starts one.

        Returns:
            The columns of `clips()`, and a column that is named after the kind, with arrays
            `[bins, num_frames]` float16. The shards come in any order, unless Ray Data's context
            preserves the order.

        Raises:
            ConfigError: the protocol does not fit the speakers, or there is no such fold.
        """
        import ray.data

        rows = self.rows_of(protocol, fold, part)
        clips = self.clips().take(rows).append_column("row", [rows])
        ends = np.searchsorted(rows, np.cumsum(self.card.shard_sizes))
        shards = [clips[start:end] for start, end in pairwise((0, *ends)) if start < end]

        def add_feature(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {kind: self.features(kind, batch.pop("row")), **batch}

        return ray.data.from_arrow(shards).map_batches(add_feature, batch_size=None)


@contextmanager
def _reading(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise ShardsError(
            f"{path}: cannot be read ({error}); if it is damaged, delete it and run the "
            "same `ser-ray prepare` again"
        ) from error


def open_shards(uri: str) -> ShardSet:
    """Open a committed shard set.

    Raises:
        ShardsError: there is no shard set, it is unfinished, or its card cannot be read.
        ResourcesError: there is no finished shard set, and Ray deletes the folder of the path after
            a job.
        ConfigError: no filesystem can open the location.
    """
    card = read_card(uri)
    if card is not None:
        return ShardSet(uri, card)
    is_begun = layout.names_in(uri, layout.OUTCOMES) is not None
    require_kept(uri)  # a relative path in a Ray job is the likely reason
    raise ShardsError(
        f"{uri}: these shards are not finished; give the same `ser-ray prepare` again"
        if is_begun
        else f"{uri}: there are no shards; make them with `ser-ray prepare`{_others_beside(uri)}"
    )


def _others_beside(uri: str) -> str:
    """Return the end of a sentence that names the shard sets in the same local folder, if any."""
    if "://" in uri:
        return ""
    cards = sorted(Path(uri).parent.glob(f"*/{layout.CARD_NAME}"))
    return f", or use {' or '.join(str(card.parent) for card in cards)}" if cards else ""
