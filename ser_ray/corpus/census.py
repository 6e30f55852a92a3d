"""Manifest or outcomes -> what of RAVDESS is there: missing, doubled and unexpected files by name.

RAVDESS holds 7,356 files: each of 24 actors speaks 60 and sings 44 performances, but actor 18 sings
none, and each performance is an audio-video mp4, a video-only mp4 and a wav. Few need all of them,
so a kind of file of which nothing is there is one line of the report and no loss.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.ravdess import (
    CHANNELS,
    EMOTIONS,
    INTENSITIES,
    MODALITIES,
    NUM_SPEAKERS,
    ClipName,
    NameProblem,
    format_name,
)

_NAMES_SHOWN = 3


@cache
def expected_ravdess() -> tuple[ClipName, ...]:
    """Every file that RAVDESS holds, in the order of the names, [7356]."""
    actors = [f"{number:02d}" for number in range(1, NUM_SPEAKERS + 1)]
    clips = []
    for fields in itertools.product(
        MODALITIES, CHANNELS, EMOTIONS, INTENSITIES, (1, 2), (1, 2), actors
    ):
        try:
            clip = ClipName(*fields)
        except NameProblem:  # neutral and strong; disgust and surprised in song
            continue
        if (clip.channel, clip.speaker) != ("song", "18"):
            clips.append(clip)
    return tuple(clips)


@dataclass(frozen=True)
class CorpusComparison:
    """What of RAVDESS is listed. Files are told by name; what is in them, the outcomes say."""

    present: tuple[ClipName, ...]
    """Files that RAVDESS holds and that are listed, each once."""
    missing: tuple[ClipName, ...]
    """Files not listed, though others of their modality and channel are."""
    doubled: tuple[ClipName, ...]
    """Files listed more than once."""
    unexpected: tuple[str, ...]
    """Paths of clips that RAVDESS does not hold, their names understood or not."""

    @property
    def is_complete(self) -> bool:
        """Nothing is missing, doubled or unexpected."""
        return not (self.missing or self.doubled or self.unexpected)

    def text(self) -> str:
        """A few lines: one a modality and channel, then what is doubled and what unexpected."""
        lines = [f"{len(self.present)} of the {len(expected_ravdess())} files of RAVDESS"]
        for kind in itertools.product(MODALITIES, CHANNELS):
            expected, present, missing = (
                [clip for clip in clips if _kind(clip) == kind]
                for clips in (expected_ravdess(), self.present, self.missing)
            )
            lines.append(f"{' '.join(kind)}: {_group_text(expected, present, missing)}")
        doubled = [_file_name(clip) for clip in self.doubled]
        for what, names in (("doubled", doubled), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {what}: {_shorten(names)}")
        return "\n".join(lines)


def compare_with_ravdess(rows: pa.Table) -> CorpusComparison:
    """Compare the files listed with those that RAVDESS holds.

    Args:
        rows: a manifest, or outcomes with its columns; one row a file listed, whatever its status.
    """
    fields = [field.name for field in dataclasses.fields(ClipName)]
    is_named = pc.is_valid(rows["modality"])
    counted = rows.filter(is_named).group_by(fields).aggregate([("path", "list")])
    counts: dict[ClipName, int] = {}
    unexpected = rows.filter(pc.invert(is_named))["path"].to_pylist()
    expected = set(expected_ravdess())
    for row in counted.to_pylist():
        clip = ClipName(**{field: row[field] for field in fields})
        if clip in expected:
            counts[clip] = len(row["path_list"])
        else:
            unexpected += row["path_list"]
    kinds = {_kind(clip) for clip in counts}
    return CorpusComparison(
        present=tuple(clip for clip in expected_ravdess() if clip in counts),
        missing=tuple(c for c in expected_ravdess() if c not in counts and _kind(c) in kinds),
        doubled=tuple(clip for clip in expected_ravdess() if counts.get(clip, 0) > 1),
        unexpected=tuple(sorted(unexpected)),
    )


def _group_text(expected: list[ClipName], present: list[ClipName], missing: list[ClipName]) -> str:
    """What is there of one modality and channel."""
    if not present:
        return f"none of {len(expected)}"
    if not missing:
        return f"all {len(expected)}"
    parts = [f"{len(present)} of {len(expected)}"]
    actors_present = {clip.speaker for clip in present}
    absent = sorted({clip.speaker for clip in missing} - actors_present)
    if absent:
        parts.append(f"actors {', '.join(absent)} absent")
    for actor in sorted(actors_present):
        names = [_file_name(clip) for clip in missing if clip.speaker == actor]
        if names:
            parts.append(f"actor {actor} lacks {len(names)}: {_shorten(names)}")
    return "; ".join(parts)


def _kind(clip: ClipName) -> tuple[str, str]:
    return clip.modality, clip.channel


def _file_name(clip: ClipName) -> str:
    return format_name(clip, ".wav" if clip.modality == "audio" else ".mp4")


def _shorten(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
