"""A small shard set on disk, written without Ray: what `conftest.MemoryShards` holds in memory."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.features.config import FeatureConfig
from ser_ray.shards.card import ShardCard, write_card
from ser_ray.shards.part import part_name
from tests.conftest import make_memory_shards

FEATURES = FeatureConfig(num_mels=16, num_mfcc=8, max_seconds=0.5)


def write_shards(folder: Path, *, speakers: int = 6) -> Path:
    """Write clips of `speakers` speakers and four emotions; every kind can be learned from."""
    memory = make_memory_shards(speakers, num_frames=FEATURES.num_frames)
    table = memory.clips()
    for kind in ("mel", "mfcc"):
        bins = FEATURES.num_bins(kind)
        stored = np.ascontiguousarray(memory.values[:, :bins])
        width = stored[0].nbytes
        buffers = [None, pa.py_buffer(stored)]
        column = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(stored), buffers)
        table = table.append_column(kind, column)
    folder.mkdir(parents=True)
    pq.write_table(table, folder / part_name(0))
    card = ShardCard(
        corpus="table",
        source="memory",
        labels=memory.card.labels,
        features=FEATURES,
        counts={"ok": len(table)},
        parts=(0,),
        clips=(len(table),),
        fingerprint="f00d",
    )
    write_card(fs.LocalFileSystem(), str(folder), card)
    return folder
