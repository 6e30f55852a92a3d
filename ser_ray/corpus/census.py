"""Finds missing, doubled and unexpected files by comparing a listing with the complete RAVDESS.

RAVDESS has 7,356 files: each of 24 actors speaks 60 and sings 44 performances, except actor 18, who
does not sing. Each performance is an audio-video mp4, a video-only mp4 and a wav. Few users need
all files, so files are reported as missing only if others of their modality and channel are there.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache

import pyarrow as pa

from ser_ray.corpus.ravdess import (
    CHANNELS,
    MODALITIES,
    VALUES,
    ClipName,
    NameProblem,
    format_name,
)
from ser_ray.corpus.words import shorten

_NAMES_SHOWN = 3


@cache
def expected_ravdess() -> tuple[ClipName, ...]:
    """Return the names of all 7,356 files of RAVDESS, sorted."""
    clips = []
    for values in itertools.product(*VALUES.values()):
        try:
            clip = ClipName(*values)
        except NameProblem:  # neutral and strong; disgust and surprised in song
            continue
        if (clip.channel, clip.speaker) != ("song", "18"):
            clips.append(clip)
    return tuple(clips)


@dataclass(frozen=True)
class CorpusComparison:
    """The listed files compared with those of RAVDESS, by name alone."""

    present: tuple[ClipName, ...]
    """Files of RAVDESS that are listed, without repetition."""
    missing: tuple[ClipName, ...]
    """Files that are not listed, although other files of their modality and channel are."""
    doubled: tuple[ClipName, ...]
    """Files that are listed more than once."""
    unexpected: tuple[str, ...]
    """Paths of clips that RAVDESS does not have, whether or not their names are valid."""

    def text(self) -> str:
        """Return a line for each modality and channel, then the doubled and unexpected files."""
        lines = [f"{len(self.present)} of the {len(expected_ravdess())} files of RAVDESS"]
        for kind in itertools.product(MODALITIES, CHANNELS):
            expected, present, missing = (
                [clip for clip in clips if _kind(clip) == kind]
                for clips in (expected_ravdess(), self.present, self.missing)
            )
            lines.append(f"{' '.join(kind)}: {_group_text(len(expected), present, missing)}")
        doubled = [_file_name(clip) for clip in self.doubled]
        for what, names in (("doubled", doubled), ("unexpected", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {what}: {shorten(names, _NAMES_SHOWN)}")
        return "\n".join(lines)


def compare_with_ravdess(rows: pa.Table) -> CorpusComparison:
    """Compare the files of a manifest, or of outcomes, with those of the complete RAVDESS."""
    expected = dict.fromkeys(expected_ravdess())
    counts: Counter[ClipName] = Counter()
    unexpected = []
    columns = [rows[name].to_pylist() for name in ("path", *(f.name for f in fields(ClipName)))]
    for path, *values in zip(*columns, strict=True):
        clip = ClipName(*values)
        if clip in expected:
            counts[clip] += 1
        else:
            unexpected.append(path)
    kinds = {_kind(clip) for clip in counts}
    return CorpusComparison(
        present=tuple(clip for clip in expected if clip in counts),
        missing=tuple(c for c in expected if c not in counts and _kind(c) in kinds),
        doubled=tuple(clip for clip in expected if counts[clip] > 1),
        unexpected=tuple(sorted(unexpected)),
    )


def _group_text(num_expected: int, present: list[ClipName], missing: list[ClipName]) -> str:
    """Describe which files of one modality and channel are listed."""
    if not present:
        return f"none of {num_expected}"
    if not missing:
        return f"all {num_expected}"
    parts = [f"{len(present)} of {num_expected}"]
    actors_present = {clip.speaker for clip in present}
    absent = sorted({clip.speaker for clip in missing} - actors_present)
    if absent:
        parts.append(f"actors {', '.join(absent)} absent")
    for actor in sorted(actors_present):
        names = [_file_name(clip) for clip in missing if clip.speaker == actor]
        if names:
            parts.append(f"actor {actor} lacks {len(names)}: {shorten(names, _NAMES_SHOWN)}")
    return "; ".join(parts)


def _kind(clip: ClipName) -> tuple[str, str]:
    return clip.modality, clip.channel


def _file_name(clip: ClipName) -> str:
    return format_name(clip, ".wav" if clip.modality == "audio" else ".mp4")
