"""The card describes a shard set. It is written last, so a set without a card is unfinished."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa

from ser_ray.corpus.manifest import Corpus
from ser_ray.corpus.words import CorpusKind
from ser_ray.errors import ConfigError, ShardsError
from ser_ray.features.config import KINDS, FeatureConfig, require_valid
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.shards import layout
from ser_ray.storage.atomic import write_file
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import filesystem_of, location_inside, read_file

SCHEMA_VERSION = 3
FINGERPRINTED = ["take", "speaker", "emotion", "content", "window"]
"""Columns of the clips on which the fingerprint depends. It also depends on the label set and the
feature settings."""


@dataclass(frozen=True, kw_only=True)
class UsedCorpus:
    """Says which clips of a shard set are used.

    A `UsedCorpus` is made only if several sets are read as one, or if labels are mapped.
    """

    name: str
    """Name of the corpus. By default, it is the name of the shard set's folder."""
    kind: CorpusKind
    fingerprint: str
    """Fingerprint of the shard set."""
    labels: dict[str, str]
    """{label in the shard set: new label}. Clips with other labels are left out."""
    clips: int
    """Number of clips that are used."""
    speakers: int
    """Number of speakers of the clips that are used."""
    left_out: dict[str, int]
    """Number of clips that are left out, by label."""

    def __post_init__(self) -> None:
        require_valid(self)

    @property
    def prefix(self) -> str:
        """Prefix of the names of speakers and takes, if the corpora have different prefixes."""
        return self.name if self.kind == "table" else self.kind

    def __str__(self) -> str:
        renamed = [f"{old} as {new}" for old, new in self.labels.items() if old != new]
        left_out = [f"{count} {label}" for label, count in self.left_out.items()]
        lines = [f"{self.name}: {self.clips} clips, {self.speakers} speakers", ", ".join(renamed)]
        lines.append(f"left out: {', '.join(left_out)}" if left_out else "")
        return "; ".join(filter(None, lines))


def have_prefixes(corpora: Iterable[UsedCorpus]) -> bool:
    """Return whether the speakers of these corpora have names with a prefix, like `emodb:03`."""
    return len({corpus.prefix for corpus in corpora}) > 1


@dataclass(frozen=True, kw_only=True)
class ShardCard:
    """The description of a committed shard set."""

    corpus: CorpusKind
    source: str
    """Folder, bucket or table of the corpus."""
    labels: tuple[str, ...]
    """The label set; the position of a label is its class index."""
    features: FeatureConfig
    counts: dict[str, int]
    """Number of listed files, or segments of files, by outcome."""
    shard_numbers: tuple[int, ...]
    """Numbers of the shards, ascending."""
    shard_sizes: tuple[int, ...]
    """Number of rows in each shard. A clip has one row; a long clip has one row for each window."""
    fingerprint: str
    """Sixteen hex digits that depend on the feature settings, clips, labels and speakers, but not
    on the location of the corpus or on encoders."""
    encoders: tuple[EncoderCard, ...] = ()
    """The encoders whose columns are complete."""
    schema_version: int = SCHEMA_VERSION
    """Version of the folder's layout."""

    def __post_init__(self) -> None:
        require_valid(self)
        numbers, sizes = self.shard_numbers, self.shard_sizes
        if len(numbers) != len(sizes) or min(*numbers, *sizes, 0) < 0:
            raise ConfigError(f"shard_sizes is {sizes}: it must count the rows of every shard")

    @property
    def num_files(self) -> int:
        """Number of listed files, or segments of files."""
        return sum(self.counts.values())

    @property
    def num_rows(self) -> int:
        """Number of rows in all shards."""
        return sum(self.shard_sizes)

    def encoder_of(self, kind: str) -> EncoderCard | None:
        """Return the encoder of a kind of feature; None for spectrogram, mel and mfcc.

        Raises:
            ConfigError: the shards do not have this kind; the message lists the kinds they have.
        """
        if kind in KINDS:
            return None
        encoders = {encoder.name: encoder for encoder in self.encoders}
        if kind in encoders:
            return encoders[kind]
        kinds = ", ".join([*KINDS, *encoders])
        raise ConfigError(
            f"feature is {kind}: the shards of {self.source} have {kinds}; `ser-ray prepare "
            f"--encoder {kind}` adds an encoder"
        )

    def shape_of(self, kind: str) -> tuple[int, int]:
        """Return the shape of a feature: [bins, num_frames], or [layers, dim] for an encoder."""
        encoder = self.encoder_of(kind)
        if encoder is not None:
            return encoder.num_layers, encoder.dim
        return self.features.num_bins(kind), self.features.num_frames

    def num_bins(self, kind: str) -> int:
        """Return the number of values in a frame.

        The features of an encoder count as one frame that holds all layers.
        """
        encoder = self.encoder_of(kind)
        return self.features.num_bins(kind) if encoder is None else encoder.num_values

    def fingerprint_of(self, kind: str) -> str:
        """Return the fingerprint of one kind of feature.

        For an encoder, the fingerprint also depends on the encoder's weights.
        """
        encoder = self.encoder_of(kind)
        if encoder is None:
            return self.fingerprint
        return hashlib.sha256(f"{self.fingerprint}{encoder.weights}".encode()).hexdigest()[:16]


