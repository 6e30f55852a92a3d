"""The card of a shard set: what it holds, written last. A folder without one is unfinished."""

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ser_ray.corpus.manifest import Corpus
from ser_ray.errors import ShardsError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.layout import CARD_NAME, OK, REQUESTS_AT_ONCE, outcomes_name, part_name
from ser_ray.shards.plan import Plan
from ser_ray.storage.atomic import write_file

SCHEMA_VERSION = 1
DATA = ["take", "speaker", "emotion", "content"]
"""The columns that, with the features' configuration, are what a training depends on."""


@dataclass(frozen=True, kw_only=True)
class ShardCard:
    """What a committed shard set says of itself."""

    corpus: str
    """`ravdess`, `synthetic` or `table`."""
    source: str
    """Folder, bucket or table that was listed."""
    labels: tuple[str, ...]
    """The label set; a label's place in it is its class index."""
    features: FeatureConfig
    """What a feature is."""
    counts: dict[str, int]
    """Files by outcome; they add up to the files listed."""
    parts: tuple[int, ...]
    """Numbers of the parts, ascending."""
    clips: tuple[int, ...]
    """Decoded clips in each part."""
    fingerprint: str
    """Sixteen hex digits that differ when features, clips, labels or speakers do, wherever the
    corpus lies."""
    schema_version: int = SCHEMA_VERSION
    """Version of the folder's layout."""

    @property
    def num_files(self) -> int:
        """Files listed."""
        return sum(self.counts.values())

    @property
    def num_clips(self) -> int:
        """Clips decoded: the rows of the shards."""
        return sum(self.clips)


def make_card(filesystem: fs.FileSystem, folder: str, corpus: Corpus, plan: Plan) -> ShardCard:
    """Sum up the committed parts of a plan."""

    def read_part(part: int) -> tuple[list[str], pa.Table]:
        outcomes = f"{folder}/{outcomes_name(part)}"
        statuses = pq.read_table(outcomes, columns=["status"], filesystem=filesystem)["status"]
        clips = f"{folder}/{part_name(part)}"
        return statuses.to_pylist(), pq.read_table(clips, columns=DATA, filesystem=filesystem)

    counts: Counter[str] = Counter()
    clips = []
    digest = hashlib.sha256(json.dumps([plan.features.fingerprint, corpus.labels]).encode())
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for statuses, table in pool.map(read_part, plan.parts):
            counts.update(statuses)
            clips.append(len(table))
            for row in zip(*table.to_pydict().values(), strict=True):
                digest.update(json.dumps(row).encode())
    assert sum(counts.values()) == len(plan.files), "an outcome for every file"
    assert sum(clips) == counts[OK], "a row for every decoded clip"
    return ShardCard(
        corpus=corpus.name,
        source=corpus.root,
        labels=corpus.labels,
        features=plan.features,
        counts=dict(sorted(counts.items())),
        parts=tuple(plan.parts),
        clips=tuple(clips),
        fingerprint=digest.hexdigest()[:16],
    )


def write_card(filesystem: fs.FileSystem, folder: str, card: ShardCard) -> None:
    """Commit a shard set."""
    content = json.dumps(asdict(card), indent=1).encode()
    write_file(filesystem, f"{folder}/{CARD_NAME}", content)


def read_card(filesystem: fs.FileSystem, folder: str) -> ShardCard | None:
    """Return the card of a folder, None if it has none.

    Raises:
        ShardsError: the card is of another version, or no card, or the folder cannot be read.
    """
    try:
        with filesystem.open_input_file(f"{folder}/{CARD_NAME}") as file:
            values: dict[str, Any] = json.loads(file.read())
        if (version := values["schema_version"]) != SCHEMA_VERSION:
            raise ShardsError(
                f"{folder}: its layout is version {version}, this program reads {SCHEMA_VERSION}; "
                "prepare the corpus again into another folder"
            )
        values["features"] = FeatureConfig(**values["features"])
        for name in ("labels", "parts", "clips"):
            values[name] = tuple(values[name])
        return ShardCard(**values)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardsError(f"{folder}: cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ShardsError(f"{folder}/{CARD_NAME}: not the card of a shard set ({error})") from error
