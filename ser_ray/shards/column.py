"""Writes the column of an encoder for one shard: its clips' recordings are decoded and cut again.

The metadata of the file identify the clips and the weights that it was made from. The file is
written atomically. Nothing here imports Ray.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ser_ray.features.config import FeatureConfig
from ser_ray.features.decode import MAX_RECORDING_SECONDS, decode
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.digest import sample_digest
from ser_ray.shards.layout import clips_name, feature_column, feature_name, read_table, write_table
from ser_ray.shards.progress import in_groups
from ser_ray.storage.paths import filesystem_of, location_inside

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder

KEY = b"ser_ray.encoder_key"
"""Name of the metadata of a shard that says what it was made of."""
KEYED = ["content", "window"]
"""Columns of the clips on which this depends."""
WINDOWS_AT_ONCE = 256
"""Windows whose sound an actor holds: 107 MB at 6.5 s each."""


def is_current(shards: str, number: int, features: FeatureConfig, encoder: EncoderCard) -> bool:
    """Return whether the file of a shard's column is undamaged, and made of its clips."""
    key = _column_key(read_table(shards, clips_name(number), KEYED), features, encoder)
    filesystem, path = filesystem_of(location_inside(shards, feature_name(encoder.name, number)))
    try:
        schema = pq.read_schema(path, filesystem=filesystem)
    except pa.ArrowException:
        return False
    return bool((schema.metadata or {}).get(KEY, b"").decode() == key)


def _column_key(clips: pa.Table, features: FeatureConfig, encoder: EncoderCard) -> str:
    """Return a hash of a shard's clips, the feature settings and the encoder's weights."""
    text = json.dumps([features.fingerprint, encoder.weights, clips.select(KEYED).to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_shard(
    shards: str, number: int, extractor: FeatureExtractor, encoder: "Encoder", threads: int = 1
) -> int:
    """Encode the clips of a shard, write its column, and return the number of clips.

    Args:
        shards: folder or URI of the shard set.
        number: the shard's number.
        extractor: trims and cuts, as it did for the clips.
        encoder: the encoder, on its device.
        threads: number of recordings that are decoded at once.

    Raises:
        OSError: a recording cannot be read as before, or the column cannot be written.
    """
    clips = read_table(shards, clips_name(number), ["path", "start", "end", *KEYED])
    card = encoder.card
    values = np.empty((len(clips), card.num_layers, card.dim), np.float16)
    with ThreadPoolExecutor(threads) as pool:
        for rows in _groups_of_files(clips):
            files = [clips.take(own).to_pylist() for own in rows]
            waves = pool.map(lambda windows: _waves_again(windows, extractor), files)
            found = encoder.encode(list(itertools.chain.from_iterable(waves)))
            if not np.isfinite(found).all():
                raise OSError(f"{card.name} has values that are not finite, so its weights are bad")
            values[np.concatenate(rows)] = found.clip(-65504, 65504)
    key = _column_key(clips, extractor.config, card)
    table = pa.table({card.name: feature_column(values)}).replace_schema_metadata({KEY: key})
    write_table(shards, feature_name(card.name, number), table)
    return int(np.count_nonzero(clips["window"].to_numpy() == 0))


def _groups_of_files(clips: pa.Table) -> Iterator[list[np.ndarray]]:
    """Yield the rows of each file, which are consecutive, in groups of `WINDOWS_AT_ONCE` rows."""
    paths = clips["path"].to_numpy()
    firsts = np.flatnonzero(paths[1:] != paths[:-1]) + 1
    files = np.split(np.arange(len(clips)), firsts) if len(clips) else []
    return in_groups(files, len, WINDOWS_AT_ONCE)


def _waves_again(windows: list[dict[str, Any]], extractor: FeatureExtractor) -> list[np.ndarray]:
    """Return the waveforms of a file's windows, which are these rows of the clips."""
    path, waves = windows[0]["path"], []
    try:
        recording = decode(path, max_seconds=MAX_RECORDING_SECONDS)
        for first in (row for row in windows if row["window"] == 0):
            sound, _ = cut(recording, first["start"], first["end"])
            if sample_digest(sound.samples) != first["content"]:
                break
            waves += extractor.windows(sound.samples, sound.sample_rate)
    except ClipError as error:
        raise OSError(f"{path}: {error.reason}") from error
    if len(waves) != len(windows):
        raise OSError(f"{path}: the file has changed since its clip was prepared")
    return waves
