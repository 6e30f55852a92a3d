"""Adds the features of pretrained encoders to a finished shard set, with a Ray Data job.

For each encoder, each shard gets a Parquet file of its own, which `encode_shard` writes. All these
files together are the column of the encoder. Adding an encoder therefore changes no other file
except the card, and reading one kind of feature does not read the others. The run after an
interruption writes only the missing files. A shard whose clips have changed is encoded again.

The job uses Ray actors, because the weights must stay in memory. All actors on a machine share one
copy of the weights in main memory.
"""

import itertools
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import fs

from ser_ray.cluster.connect import cluster
from ser_ray.cluster.resources import has_gpus, max_resources
from ser_ray.cluster.shared_files import one_of_each_folder, require_shared
from ser_ray.errors import ConfigError, EncoderError
from ser_ray.features.config import FeatureConfig
from ser_ray.features.encoder_card import ENCODER_RATE, EncoderCard
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.progress import Report
from ser_ray.shards import layout
from ser_ray.shards.card import ShardCard, write_card
from ser_ray.shards.encode_shard import encode_shard, is_current
from ser_ray.shards.job import run_job, set_up_ray_data, shard_result
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.lock import FolderLock
from ser_ray.storage.paths import absolute, filesystem_of, location_inside

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder, EncoderWeights

logger = logging.getLogger(__name__)

ACTORS_PER_GPU = 2
"""While one actor decodes, the other encodes."""


def load_encoders(
    shards: str, sources: Sequence[str], features: FeatureConfig
) -> "list[EncoderWeights]":
    """Load the named encoders. Weights that are stored in the shard set are not downloaded again.

    Args:
        shards: folder or URI of the shard set.
        sources: the encoders, as for `PrepareConfig.encoder`.
        features: the feature settings of the shard set.

    Raises:
        ConfigError: an encoder is unknown, or the features do not have the sample rate of
            encoders.
        EncoderError: weights cannot be loaded, or differ from those in the shard set.
    """
    if not sources:
        return []
    if features.sample_rate != ENCODER_RATE:
        raise ConfigError(
            f"encoder is {sources[0]}, but sample_rate is {features.sample_rate}: encoders need "
            f"{ENCODER_RATE} Hz"
        )
    from ser_ray.features.encoder import EncoderWeights  # slow: torch and torchaudio

    found = []
    for source in sources:
        name = source.partition("=")[0]
        stored = location_inside(shards, layout.weights_name(name))
        filesystem, path = filesystem_of(stored)
        if filesystem.get_file_info(path).is_file:
            weights = EncoderWeights.load(f"{name}={stored}")
            given = EncoderWeights.load(source) if "=" in source else weights
        else:
            weights = given = EncoderWeights.load(source)
        if given.card.weights != weights.card.weights:
            raise EncoderError(
                f"{source}: its weights have the hash {given.card.weights[:16]}, but the shards "
                f"have a column {name} from weights with the hash {weights.card.weights[:16]}; "
                f"choose another name, or delete {shards}/{layout.ENCODERS}/{name}"
            )
        found.append(weights)
    return found


def add_encoders(
    shards: str,
    card: ShardCard,
    encoders: "Sequence[EncoderWeights]",
    lock: FolderLock,
    address: str,
    progress: Report | None,
) -> tuple[ShardCard, list[str]]:
    """Encode the shards that the encoders' columns lack, and list complete columns in the card.

    Args:
        shards: folder or URI of the shard set.
        card: the card of the shard set.
        encoders: the encoders whose columns are written.
        lock: held on the shard set.
        address: cluster to join; unused if no column lacks shards.
        progress: called after every shard; if None, `run_job` shows the progress.

    Returns:
        The new card of the shard set, and a warning for each column that lacks clips.

    Raises:
        ShardsError: a recording cannot be read or has changed, or the job failed.
        LockLostError: another process has taken over the shard set.
        EncoderError: a stored file of weights has no valid card, or an encoder cannot be built.
        ResourcesError: no cluster answers, or a node cannot open the recordings or the shards.
    """
    named = {weights.card.name: weights for weights in encoders}
    cards = {item.name: item for item in card.encoders} | _stored(shards)
    cards |= {name: weights.card for name, weights in named.items()}
    numbers = {name: missing_shards(shards, card, cards[name]) for name in sorted(cards)}
    incomplete = {name for name in numbers if numbers[name]}
    with nullcontext() if incomplete.isdisjoint(named) else cluster(address, has_actor_pool=True):
        for name, weights in named.items():
            _store_weights(location_inside(shards, layout.weights_name(name)), weights)
            if name in incomplete:
                logger.info("%-12s %s", "encoder", name)
                _write_column(shards, card, weights, numbers[name], lock, progress)
    lacking = sorted(incomplete - named.keys())
    complete = tuple(cards[name] for name in numbers if name not in lacking)
    if complete != card.encoders:
        card = replace(card, encoders=complete)
        write_card(shards, card)
    return card, [
        f"the column {name} lacks clips, so it cannot be trained on: give --encoder {name}"
        for name in lacking
    ]


