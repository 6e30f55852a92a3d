"""Encodes the clips of one shard, and writes their features to a Parquet file of their own.

Shards do not hold waveforms, so the recordings are decoded, trimmed and cut again. A key in the
file's metadata identifies the clips, the feature settings and the weights, so `is_current` finds
files that are outdated. The file is written atomically. Nothing here imports Ray.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ser_ray.features.config import FeatureConfig
from ser_ray.features.decode import decode
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.grouping import in_groups
from ser_ray.shards import layout
from ser_ray.shards.digest import sample_digest

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder

KEY = b"ser_ray.encoder_key"
"""Name of the key in the metadata of the file."""
KEYED = ["content", "window"]
"""Columns of the clips that the key covers."""
WINDOWS_AT_ONCE = 256
"""Approximate number of windows whose waveforms are in memory together: 107 MB at 6.5 s each."""


def is_current(shards: str, number: int, features: FeatureConfig, encoder: EncoderCard) -> bool:
    """Return whether an encoder's file of a shard is readable and up to date.

    It is up to date if it was made from the present clips, feature settings and weights.

    Raises:
        FileNotFoundError: there is no file for this encoder.
        DamagedFileError: the clips of the shard are damaged.
    """
    key = _column_key(
        layout.read_table(shards, layout.clips_name(number), KEYED), features, encoder
    )
    try:
        schema = layout.read_schema(shards, layout.feature_name(encoder.name, number))
    except layout.DamagedFileError:
        return False
    return bool((schema.metadata or {}).get(KEY, b"").decode() == key)


def _column_key(clips: pa.Table, features: FeatureConfig, encoder: EncoderCard) -> str:
    """Hash a shard's clips, the feature settings and the encoder's weights."""
    text = json.dumps([features.fingerprint, encoder.weights, clips.select(KEYED).to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def encode_shard(
    shards: str, number: int, extractor: FeatureExtractor, encoder: "Encoder", threads: int = 1
) -> int:
    """Encode the clips of a shard, write the file, and return the number of clips.

    Args:
        shards: folder or URI of the shard set.
        number: number of the shard.
        extractor: trims and cuts the recordings, with the settings that the shard was made with.
        encoder: the encoder, on its device.
        threads: number of recordings that are decoded in parallel.

    Raises:
        OSError: a recording cannot be read or has changed, the encoder returns values that are not
            finite, or the file cannot be written.
    """
    clips = layout.read_table(shards, layout.clips_name(number), ["path", "start", "end", *KEYED])
    card = encoder.card
    values = np.empty((len(clips), card.num_layers, card.dim), np.float16)
    with ThreadPoolExecutor(threads) as pool:
        for rows in _groups_of_files(clips):
            files = [clips.take(file_rows).to_pylist() for file_rows in rows]
            waveforms = pool.map(lambda windows: _decode_windows(windows, extractor), files)
            encoded = encoder.encode(list(itertools.chain.from_iterable(waveforms)))
            if not np.isfinite(encoded).all():
                raise OSError(
                    f"{card.name} returns values that are not finite, so its weights are bad"
                )
            values[np.concatenate(rows)] = encoded.clip(-65504, 65504)  # the range of float16
    key = _column_key(clips, extractor.config, card)
    table = pa.table({card.name: layout.feature_column(values)}).replace_schema_metadata({KEY: key})
    layout.write_table(shards, layout.feature_name(card.name, number), table)
    return int(np.count_nonzero(clips["window"].to_numpy() == 0))


def _groups_of_files(clips: pa.Table) -> Iterator[list[np.ndarray]]:
    """Yield groups of files, with about `WINDOWS_AT_ONCE` rows in a group.

    Each file is an array of its rows [num_rows].
    """
    paths = clips["path"].to_numpy()
    firsts = np.flatnonzero(paths[1:] != paths[:-1]) + 1
    files = np.split(np.arange(len(clips)), firsts) if len(clips) else []
    return in_groups(files, len, WINDOWS_AT_ONCE)


def _decode_windows(windows: list[dict[str, Any]], extractor: FeatureExtractor) -> list[np.ndarray]:
    """Decode a file, and return the waveform of each of its windows that the shard has.

    Raises:
        OSError: the file cannot be decoded, or its sound is not that of the clips in the shard.
    """
    path, waveforms = windows[0]["path"], []
    try:
        recording = decode(path)
        for first in (row for row in windows if row["window"] == 0):
            sound, _ = cut(recording, first["start"], first["end"])
            if sample_digest(sound.samples) != first["content"]:
                break
            waveforms += extractor.windows(sound.samples, sound.sample_rate)
    except ClipError as error:
        raise OSError(f"{path}: {error.reason}") from error
    if len(waveforms) != len(windows):
        raise OSError(
            f"{path}: the file has changed since its clip was prepared, or this machine has "
            "another version of a library, which decodes it differently"
        )
    return waveforms
