"""The settings of `prepare`. `--help` imports this module, so it imports nothing heavy."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from ser_ray.corpus.ravdess.names import MODALITIES
from ser_ray.corpus.words import COLUMNS, MISSING_WORDS
from ser_ray.errors import ConfigError
from ser_ray.features.config import FeatureConfig, require_range

ShardLocations = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Folder or URI of a shard set, or of several sets that are read as one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TableConfig:
    """Says how a table of clips is read."""

    missing: tuple[str, ...] = MISSING_WORDS
    """Words in a table that mean a missing value, in upper or lower case. After `--missing` without
    words, only an empty cell is a missing value."""
    columns: tuple[str, ...] = ()
    """Names of a table's columns as COLUMN=NAME, as in label=mood speaker=who. They are needed only
    for names that are not recognised. The columns are path, label, speaker, take, start, end and
    split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareConfig(TableConfig):
    """Says which clips become shards, and where the shards are written."""

    corpus: str
    """Folder or URI with RAVDESS in any folder layout, or a table of other clips."""
    shards: str = "ser-ray-out/shards"
    """Folder or URI to write the shards to."""
    include: tuple[str, ...] = MODALITIES
    """Modalities to decode; files of other modalities are counted as `excluded`."""
    rows_per_shard: int = 128
    """Largest number of files, or segments of files, in a shard. One task decodes and writes a
    shard."""
    encoder: tuple[str, ...] = ()
    """Pretrained speech encoders whose layers also become features. Each is a bundle of torchaudio
    in lower case (wavlm_base_plus, hubert_large, wav2vec2_xlsr_300m), or NAME=FILE, where FILE has
    the weights."""
    features: FeatureConfig = field(default_factory=FeatureConfig)

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
        names = [source.partition("=")[0] for source in self.encoder]
        if len(set(names)) < len(names):
            raise ConfigError(f"encoder is {' '.join(self.encoder)}: a name must occur only once")
        require_range(self, "rows_per_shard", low=1)


def column_names(columns: Sequence[str]) -> dict[str, str]:
    """Parse words such as label=emotion, and return {column in `COLUMNS`: its name in the table}.

    Raises:
        ConfigError: a word has another form, or names an unknown column.
    """
    found = {}
    for word in columns:
        name, _, given = word.partition("=")
        if name not in COLUMNS or not given:
            raise ConfigError(
                f"columns is {word}: it must be COLUMN=NAME, as in label=emotion, where COLUMN is "
                f"one of {','.join(COLUMNS)} and NAME is its name in the table"
            )
        found[name] = given
    return found
