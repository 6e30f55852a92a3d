"""The card of a checkpoint, a JSON file with all that a program must know to use the weights."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ser_ray.corpus.words import CORPORA, CorpusKind
from ser_ray.errors import ConfigError, MismatchError
from ser_ray.features.config import KINDS, FeatureConfig, require_range, require_valid
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.shards.card import UsedCorpus
from ser_ray.shards.layout import weights_name
from ser_ray.shards.read import ShardSet
from ser_ray.storage.json_text import read_object
from ser_ray.storage.paths import location_inside
from ser_ray.training.data import FoldData, Normalisation, Source
from ser_ray.training.model import Pretrained
from ser_ray.training.parts import describe_split
from ser_ray.training.recipe import TrainConfig

SCHEMA_VERSION = 1
CARD_ERRORS = (ValueError, KeyError, TypeError, OverflowError, ConfigError)
"""The errors of `CheckpointCard.from_json`."""
IngestKind = Literal["resident", "stream"]
"""Whether the training clips were in memory or streamed. Their order depends on this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCard:
    """Describes the weights in the folder of a checkpoint."""

    labels: tuple[str, ...]
    """Label of every output of the network."""
    config: TrainConfig
    """The recipe."""
    features: FeatureConfig
    """How features are computed from a clip."""
    normalisation: Normalisation
    """How features are normalised before they enter the network."""
    corpus: CorpusKind
    """Kind of the corpus that the training clips are from."""
    shards_fingerprint: str
    """`ShardCard.fingerprint` of the shard set."""
    split: dict[str, Any]
    """The fold and its speakers (`ser_ray.training.parts.describe_split`)."""
    initial_weights: str
    """Where the initial weights are from, in words (`Pretrained.origin`)."""
    corpora: tuple[UsedCorpus, ...] = ()
    """The clips and labels of each corpus. Empty for one corpus whose labels were not mapped."""
    ingest: IngestKind = "resident"
    encoder: EncoderCard | None = None
    """The encoder that computes the features; None for spectrogram, mel and mfcc."""
    encoder_file: str = ""
    """Where the encoder's weights were during the training; empty without an encoder."""
    temperature: float = 1.0
    """Temperature of the probabilities (`ser_ray.training.calibration`)."""

    def __post_init__(self) -> None:
        require_valid(self)
        require_range(self, "temperature", above=0)
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ConfigError(f"labels is {self.labels}: it must be two or more different labels")

    @property
    def trained_on(self) -> str:
        """Name of the corpus or corpora, as pages show it beside scores."""
        names = " and ".join(corpus.name for corpus in self.corpora)
        return CORPORA[self.corpus] + (f" ({names})" if len(self.corpora) > 1 else "")

    @property
    def network(self) -> str:
        """Name of the network, as texts show it."""
        if self.encoder is None:
            return "ResNet18"
        units = self.config.head_units
        return f"a head with {units} hidden units" if units else "a linear head"

    def to_json(self) -> str:
        """Convert to the text of the JSON file."""
        values = asdict(self) | {
            "schema_version": SCHEMA_VERSION,
            "normalisation": {
                "mean": self.normalisation.mean.tolist(),
                "std": self.normalisation.std.tolist(),
            },
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointCard":
        """Parse the text that `to_json` returned.

        Raises:
            CARD_ERRORS: the text is not a card, or the card has another schema version.
        """
        values = read_object(text)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"its schema version is {version}, but this version of ser-ray reads "
                f"{SCHEMA_VERSION}: use the version that wrote it, or train again"
            )
        normalisation = values.pop("normalisation")
        mean, std = (np.asarray(normalisation[name], np.float64) for name in ("mean", "std"))
        recipe = TrainConfig.from_dict(values.pop("config"))
        features = FeatureConfig(**values.pop("features"))
        stored_encoder = values.pop("encoder")
        encoder = EncoderCard.from_dict(stored_encoder) if stored_encoder else None
        expected = None if recipe.feature in KINDS else recipe.feature
        if (encoder.name if encoder else None) != expected:
            raise ValueError(f"the encoder does not match the feature {recipe.feature}")
        num_bins = encoder.num_values if encoder else features.num_bins(recipe.feature)
        if mean.shape != (num_bins,) or std.shape != (num_bins,):
            raise ValueError(f"the normalisation is not for features of {num_bins} bins")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError("the normalisation must be finite, with deviations above 0")
        return cls(
            labels=tuple(values.pop("labels")),
            corpora=tuple(UsedCorpus(**corpus) for corpus in values.pop("corpora")),
            config=recipe,
            features=features,
            normalisation=Normalisation(mean, std),
            encoder=encoder,
            **values,
        )

    def require_same(self, other: "CheckpointCard", location: str) -> None:
        """Raise if a checkpoint belongs to another training, so that it cannot be resumed.

        Args:
            other: card of the checkpoint.
            location: where the checkpoint is, for the message.

        Raises:
            MismatchError: a field differs; the message names the first one.
        """
        keys = ("labels", "features", "shards_fingerprint", "split", "config", "ingest", "encoder")
        ours, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        if difference := first_difference(theirs, {key: ours[key] for key in keys}):
            raise MismatchError(
                f"{location}: the entry {difference}; give the run another --name to start afresh, "
                "or use the settings that it was trained with"
            )


def make_card(
    recipe: TrainConfig,
    shards: ShardSet,
    data: FoldData[Source],
    pretrained: Pretrained,
    ingest: IngestKind,
) -> CheckpointCard:
    """Return the card of a training. The cards of its checkpoints differ only in temperature."""
    encoder, file_name = shards.card.encoder_of(recipe.feature), weights_name(recipe.feature)
    return CheckpointCard(
        labels=data.labels,
        config=recipe,
        features=shards.card.features,
        normalisation=data.normalisation,
        corpus=shards.card.corpus,
        corpora=shards.corpora,
        shards_fingerprint=shards.card.fingerprint,
        split=describe_split(data.split),
        initial_weights=pretrained.origin,
        ingest=ingest,
        encoder=encoder,
        encoder_file=location_inside(shards.locations[0], file_name) if encoder else "",
    )


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Describe the first entry of `ours` that differs in `theirs`; empty if none does."""
    for key, value in ours.items():
        if theirs.get(key) != value:
            return f"{key} differs: {_describe_difference(theirs.get(key), value)}"
    return ""


def _describe_difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        entries = [
            f"{key} is {theirs.get(key)!r} instead of {value!r}"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        return ", ".join(entries[:3])
    return f"{theirs!r} instead of {ours!r}"