def _stored(shards: str) -> dict[str, EncoderCard]:
    """Return the encoders that have a column in the shard set, complete or not: {name: card}."""
    found = {}
    filesystem, folder = filesystem_of(location_inside(shards, layout.ENCODERS))
    for entry in filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True)):
        _, path = filesystem_of(location_inside(shards, layout.weights_name(entry.base_name)))
        if filesystem.get_file_info(path).is_file:
            with filesystem.open_input_file(path) as file:
                found[entry.base_name] = EncoderCard.from_file(file, path)
    return found


def missing_shards(shards: str, card: ShardCard, encoder: EncoderCard) -> list[int]:
    """Return the numbers of the shards whose file of this encoder is missing or outdated.

    Files of the encoder that belong to no shard are deleted.
    """
    expected = {layout.feature_name(encoder.name, number) for number in card.shard_numbers}
    found = set(layout.names_in(shards, f"{layout.ENCODERS}/{encoder.name}") or ())
    for name in found - expected - {layout.weights_name(encoder.name)}:
        layout.delete(shards, name)

    def is_missing(number: int) -> bool:
        is_there = layout.feature_name(encoder.name, number) in found
        return not (is_there and is_current(shards, number, card.features, encoder))

    numbers = card.shard_numbers
    with ThreadPoolExecutor(layout.REQUESTS_AT_ONCE) as pool:
        return list(itertools.compress(numbers, pool.map(is_missing, numbers)))


def _write_column(
    shards: str,
    card: ShardCard,
    weights: "EncoderWeights",
    numbers: list[int],
    lock: FolderLock,
    progress: Report | None,
) -> None:
    """Encode the shards with these numbers in a pool of actors."""
    import ray
    import ray.data

    clips = [
        layout.read_table(shards, layout.clips_name(number), ["path", "window"])
        for number in numbers
    ]
    paths = itertools.chain.from_iterable(table["path"].to_pylist() for table in clips)
    require_shared(shards, *one_of_each_folder(paths))
    set_up_ray_data()
    resources, gpus = max_resources(), has_gpus()
    cpus = max(int(resources.get("CPU", 1)), 1)
    most = ACTORS_PER_GPU * int(resources["GPU"]) if gpus else cpus
    actors = min(most, len(numbers))
    threads = max(cpus // actors, 1) if gpus else 1  # threads that decode, in each actor
    results = ray.data.from_items(
        [{"shard": number} for number in numbers], override_num_blocks=len(numbers)
    ).map_batches(
        _ShardEncoder,
        fn_constructor_args=(absolute(shards), card.features, ray.put(weights.build()), threads),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=1 / ACTORS_PER_GPU if gpus else None,
    )
    num_missing = sum(pc.sum(pc.equal(table["window"], 0)).as_py() or 0 for table in clips)
    num_clips = card.counts[layout.OK]
    run_job(results, shards, lock, num_clips, num_clips - num_missing, progress)


def _store_weights(location: str, weights: "EncoderWeights") -> None:
    """Write the weights beside the column, unless they are there already."""
    filesystem, path = filesystem_of(location)
    if filesystem.get_file_info(path).is_file:
        return
    filesystem.create_dir(path.rpartition("/")[0])
    with TemporaryDirectory() as temporary, atomic_write(filesystem, path) as stream:
        local = Path(temporary, "encoder.safetensors")
        weights.write(local)
        with local.open("rb") as file:
            shutil.copyfileobj(file, stream)


class _ShardEncoder:
    """An actor that holds the encoder, and encodes one shard in each call."""

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
        number, encoder = int(batch["shard"][0]), self.encoder
        write = partial(encode_shard, self.shards, number, self.extractor, encoder, self.threads)
        name = layout.feature_name(encoder.card.name, number)
        return shard_result(name, lambda: {layout.OK: write()})
