"""RAVDESS file names: the seven two-digit fields that say what a clip is.

`parse_name` turns a file name into a `ClipName`, and `format_name` does the reverse. RAVDESS has no
other labels, so a name that is not completely valid raises a `NameProblem`; nothing is guessed.

Source: Livingstone and Russo (2018), https://doi.org/10.1371/journal.pone.0196391.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Modality = Literal["av", "video", "audio"]
Channel = Literal["speech", "song"]
Intensity = Literal["normal", "strong"]

EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
"""The eight labels, in the order of their codes 01 to 08."""
MODALITIES: tuple[Modality, ...] = ("av", "video", "audio")
CHANNELS: tuple[Channel, ...] = ("speech", "song")
INTENSITIES: tuple[Intensity, ...] = ("normal", "strong")
SPEAKERS = tuple(f"{number:02d}" for number in range(1, 25))
EXAMPLE_NAME = "03-01-06-01-02-01-12.wav"

CORPORA = {
    "ravdess": "RAVDESS",
    "synthetic": "the synthetic corpus",
    "table": "a custom corpus",
}
"""The name of a corpus that is printed next to every score."""

_FIELDS = re.compile(r"(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)-(\d\d)", re.ASCII)
_NOT_SUNG = ("disgust", "surprised")


class NameProblem(ValueError):  # noqa: N818 - a property of the file, not an error of the run
    """A file name is not a RAVDESS name; the message says why."""


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
    """Intensity of the emotion; neutral is always normal."""
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
        """The performance: equal for its wav and its mp4s, whose names differ in the modality."""
        return "-".join(_codes(self)[1:])

    @property
    def sex(self) -> Literal["male", "female"]:
        """The actor's sex."""
        return "male" if int(self.speaker) % 2 else "female"


@lru_cache(maxsize=16_384)  # 7,356 names, which every copy of the corpus repeats
def parse_name(file_name: str) -> ClipName:
    """Read a file name (no folder), with or without a suffix.

    Raises:
        NameProblem: it is not a RAVDESS name; the message says why.
    """
    stem = file_name.rpartition(".")[0] or file_name
    match = _FIELDS.fullmatch(stem)
    if match is None:
        raise NameProblem(f"not seven two-digit numbers joined by hyphens, as in {EXAMPLE_NAME}")
    modality, channel, emotion, intensity, statement, repetition, actor = map(int, match.groups())
    _check_range("modality", modality, len(MODALITIES))
    _check_range("channel", channel, len(CHANNELS))
    _check_range("emotion", emotion, len(EMOTIONS))
    _check_range("intensity", intensity, len(INTENSITIES))
    _check_range("statement", statement, 2)
    _check_range("repetition", repetition, 2)
    _check_range("actor", actor, len(SPEAKERS))
    return ClipName(
        MODALITIES[modality - 1],
        CHANNELS[channel - 1],
        EMOTIONS[emotion - 1],
        INTENSITIES[intensity - 1],
        statement,
        repetition,
        f"{actor:02d}",
    )


def format_name(clip: ClipName, suffix: str) -> str:
    """Return the file name of a clip, the inverse of `parse_name`; `suffix` includes its dot."""
    return "-".join(_codes(clip)) + suffix


def _check_range(field: str, code: int, last: int) -> None:
    if not 1 <= code <= last:
        raise NameProblem(f"{field} is {code:02d}: RAVDESS has 01 to {last:02d}")


def _codes(clip: ClipName) -> tuple[str, ...]:
    """Return the seven two-digit fields."""
    return (
        f"{MODALITIES.index(clip.modality) + 1:02d}",
        f"{CHANNELS.index(clip.channel) + 1:02d}",
        f"{EMOTIONS.index(clip.emotion) + 1:02d}",
        f"{INTENSITIES.index(clip.intensity) + 1:02d}",
        f"{clip.statement:02d}",
        f"{clip.repetition:02d}",
        clip.speaker,
    )
