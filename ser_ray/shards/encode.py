"""Columns of pretrained encoders: a Ray Data job over the parts of a finished shard set.

The shards hold no sound, so the recordings are decoded, trimmed and cut again, as for the clips.
For each encoder, each part of the clips gets a Parquet file of its own. Adding an encoder therefore
changes no other file, and reading one kind of feature reads only its bytes. The metadata of a
part's file identify the clips and weights that it was made from. The file is written atomically: an
interrupted job continues with the missing parts, and a part whose clips have changed is made again.

Actors encode, because the weights must stay in memory. All actors on a machine share them.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.cluster.connect import cluster
from ser_ray.cluster.resources import has_gpus, resources_within_reach
from ser_ray.cluster.shared_files import one_of_each_folder, require_shared
from ser_ray.errors import ConfigError, EncoderError, ShardsError, last_line
from ser_ray.features.config import FeatureConfig
from ser_ray.features.decode import MAX_RECORDING_SECONDS, decode
from ser_ray.features.encoder_card import ENCODER_RATE, EncoderCard
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.card import ShardCard, write_card
from ser_ray.shards.digest import sample_digest
from ser_ray.shards.layout import (
    ENCODERS,
    OK,
    REQUESTS_AT_ONCE,
    feature_column,
    feature_name,
    part_name,
    weights_name,
    write_table,
)
from ser_ray.shards.progress import Progress, ProgressCounter, in_groups, set_up_ray_data, show
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.lock import Lock
from ser_ray.storage.paths import absolute, filesystem_of, location_inside

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder, EncoderWeights

KEY = b"ser_ray.encoder_key"
"""Name of the metadata of a part that says what it was made of."""
KEYED = ("content", "window")
"""Columns of the clips on which this depends."""
ACTORS_PER_GPU = 2
"""One decodes while the other encodes."""
WINDOWS_AT_ONCE = 256
"""Windows whose sound an actor holds: 107 MB at 6.5 s each."""


def load_encoders(shards: str, sources: Sequence[str], features: FeatureConfig) -> list[Any]:
    """Load the named `EncoderWeights`: from the shard set, if it has them.

    Raises:
        ConfigError: an encoder is unknown, or the features have another sample rate.
        EncoderError: weights cannot be loaded, or differ from those in the shard set.
    """
    if sources and features.sample_rate != ENCODER_RATE:
        raise ConfigError(
            f"encoder is {sources[0]}, but sample_rate is {features.sample_rate}: encoders read "
            f"{ENCODER_RATE} Hz"
        )
    if not sources:
        return []
    from ser_ray.features.encoder import EncoderWeights  # slow: torch and torchaudio

    found = []
    for source in sources:
        name = source.partition("=")[0]
        stored = location_inside(shards, weights_name(name))
        filesystem, path = filesystem_of(stored)
        is_stored = filesystem.get_file_info(path).is_file
        weights = EncoderWeights.read(stored) if is_stored else EncoderWeights.named(source)
        if is_stored and "=" in source:
            given = EncoderWeights.named(source).card.weights
            if given != weights.card.weights:
                raise EncoderError(
                    f"{source}: its weights have the hash {given[:16]}, and the shards have a "
                    f"column {name} of weights with the hash {weights.card.weights[:16]}; give "
                    f"them another name, or delete {shards}/{ENCODERS}/{name}"
                )
        found.append(weights)
    return found


def add_encoders(
    shards: str,
    card: ShardCard,
    encoders: "Sequence[EncoderWeights]",
    lock: Lock,
    address: str,
    progress: Callable[[Progress], None] | None,
) -> tuple[ShardCard, list[str]]:
    """Write the missing parts of the encoders' columns, and list the complete columns in the card.

    Args:
        shards: folder or URI of the shard set.
        card: describes its clips.
        encoders: those whose columns are completed.
        lock: held on the shard set.
        address: cluster to join, if a part is missing.
        progress: called after every part.

    Returns:
        The card that the shard set now has, and a line for each column that lacks clips.

    Raises:
        ShardsError: a recording cannot be read again, or the job failed.
    """
    filesystem, folder = filesystem_of(shards)
    named = {weights.card.name: weights for weights in encoders}
    before = {item.name: item for item in card.encoders} | _stored(filesystem, folder)
    complete, notes = [], []
    for name in sorted({*before, *named}):
        encoder = named[name].card if name in named else before[name]
        missing = missing_parts(filesystem, folder, card, encoder)
        if missing and name in named:
            _write_column(shards, card, named[name], missing, lock, address, progress)
        if not missing or name in named:
            complete.append(encoder)
        else:
            notes.append(
                f"the column {name} lacks clips, so it cannot be trained on: give --encoder {name}"
            )
    if tuple(complete) != card.encoders:
        card = replace(card, encoders=tuple(complete))
        write_card(filesystem, folder, card)
    return card, notes


def _stored(filesystem: fs.FileSystem, folder: str) -> dict[str, EncoderCard]:
    """Return the cards of all encoders whose columns a shard set has, also if parts are missing."""
    found = {}
    selector = fs.FileSelector(f"{folder}/{ENCODERS}", allow_not_found=True)
    for entry in filesystem.get_file_info(selector):
        path = f"{folder}/{weights_name(entry.base_name)}"
        if filesystem.get_file_info(path).is_file:
            with filesystem.open_input_file(path) as file:
                found[entry.base_name] = EncoderCard.from_file(file, path)
    return found


def missing_parts(
    filesystem: fs.FileSystem, folder: str, card: ShardCard, encoder: EncoderCard
) -> list[int]:
    """Return the parts whose column is missing or outdated, and delete files of no part."""
    own = {f"{folder}/{feature_name(encoder.name, part)}" for part in card.parts}
    selector = fs.FileSelector(f"{folder}/{ENCODERS}/{encoder.name}", allow_not_found=True)
    found = {entry.path for entry in filesystem.get_file_info(selector)}
    for path in sorted(found - own - {f"{folder}/{weights_name(encoder.name)}"}):
        filesystem.delete_file(path)

    def is_missing(part: int) -> bool:
        path = f"{folder}/{feature_name(encoder.name, part)}"
        if path not in found:
            return True
        clips = _read_clips(filesystem, folder, part, KEYED)
        key = _column_key(clips, card.features, encoder)
        try:
            schema = pq.read_schema(path, filesystem=filesystem)
        except pa.ArrowException:
            return True
        return (schema.metadata or {}).get(KEY, b"").decode() != key

    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        return list(itertools.compress(card.parts, pool.map(is_missing, card.parts)))


def _column_key(clips: pa.Table, features: FeatureConfig, encoder: EncoderCard) -> str:
    """Return hex digits that change with a part's clips, the features' settings and the weights."""
    text = json.dumps([features.fingerprint, encoder.weights, clips.select(KEYED).to_pydict()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write_column(
    shards: str,
    card: ShardCard,
    weights: "EncoderWeights",
    parts: list[int],
    lock: Lock,
    address: str,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Run the job for one encoder, report each part, and stop if another run took over the lock."""
    import ray
    import ray.data

    filesystem, folder = filesystem_of(shards)
    name = weights.card.name
    filesystem.create_dir(f"{folder}/{ENCODERS}/{name}")
    _store_weights(filesystem, f"{folder}/{weights_name(name)}", weights)
    clips = {part: _read_clips(filesystem, folder, part, ["path", "window"]) for part in parts}
    num_pending = sum(_num_files(table) for table in clips.values())
    counter = ProgressCounter(card.counts[OK], card.counts[OK] - num_pending)
    with cluster(address), show(progress) as report:
        paths = itertools.chain.from_iterable(t["path"].to_pylist() for t in clips.values())
        require_shared(shards, *one_of_each_folder(paths))
        set_up_ray_data()
        total, gpus = resources_within_reach(), has_gpus()
        cpus = max(int(total.get("CPU", 1)), 1)
        actors = min(ACTORS_PER_GPU * int(total["GPU"]) if gpus else cpus, len(parts))
        threads = max(cpus // actors, 1) if gpus else 1
        encoder = ray.put(weights.build())
        results = ray.data.from_items(
            [{"part": part} for part in parts], override_num_blocks=len(parts)
        ).map_batches(
            _PartEncoder,
            fn_constructor_args=(absolute(shards), card.features, encoder, threads),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_cpus=1,
            num_gpus=1 / ACTORS_PER_GPU if gpus else None,
        )
        try:
            for result in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                for part, failure in zip(*result.to_pydict().values(), strict=True):
                    if failure:
                        raise ShardsError(
                            f"{shards}: the column {name} of part {part} was not written "
                            f"({failure}); its other parts are kept: remove the cause, then give "
                            "the same command again"
                        )
                    lock.check()
                    report(counter.add({OK: _num_files(clips[part])}))
        except ray.exceptions.RayError as error:
            raise ShardsError(
                f"{shards}: encoding by {name} failed ({last_line(error)}); the parts so far are "
                "kept: remove the cause, then give the same command again"
            ) from error


def _store_weights(filesystem: fs.FileSystem, path: str, weights: "EncoderWeights") -> None:
    """Write the weights beside their column, unless they are there."""
    if filesystem.get_file_info(path).is_file:
        return
    with TemporaryDirectory() as temporary, atomic_write(filesystem, path) as target:
        file = Path(temporary, "encoder.safetensors")
        weights.write(file)
        fs.copy_files(str(file), target, destination_filesystem=filesystem)


def _read_clips(
    filesystem: fs.FileSystem, folder: str, part: int, columns: Sequence[str]
) -> pa.Table:
    path = f"{folder}/{part_name(part)}"
    return pq.read_table(path, columns=list(columns), filesystem=filesystem)


def _num_files(clips: pa.Table) -> int:
    return int(np.count_nonzero(clips["window"].to_numpy() == 0))


def encode_part(
    filesystem: fs.FileSystem,
    folder: str,
    part: int,
    extractor: FeatureExtractor,
    encoder: "Encoder",
    threads: int = 1,
) -> None:
    """Encode the clips of a part, and write its column.

    Args:
        filesystem: where the shard set is.
        folder: path of the shard set on it.
        part: the part's number.
        extractor: trims and cuts, as it did for the clips.
        encoder: the encoder, on its device.
        threads: number of recordings that are decoded at once.

    Raises:
        OSError: a recording cannot be read as before, or the column cannot be written.
    """
    columns = ["path", "start", "end", "num_frames", *KEYED]
    clips = _read_clips(filesystem, folder, part, columns)
    card = encoder.card
    values = np.empty((len(clips), card.num_layers, card.dim), np.float16)
    with ThreadPoolExecutor(threads) as pool:
        for rows in _groups_of_recordings(clips):
            recordings = [clips.take(own).to_pylist() for own in rows]
            waves = pool.map(lambda windows: _waves_again(windows, extractor), recordings)
            found = encoder.encode(list(itertools.chain.from_iterable(waves)))
            if not np.isfinite(found).all():
                raise OSError(f"{card.name} has values that are not finite, so its weights are bad")
            values[np.concatenate(rows)] = found.clip(-65504, 65504)
    key = _column_key(clips, extractor.config, card)
    table = pa.table({card.name: feature_column(values)}).replace_schema_metadata({KEY: key})
    write_table(filesystem, f"{folder}/{feature_name(card.name, part)}", table)


def _groups_of_recordings(clips: pa.Table) -> Iterator[list[np.ndarray]]:
    """Yield the rows of each recording, from short to long, in groups of `WINDOWS_AT_ONCE` rows."""
    firsts = np.flatnonzero(clips["window"].to_numpy() == 0)
    recordings = np.split(np.arange(len(clips)), firsts[1:]) if len(clips) else []
    frames = clips["num_frames"].to_numpy()
    by_length = sorted(recordings, key=lambda rows: int(frames[rows].max()))
    return in_groups(by_length, len, WINDOWS_AT_ONCE)


def _waves_again(windows: list[dict[str, Any]], extractor: FeatureExtractor) -> list[np.ndarray]:
    """Return the waveforms of a recording's windows, which are these rows of the clips."""
    path, start, end, content = (windows[0][name] for name in ("path", "start", "end", "content"))
    try:
        sound, _ = cut(decode(path, max_seconds=MAX_RECORDING_SECONDS), start, end)
        waves = extractor.windows(sound.samples, sound.sample_rate)
    except ClipError as error:
        raise OSError(f"{path}: {error.reason}") from error
    if sample_digest(sound.samples) != content or len(waves) != len(windows):
        raise OSError(f"{path}: the file has changed since its clip was prepared")
    return waves


class _PartEncoder:
    """An actor that holds the encoder."""

    def __init__(self, shards: str, features: FeatureConfig, encoder: Any, threads: int) -> None:
        import ray
        import torch

        self.shards, self.threads = shards, threads
        self.extractor = FeatureExtractor(features)
        self.encoder: Encoder = ray.get(encoder)
        if ray.get_gpu_ids() and torch.cuda.is_available():
            self.encoder.to(torch.device("cuda"))
        else:
            torch.set_num_threads(1)  # an actor has one CPU

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        filesystem, folder = filesystem_of(self.shards)
        part, failure = int(batch["part"][0]), ""
        try:
            encode_part(filesystem, folder, part, self.extractor, self.encoder, self.threads)
        except OSError as error:
            failure = error.strerror or str(error)
        return pa.table({"part": [part], "failure": [failure]})
