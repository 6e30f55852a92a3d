"""Compares the listed files with the complete RAVDESS: which are missing, doubled or unexpected?

RAVDESS has 7,356 files: each of 24 actors speaks 60 and sings 44 performances, except actor 18, who
does not sing. Each performance is an audio-video mp4, a video-only mp4 and a wav. Few users need
all of them, so missing files are described only if other files of their modality and channel exist.
For an actor without any such file, only the actor is named.
"""

import itertools
from collections import Counter
from collections.abc import Container
from dataclasses import fields
from functools import cache

import pyarrow as pa

from ser_ray.corpus.ravdess.names import VALUES, ClipName, NameProblem, format_name
from ser_ray.corpus.words import shorten

_NAMES_SHOWN = 3


@cache
def expected_ravdess() -> tuple[ClipName, ...]:
    """Return the names of all 7,356 files of RAVDESS, sorted."""
    clips = []
    for values in itertools.product(*VALUES.values()):
        try:
            clip = ClipName(*values)
        except NameProblem:  # RAVDESS has no strong neutral, and no song of disgust or surprise
            continue
        if (clip.channel, clip.speaker) != ("song", "18"):
            clips.append(clip)
    return tuple(clips)


def compare_with_ravdess(rows: pa.Table) -> str:
    """Compare the files in a manifest, or in the outcomes of a shard set, with those of RAVDESS.

    Args:
        rows: the column `path` and the fields of `ClipName`, which are null if the file has another
            name. Such a file is unexpected.

    Returns:
        Text: how many files of RAVDESS are listed, a line for each modality and channel, then the
        doubled and the unexpected files, if there are any.
    """
    expected = expected_ravdess()
    columns = [rows[name].to_pylist() for name in ("path", *(f.name for f in fields(ClipName)))]
    listed = [(path, ClipName(*values)) for path, *values in zip(*columns, strict=True)]
    known = set(expected)
    counts = Counter(clip for _, clip in listed if clip in known)
    lines = [f"{len(counts)} of the {len(expected)} files of RAVDESS"]
    for kind in itertools.product(VALUES["modality"], VALUES["channel"]):
        clips = [clip for clip in expected if (clip.modality, clip.channel) == kind]
        lines.append(f"{' '.join(kind)}: {_describe(clips, counts)}")
    doubled = [format_name(clip) for clip in expected if counts[clip] > 1]
    unexpected = sorted(path for path, clip in listed if clip not in known)
    for what, names in (("doubled", doubled), ("unexpected", unexpected)):
        if names:
            lines.append(f"{len(names)} {what}: {shorten(names, _NAMES_SHOWN)}")
    return "\n".join(lines)


def _describe(expected: list[ClipName], listed: Container[ClipName]) -> str:
    """Describe which expected files of a modality and channel are listed, and which are missing."""
    missing = [clip for clip in expected if clip not in listed]
    if not missing:
        return f"all {len(expected)}"
    if len(missing) == len(expected):
        return f"none of {len(expected)}"
    parts = [f"{len(expected) - len(missing)} of {len(expected)}"]
    present = {clip.speaker for clip in expected if clip in listed}
    if absent := sorted({clip.speaker for clip in missing} - present):
        parts.append(f"actors {', '.join(absent)} absent")
    for actor in sorted(present):
        if names := [format_name(clip) for clip in missing if clip.speaker == actor]:
            parts.append(f"actor {actor} lacks {len(names)}: {shorten(names, _NAMES_SHOWN)}")
    return "; ".join(parts)
