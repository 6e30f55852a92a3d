"""Describes a pretrained speech encoder. This module imports nothing heavy."""

import re
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

from ser_ray.errors import ConfigError, EncoderError
from ser_ray.features.config import KINDS, require_valid
from ser_ray.storage.json_text import read_object

METADATA = "ser_ray.encoder"
"""Key of the card in the metadata of a safetensors file."""
LARGEST_HEADER = 100_000_000
"""Largest allowed header of a safetensors file, in bytes; the library has the same limit."""
LARGEST_SIZE = 8_192
"""Largest allowed number of layers, and of values in a layer."""
ENCODER_RATE = 16_000
"""Sample rate of every encoder, in hertz."""


@dataclass(frozen=True, kw_only=True)
class EncoderCard:
    """The network of an encoder, the hash of its weights, and what they were trained on."""

    name: str
    """Name of the encoder and of its kind of feature. It is a bundle of torchaudio in lower case,
    or a name that the user chose."""
    family: Literal["Wav2Vec2", "WavLM"]
    """Which constructor of `torchaudio.models` builds the network; HuBERT is a Wav2Vec2."""
    arguments: dict[str, Any]
    """Arguments of the constructor."""
    normalises: bool
    """Whether each clip is scaled to mean 0 and variance 1 before the network."""
    licence: str = "not stated"
    trained_on: str = "not stated"
    """What the weights were trained on."""
    labelled: tuple[str, ...] = ()
    """Corpora whose emotion labels the weights were trained with: keys of
    `ser_ray.corpus.words.CORPORA`."""
    weights: str = ""
    """SHA-256 of the weights, in hex digits."""

    def __post_init__(self) -> None:
        require_valid(self)
        if self.name in KINDS or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", self.name):
            raise ConfigError(
                f"encoder is {self.name}: its name must have lower-case letters, digits and "
                "underscores only, begin with a letter, be at most 64 characters long, and be none "
                f"of {', '.join(KINDS)}"
            )

    @property
    def num_layers(self) -> int:
        """Number of transformer layers."""
        return int(self.arguments["encoder_num_layers"])

    @property
    def dim(self) -> int:
        """Number of values in a layer."""
        return int(self.arguments["encoder_embed_dim"])

    @property
    def num_values(self) -> int:
        """Number of values in all layers."""
        return self.num_layers * self.dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EncoderCard":
        """Return the card with these values, which are those of `dataclasses.asdict` or of JSON.

        Raises:
            ConfigError, TypeError, KeyError: the values do not describe an encoder.
        """
        card = cls(**(values | {"labelled": tuple(values["labelled"])}))
        sizes = [card.arguments[name] for name in ("encoder_num_layers", "encoder_embed_dim")]
        if not all(type(size) is int and 0 < size <= LARGEST_SIZE for size in sizes):
            raise ConfigError(
                f"the encoder {card.name} has {sizes[0]} layers of {sizes[1]} values: both must be "
                f"whole numbers from 1 to {LARGEST_SIZE}"
            )
        return card

    @classmethod
    def from_file(cls, file: BinaryIO, location: str) -> "EncoderCard":
        """Read the card from the metadata of a safetensors file, which is open at its start.

        Raises:
            EncoderError: the file has no valid card.
        """
        try:
            size = int.from_bytes(file.read(8), "little")
            if size > LARGEST_HEADER:
                raise ValueError("its header is too long")
            header = read_object(file.read(size))
            return cls.from_dict(read_object(header["__metadata__"][METADATA]))
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise EncoderError(
                f"{location}: is not an encoder file, because its metadata has no valid "
                f"{METADATA} ({error}); delete it, and give a file that ser_ray wrote"
            ) from error
