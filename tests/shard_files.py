"""A small committed shard set on disk, without a corpus to decode."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import fs

from ser_ray.features.config import FeatureConfig
from ser_ray.shards.card import ShardCard, write_card
from ser_ray.shards.part import part_name, write_table
from tests.conftest import MemoryShards, make_memory_shards


def write_shard_files(folder: Path, memory: MemoryShards | None = None) -> str:
    """Write memory shards as one part, of which only the mel column exists; returns the folder."""
    memory = memory or make_memory_shards()
    num_clips, num_mels, num_frames = memory.values.shape
    features = FeatureConfig(num_mels=num_mels, num_mfcc=8, max_seconds=0.5)
    assert features.num_frames >= num_frames, "the clips fit"
    padded = np.zeros((num_clips, num_mels, features.num_frames), np.float16)
    padded[:, :, :num_frames] = memory.values
    column = pa.array([clip.tobytes() for clip in padded], pa.binary(padded[0].nbytes))
    folder.mkdir(parents=True)
    filesystem = fs.LocalFileSystem()
    table = memory.table.append_column("mel", column)
    write_table(filesystem, f"{folder}/{part_name(0)}", table)
    card = ShardCard(
        corpus="table",
        source="memory",
        labels=memory.card.labels,
        features=features,
        counts={"ok": num_clips},
        parts=(0,),
        clips=(num_clips,),
        fingerprint="f00d" * 4,
    )
    write_card(filesystem, str(folder), card)
    return str(folder)
