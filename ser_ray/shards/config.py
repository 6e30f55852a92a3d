"""Settings of `prepare`. `--help` imports this module, so it imports nothing heavy."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ser_ray.corpus.ravdess import MODALITIES
from ser_ray.corpus.words import COLUMNS, MISSING_WORDS
from ser_ray.errors import ConfigError
from ser_ray.features.config import FeatureConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig:
    """Which clips become shards, and where the shards are written."""

    corpus: str
    """Folder or URI with RAVDESS in any layout, or a table of other clips."""
    shards: str = "ser-ray-out/shards"
    """Folder or URI that the shards are written to."""
    include: tuple[str, ...] = MODALITIES
    """Modalities to decode; all other files are counted as `excluded`."""
    missing: tuple[str, ...] = MISSING_WORDS
    """Words in a table that mean a missing value, in any case; none if given without a word."""
    columns: tuple[str, ...] = ()
    """Which columns of a table are which, as in label=emotion speaker=spk, if it has other names
    than path, label, speaker, take, start, end and split."""
    rows_per_part: int = 128
    """The most files in a part, which is the unit that one task decodes and commits."""
    encoder: tuple[str, ...] = ()
    """Pretrained speech encoders whose layers also become features, such as wavlm_base_plus,
    hubert_large or wav2vec2_xlsr_300m: bundles of torchaudio in lower case, or NAME=FILE with a
    file of weights."""
    features: FeatureConfig = field(default_factory=FeatureConfig)
    """The settings of the features."""

    def __post_init__(self) -> None:
        for name in ("corpus", "shards"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: it must be a folder or URI")
        if not self.include or not set(self.include) <= set(MODALITIES):
            raise ConfigError(
                f"include is {','.join(self.include) or 'empty'}: it must be one or more of "
                f"{','.join(MODALITIES)}"
            )
        column_names(self.columns)
        if self.rows_per_part < 1:
            raise ConfigError(f"rows_per_part is {self.rows_per_part}: it must be at least 1")


def column_names(columns: Sequence[str]) -> dict[str, str]:
    """Return the names in a table by the names of the columns, from words such as label=emotion.

    Raises:
        ConfigError: a word is not of that form, or names no column.
    """
    found = {}
    for word in columns:
        name, _, given = word.partition("=")
        if name not in COLUMNS or not given:
            raise ConfigError(
                f"columns is {word}: it must be one of {','.join(COLUMNS)}, an equals sign and the "
                "name in the table, as in label=emotion"
            )
        found[name] = given
    return found
