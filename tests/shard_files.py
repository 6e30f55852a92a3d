"""A small committed shard set on disk, without a corpus to decode."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.manifest import replace_column
from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.shards.card import ShardCard, write_card
from ser_ray.shards.layout import CARD_NAME, CLIPS, clips_name, write_table
from tests.conftest import MemoryShards, make_memory_shards


def write_shard_files(
    folder: Path, memory: MemoryShards | None = None, kinds: Sequence[Kind] = ("mel",)
) -> str:
    """Write memory shards as one shard, with the columns of some kinds; returns the folder.

    The fingerprint and the digests of the clips follow from the name of the folder, too.
    All kinds hold the same values, as many bins of them as they have: each can be learned from.
    """
    memory = memory or make_memory_shards()
    num_rows, num_mels, num_frames = memory.values.shape
    features = FeatureConfig(num_mels=num_mels, num_mfcc=8, hop_length=320, max_seconds=0.5)
    assert features.num_frames >= num_frames, "the clips fit"
    padded = np.zeros((num_rows, num_mels, features.num_frames), np.float16)
    padded[:, :, :num_frames] = memory.values
    table = memory.table
    content = pc.binary_join_element_wise(folder.name, table["content"], "-")
    table = replace_column(table, "content", content)
    for kind in kinds:
        stored = padded[:, : features.num_bins(kind)]
        column = pa.array([clip.tobytes() for clip in stored], pa.binary(stored[0].nbytes))
        table = table.append_column(kind, column)
    (folder / CLIPS).mkdir(parents=True)
    write_table(str(folder), clips_name(0), table)
    card = ShardCard(
        corpus="table",
        source="memory",
        labels=memory.card.labels,
        features=features,
        counts={"ok": int((table["window"].to_numpy() == 0).sum())},
        shard_numbers=(0,),
        shard_sizes=(num_rows,),
        fingerprint=f"{folder.name:f>16}",
    )
    write_card(str(folder), card)
    return str(folder)


def write_spelled(folder: Path, spelled: Mapping[str, str] | None = None, **card: object) -> str:
    """Write six speakers with 48 clips of neutral, calm, happy and sad, spelled as told.

    Paths and values follow from the folder; `card` replaces values of the card.
    """
    memory = make_memory_shards(seed=len(folder.name), num_frames=26)
    names = [(spelled or {}).get(name, name) for name in memory.table["emotion"].to_pylist()]
    columns = {name: memory.table[name].to_pylist() for name in ("path", "content")}
    columns = {name: [f"{folder}{text}" for text in column] for name, column in columns.items()}
    for name, column in (columns | {"emotion": names}).items():
        place = memory.table.schema.get_field_index(name)
        memory.table = memory.table.set_column(place, name, pa.array(column))
    memory.card.labels = tuple(sorted(set(names)))
    location = write_shard_files(folder, memory)
    path = folder / CARD_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | card))
    return location
