"""The feature settings, which determine the arrays in the shards.

`--help` imports this module, so it imports nothing heavy.
"""

import dataclasses
import hashlib
import json
import math
import operator
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ser_ray.errors import ConfigError

Kind = Literal["spectrogram", "mel", "mfcc"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Condition = Literal["noise", "phone", "codec", "room", "level"]
"""A group of recording conditions (`ser_ray.features.conditions`)."""
LARGEST_NUMBER = 2**63
"""The absolute value of every number in the settings must be smaller."""
LARGEST = {"sample_rate": 192_000, "window_length": 65_536, "num_mels": 4_096, "max_seconds": 600}
"""The largest allowed values of the settings that determine the memory for a clip."""
MAY_BE_ZERO = ("f_min", "trim_margin")
"""The settings that may be 0. All others are above 0."""
LARGEST_FEATURE = 2**26
"""Largest allowed number of values in a clip's feature: 256 MB as float32."""


def require_valid(config: Any) -> None:
    """Check that all fields of a dataclass have the right types, and that float fields are finite.

    Raises:
        ConfigError: a field is wrong; the message names the field.
    """
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}: it must be a finite number")
        if not _has_type(value, kind):
            shown = " or ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else ""
            raise ConfigError(
                f"{name} is {repr(value)[:100]}: it must be "
                f"{shown or getattr(kind, '__name__', kind)}"
            )


def require_range(
    config: Any,
    *names: str,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    below: float = math.inf,
) -> None:
    """Check that fields of a dataclass are in a range: low <= field <= high, above < field < below.

    Raises:
        ConfigError: a field is outside; the message names the field and the bound.
    """
    bounds = (
        ("at least", operator.ge, low),
        ("above", operator.gt, above),
        ("at most", operator.le, high),
        ("below", operator.lt, below),
    )
    for name in names:
        value = getattr(config, name)
        for words, holds, bound in bounds:
            if not holds(value, bound):
                raise ConfigError(f"{name} is {value}: it must be {words} {bound:g}")


def _has_type(value: Any, kind: Any) -> bool:
    """Return whether a value has a type: a class, a `Literal`, or a list, tuple or dict of them."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(
            _has_type(key, inner[0]) and _has_type(item, inner[1]) for key, item in value.items()
        )
    if origin in (list, tuple):
        return isinstance(value, origin) and all(_has_type(item, inner[0]) for item in value)
    if kind in (int, float):  # numpy's numbers too; NaN in a list or dict is allowed
        is_number = isinstance(value, Integral if kind is int else Real)
        is_number = is_number and not isinstance(value, bool)
        return is_number and not abs(value) >= LARGEST_NUMBER
    return isinstance(value, kind)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """The feature settings. Equal settings give equal features."""

    sample_rate: int = 16_000
    """Sample rate in hertz to which every clip is resampled."""
    window_length: int = 800
    """Length of the Hann window and FFT in samples: 50 ms, to resolve the harmonics of a voice."""
    hop_length: int = 400
    """Step between frames in samples: 25 ms."""
    num_mels: int = 64
    """Number of bands of the mel filter bank."""
    num_mfcc: int = 40
    """Number of cepstral coefficients."""
    f_min: float = 50.0
    """Lower edge of the mel filter bank in hertz; the upper edge is half the sample rate."""
    trim_db: float = 50.0
    """The start and end of a clip are trimmed if they are this many dB below its loudest 10 ms, or
    if they are steady noise."""
    trim_margin: float = 0.1
    """Seconds that are kept before the first and after the last sound, for quiet onsets."""
    min_seconds: float = 0.2
    """Clips with less sound than this, in seconds, are `too_short`."""
    max_seconds: float = 6.5
    """Length of the features in the shards, in seconds. A clip with more sound is cut into windows.
    The longest clip of RAVDESS has 6.37 s."""

    def __post_init__(self) -> None:
        require_valid(self)
        require_range(self, *MAY_BE_ZERO, low=0)
        names = {field.name for field in dataclasses.fields(self)}
        require_range(self, *sorted(names.difference(MAY_BE_ZERO)), above=0)
        for name, largest in LARGEST.items():
            require_range(self, name, high=largest)
        if self.f_min >= self.sample_rate / 2:
            raise ConfigError(
                f"f_min is {self.f_min} Hz: it must be below half the sample rate, "
                f"{self.sample_rate / 2:g} Hz"
            )
        for small, large, why in (
            ("hop_length", "window_length", ", so that no samples are skipped"),
            ("num_mfcc", "num_mels", ""),
            ("min_seconds", "max_seconds", ""),
        ):
            if getattr(self, small) > (limit := getattr(self, large)):
                raise ConfigError(
                    f"{small} is {getattr(self, small)}: it must be at most {large}, {limit}{why}"
                )
        largest = max(map(self.num_bins, KINDS)) * self.num_frames
        if largest > LARGEST_FEATURE:
            raise ConfigError(
                f"hop_length is {self.hop_length}: it is too small, because a clip of "
                f"{self.max_seconds:g} s gets features of {largest} numbers, and at most "
                f"{LARGEST_FEATURE} are allowed"
            )

    @property
    def num_frames(self) -> int:
        """Number of frames in `max_seconds`, which every array of these kinds has in the shards."""
        return self.frames_of(round(self.max_seconds * self.sample_rate))

    def frames_of(self, num_samples: int) -> int:
        """Return the number of frames of a waveform; the frames are `hop_length` samples apart."""
        return num_samples // self.hop_length + 1

    def num_bins(self, kind: str) -> int:
        """Return the number of bins of one kind of feature: the first dimension of its arrays."""
        spectrogram = self.window_length // 2 + 1
        return {"spectrogram": spectrogram, "mel": self.num_mels, "mfcc": self.num_mfcc}[kind]

    @property
    def fingerprint(self) -> str:
        """Twelve hex digits that differ if any field differs."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]
