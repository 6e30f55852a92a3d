"""What a prepared corpus holds by label and speaker, and the likely slips of whoever labelled it.

Nothing here is an error: a slip is pointed out, and the clips are used as they are labelled.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.words import shorten

RARE = 4
"""A label is rare beside one that has at least this many times as many clips."""
LONG = 4
"""Labels of fewer letters often differ in one, such as "sad" and "mad"."""
SHOWN = 3
SHOWN_LABELS = 20
_ACTOR_FOLDER = re.compile(r"actor[ _-]?0*(\d+)", re.IGNORECASE)


def describe_clips(clips: pa.Table) -> str:
    """Say how many clips each label has, and how many speakers there are.

    Args:
        clips: string columns `emotion` and `speaker`, one row per clip.
    """
    labels = Counter(clips["emotion"].to_pylist()).most_common()
    shown = shorten([f"{label} {count}" for label, count in labels], SHOWN_LABELS)
    speakers = len(pc.unique(clips["speaker"]))
    return f"labels: {shown}\nspeakers: {speakers}"


def find_slips(outcomes: pa.Table) -> list[str]:
    """Point out what the owner of the corpus probably did not mean, a line for each.

    Args:
        outcomes: one row per listed file, with the columns of the manifest.
    """
    clips = outcomes.filter(pc.equal(outcomes["status"], "ok"))
    lines = _conflicts(outcomes) + _foreign_actors(outcomes)
    if pc.all(pc.is_valid(clips["channel"])).as_py():
        return lines  # the names of RAVDESS have no free text
    labels = Counter(clips["emotion"].to_pylist())
    if len(labels) == 1:
        lines.append(f"all clips have the label {next(iter(labels))!r}: nothing can be trained")
    parts: defaultdict[str, set[str]] = defaultdict(set)
    for speaker, part in zip(*(clips[n].to_pylist() for n in ("speaker", "split")), strict=True):
        parts[speaker] |= {part} - {None}
    if shared := sorted(speaker for speaker in parts if len(parts[speaker]) > 1):
        lines.append(
            f"several parts of the column split have the speakers {shorten(shared, SHOWN)}, so "
            "--protocol table will be refused"
        )
    lines += _similar_labels(labels)
    return lines + _similar_speakers(Counter(clips["speaker"].to_pylist()))


def _conflicts(outcomes: pa.Table) -> list[str]:
    rows = outcomes.filter(pc.equal(outcomes["status"], "conflict")).to_pylist()
    lines = [f"{row['path']} {row['reason']}" for row in rows[:SHOWN]]
    more = [f"and {len(rows) - SHOWN} more such files, with the status conflict in the outcomes"]
    return lines + (more if len(rows) > SHOWN else [])


def _foreign_actors(outcomes: pa.Table) -> list[str]:
    """Point out files of RAVDESS in the folder of another actor."""
    found = []
    named = outcomes.filter(pc.is_valid(outcomes["channel"]))
    for path, actor in zip(named["path"].to_pylist(), named["speaker"].to_pylist(), strict=True):
        folders = _ACTOR_FOLDER.findall(path.rpartition("/")[0].rpartition("/")[2])
        if folders and int(folders[-1]) != int(actor):
            found.append(f"{path} (actor {actor})")
    if not found:
        return []
    return [
        f"in the folder of another actor than the name says: {shorten(found, SHOWN)}; the name is "
        "taken as right"
    ]


def _similar_labels(counts: Mapping[str, int]) -> list[str]:
    """Point out labels that differ in case alone, and rare ones that are nearly a frequent one."""
    lines = _alike("labels", counts, _folded, "differ only in case, blanks or punctuation")
    frequent = [label for label, count in counts.items() if count >= RARE and len(label) >= LONG]
    for rare, count in counts.items():
        near = [
            label
            for label in frequent
            if counts[label] >= RARE * count
            and _folded(label) != _folded(rare)
            and not re.search(r"\d", label + rare)
            and _is_one_edit(_folded(label), _folded(rare))
        ]
        if near:
            lines.append(
                f"the label {rare!r} ({_clips(count)}) is one letter from {near[0]!r} "
                f"({_clips(counts[near[0]])})"
            )
    return lines


def _similar_speakers(counts: Mapping[str, int]) -> list[str]:
    """Point out speakers whose names differ in zeros or case, or in a prefix to their number."""
    lines = _alike("speakers", counts, _speaker_key, "may be the same person")
    numbers: defaultdict[str, list[str]] = defaultdict(list)
    for speaker in counts:
        if match := re.fullmatch(r"([a-z]*)(\d+)", _speaker_key(speaker)):
            numbers[match[2]].append(speaker)
    prefixed = {}
    for speakers in numbers.values():
        bare = [speaker for speaker in speakers if re.fullmatch(r"\d+", _speaker_key(speaker))]
        others = [speaker for speaker in speakers if speaker not in bare]
        if bare and others:
            prefixed[bare[0]] = others[0]
    return lines + [
        f"the speakers {bare!r} ({_clips(counts[bare])}) and {other!r} ({_clips(counts[other])}) "
        "may be the same person"
        for bare, other in list(prefixed.items())[:SHOWN]
    ]


def _alike(
    what: str, counts: Mapping[str, int], key: Callable[[str], str], relation: str
) -> list[str]:
    """Name the first groups of names that have the same key."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[key(name)].append(name)
    alike = [names for names in groups.values() if len(names) > 1]
    lines = []
    for names in alike[:SHOWN]:
        shown = " and ".join(f"{name!r} ({_clips(counts[name])})" for name in sorted(names))
        lines.append(f"the {what} {shown} {relation}")
    return lines + ([f"and {len(alike) - SHOWN} more such {what}"] if len(alike) > SHOWN else [])


def _folded(name: str) -> str:
    """Return a name without case, blanks, punctuation and compatibility forms of letters."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or name


def _speaker_key(name: str) -> str:
    """Return a folded name whose numbers have no leading zeros."""
    whole = re.sub(r"^(\d+)\.0$", r"\1", name.strip())  # a number that became a float
    return re.sub(r"(?<!\d)0+(?=\d)", "", _folded(whole))


def _is_one_edit(one: str, other: str) -> bool:
    """Whether one letter must be changed, added, removed or exchanged with its neighbour."""
    if len(one) > len(other):
        one, other = other, one
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    if len(one) < len(other):
        return one[start:] == other[start + 1 :]
    swapped = one[start : start + 2][::-1] + one[start + 2 :]
    return one[start + 1 :] == other[start + 1 :] or swapped == other[start:]


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"
