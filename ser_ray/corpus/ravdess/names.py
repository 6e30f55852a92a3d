"""RAVDESS's file names, such as 03-01-06-01-02-01-12.wav: seven codes that describe a clip.

`parse_name` turns a file name into a `ClipName`, and `format_name` does the reverse. RAVDESS has no
other labels. Therefore `parse_name` does not guess the meaning of an invalid name, but raises a
`NameProblem`.

Source: Livingstone and Russo (2018), https://doi.org/10.1371/journal.pone.0196391.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

Modality = Literal["av", "video", "audio"]
Channel = Literal["speech", "song"]
Intensity = Literal["normal", "strong"]

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
"""The eight labels, in the order of their codes 01 to 08."""
MODALITIES: tuple[Modality, ...] = get_args(Modality)
SPEAKERS = tuple(f"{number:02d}" for number in range(1, 25))
EXAMPLE_NAME = "03-01-06-01-02-01-12.wav"

VALUES: dict[str, tuple[Any, ...]] = {
    "modality": MODALITIES,
    "channel": get_args(Channel),
    "emotion": EMOTIONS,
    "intensity": get_args(Intensity),
    "statement": (1, 2),
    "repetition": (1, 2),
    "actor": SPEAKERS,
}
"""{field: its values}, in the order of the fields in a file name. 01 is the code of the first
value of a field."""
_NAME = re.compile("-".join([r"(\d\d)"] * len(VALUES)), re.ASCII)
_NOT_SUNG = ("disgust", "surprised")


class NameProblem(ValueError):  # noqa: N818 - one file is not used, and the run goes on
    """Raised if a file name is not a RAVDESS name; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class ClipName:
    """The fields of a RAVDESS file name."""

    modality: Modality
    """Sound and picture (`av`), picture only (`video`) or sound only (`audio`)."""
    channel: Channel
    """Spoken or sung."""
    emotion: str
    """One of `EMOTIONS`."""
    intensity: Intensity
    """Always normal for neutral."""
    statement: int
    """1 is "Kids are talking by the door", 2 is "Dogs are sitting by the door"."""
    repetition: int
    """1 or 2."""
    speaker: str
    """Actor "01" to "24"; actors with odd numbers are male."""

    def __post_init__(self) -> None:
        if self.emotion == "neutral" and self.intensity == "strong":
            raise NameProblem("neutral has no strong intensity")
        if self.channel == "song" and self.emotion in _NOT_SUNG:
            raise NameProblem(f"{self.emotion} was not sung: song has emotions 01 to 06")

    @property
    def take(self) -> str:
        """The performance: all codes but the modality. Its wav and its mp4s have the same take."""
        return "-".join(_codes(self)[1:])

    @property
    def sex(self) -> Literal["male", "female"]:
        """The sex of the actor."""
        return "male" if int(self.speaker) % 2 else "female"


@lru_cache(maxsize=16_384)  # the 7,356 names of RAVDESS are often listed twice
def parse_name(file_name: str) -> ClipName:
    """Parse a file name (without folder), with or without a suffix.

    Raises:
        NameProblem: the name is not a RAVDESS name.
    """
    stem = file_name.rpartition(".")[0] or file_name
    match = _NAME.fullmatch(stem)
    if match is None:
        raise NameProblem(f"not seven two-digit numbers joined by hyphens, as in {EXAMPLE_NAME}")
    values = []
    for (field, known), code in zip(VALUES.items(), match.groups(), strict=True):
        if not 1 <= int(code) <= len(known):
            raise NameProblem(f"{field} is {code}: RAVDESS has 01 to {len(known):02d}")
        values.append(known[int(code) - 1])
    return ClipName(*values)


def format_name(clip: ClipName) -> str:
    """Return the file name of a clip with its suffix, .wav or .mp4. `parse_name` is the inverse."""
    return "-".join(_codes(clip)) + (".wav" if clip.modality == "audio" else ".mp4")


def _codes(clip: ClipName) -> list[str]:
    """Return the seven two-digit codes of a clip."""
    pairs = zip(VALUES.values(), dataclasses.astuple(clip), strict=True)
    return [f"{known.index(value) + 1:02d}" for known, value in pairs]