def make_card(
    shards: str, corpus: Corpus, features: FeatureConfig, numbers: Sequence[int]
) -> ShardCard:
    """Make the card of a shard set from the committed shards with these numbers, ascending."""

    def read_shard(number: int) -> tuple[list[str], pa.Table]:
        outcomes = layout.read_table(shards, layout.outcomes_name(number), ["status"])
        clips = layout.read_table(shards, layout.clips_name(number), FINGERPRINTED)
        return outcomes["status"].to_pylist(), clips

    counts: Counter[str] = Counter()
    sizes = []
    digest = hashlib.sha256(json.dumps([features.fingerprint, corpus.labels]).encode())
    with ThreadPoolExecutor(layout.REQUESTS_AT_ONCE) as pool:
        for statuses, table in pool.map(read_shard, numbers):
            counts.update(statuses)
            sizes.append(len(table))
            for row in zip(*table.to_pydict().values(), strict=True):
                digest.update(json.dumps(row).encode())
    assert sum(sizes) >= counts[layout.OK], "every decoded clip has at least one row"
    return ShardCard(
        corpus=corpus.name,
        source=corpus.root,
        labels=corpus.labels,
        features=features,
        counts=dict(sorted(counts.items())),
        shard_numbers=tuple(numbers),
        shard_sizes=tuple(sizes),
        fingerprint=digest.hexdigest()[:16],
    )


def write_card(shards: str, card: ShardCard) -> None:
    """Write the card, which commits the shard set."""
    content = json.dumps(asdict(card), indent=1).encode()
    write_file(*filesystem_of(location_inside(shards, layout.CARD_NAME)), content)


def read_card(shards: str) -> ShardCard | None:
    """Return the card of a shard set, or None if there is no card.

    Raises:
        ShardsError: the card cannot be read, is damaged, or has another version.
        ConfigError: no filesystem can open the location.
    """
    try:
        content = read_file(location_inside(shards, layout.CARD_NAME))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ShardsError(f"{shards}: cannot be read ({error})") from error
    try:
        values = read_object(content)
        if (version := values["schema_version"]) != SCHEMA_VERSION:
            raise ShardsError(
                f"{shards} has layout version {version}, and this program reads only version "
                f"{SCHEMA_VERSION}; prepare the corpus again into another folder"
            )
        values["features"] = FeatureConfig(**values["features"])
        for name in ("labels", "shard_numbers", "shard_sizes"):
            values[name] = tuple(values[name])
        values["encoders"] = tuple(map(EncoderCard.from_dict, values["encoders"]))
        return ShardCard(**values)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ShardsError(
            f"{shards}/{layout.CARD_NAME} is not the card of a shard set ({error}); delete it, and "
            "run the same `ser-ray prepare` again"
        ) from error
