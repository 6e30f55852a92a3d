"""The card of a checkpoint: everything that a reader must know to use its weights."""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from ser_ray.corpus.words import CORPORA, CorpusKind
from ser_ray.errors import CheckpointError, ConfigError, MismatchError
from ser_ray.features.config import KINDS, FeatureConfig, require_valid
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


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCard:
    """Describes the weights in the same folder: everything that is needed to use them."""

    labels: tuple[str, ...]
    """Label of every output."""
    config: TrainConfig
    """The recipe."""
    features: FeatureConfig
    """How features are computed from a clip."""
    normalisation: Normalisation
    """Applied to the features before the network."""
    corpus: CorpusKind
    """The kind of corpus."""
    shards_fingerprint: str
    """Identity of the shard set trained on."""
    split: dict[str, Any]
    """The fold (`ser_ray.training.parts.describe_split`)."""
    initial_weights: str
    """Origin of the weights that training started from."""
    corpora: tuple[UsedCorpus, ...] = ()
    """The clips and labels of each corpus, if there are several or if labels were mapped."""
    ingest: Literal["resident", "stream"] = "resident"
    """How the training clips were read. The order of the clips depends on it."""
    encoder: EncoderCard | None = None
    """The encoder whose layers are the features; None for spectrogram, mel and mfcc."""
    encoder_file: str = ""
    """Where the encoder's weights were during the training."""
    temperature: float = 1.0
    """Scales the probabilities (`ser_ray.training.calibration`); fitted on the validation clips."""

    def __post_init__(self) -> None:
        require_valid(self)
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise ConfigError(f"labels is {self.labels}: it must be two or more different labels")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}: it must be above 0")

    @property
    def trained_on(self) -> str:
        """Name of the corpus, as shown beside every score."""
        names = " and ".join(corpus.name for corpus in self.corpora)
        return CORPORA[self.corpus] + (f" ({names})" if len(self.corpora) > 1 else "")

    @property
    def network(self) -> str:
        """The kind of network."""
        if self.encoder is None:
            return "ResNet18"
        units = self.config.head_units
        return f"a head with {units} hidden units" if units else "a linear head"

    def to_json(self) -> str:
        """Serialise to JSON."""
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
            CheckpointError: the card has another schema version.
            ValueError, KeyError, TypeError, ConfigError: the text is not a card.
        """
        values = read_object(text)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"the card has schema version {version}, but this version of ser-ray reads "
                f"{SCHEMA_VERSION}: use the version that wrote it, or train again"
            )
        normalisation = values.pop("normalisation")
        mean, std = (np.asarray(normalisation[name], np.float64) for name in ("mean", "std"))
        config = TrainConfig.from_dict(values.pop("config"))
        features = FeatureConfig(**values.pop("features"))
        encoder = EncoderCard.from_dict(own) if (own := values.pop("encoder")) else None
        if (encoder.name if encoder else "") != ("" if config.feature in KINDS else config.feature):
            raise ValueError(f"the encoder does not match the feature {config.feature}")
        num_bins = encoder.num_values if encoder else features.num_bins(config.feature)
        if not mean.shape == std.shape == (num_bins,):
            raise ValueError(f"the normalisation is not for features of {num_bins} bins")
        if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
            raise ValueError("the normalisation must be finite, with deviations above 0")
        return cls(
            labels=tuple(values.pop("labels")),
            corpora=tuple(UsedCorpus(**corpus) for corpus in values.pop("corpora", ())),
            config=config,
            features=features,
            normalisation=Normalisation(mean, std),
            encoder=encoder,
            **values,
        )

    def require_same(self, other: "CheckpointCard", where: str) -> None:
        """Refuse to resume from a checkpoint of another training.

        Args:
            other: card of the checkpoint.
            where: location of the checkpoint, for the message.

        Raises:
            MismatchError: a field differs; the message names the first one.
        """
        keys = ("labels", "features", "shards_fingerprint", "split", "config", "ingest", "encoder")
        ours, theirs = (
            {key: values[key] for key in keys}
            for values in (json.loads(card.to_json()) for card in (self, other))
        )
        if difference := first_difference(theirs, ours):
            raise MismatchError(
                f"{where}: its {difference}; give the run another --name to start afresh, or use "
                "the settings it was trained with"
            )


def make_card(
    config: TrainConfig,
    shards: ShardSet,
    data: FoldData[Source],
    pretrained: Pretrained,
    ingest: Literal["resident", "stream"],
) -> CheckpointCard:
    """Make the card of a training. Its checkpoints differ from it only in their temperature."""
    return CheckpointCard(
        labels=data.labels,
        config=config,
        features=shards.card.features,
        normalisation=data.normalisation,
        corpus=shards.card.corpus,
        corpora=shards.corpora,
        shards_fingerprint=shards.card.fingerprint,
        split=describe_split(data.split),
        initial_weights=pretrained.origin,
        ingest=ingest,
        encoder=shards.card.encoder_of(config.feature),
        encoder_file=location_inside(shards.locations[0], weights_name(config.feature)),
    )


def first_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """Describe the first entry in which two JSON mappings differ; empty if they are equal."""
    for key in ours:
        if theirs.get(key) != ours[key]:
            return f"{key} is {_describe_difference(theirs.get(key), ours[key])}"
    return ""


def _describe_difference(theirs: Any, ours: Any) -> str:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        names = [key for key in ours if theirs.get(key) != ours[key]]
        return ", ".join(f"{key} {theirs.get(key)!r} instead of {ours[key]!r}" for key in names[:3])
    return f"{theirs!r} instead of {ours!r}"
