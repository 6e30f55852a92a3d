"""Counts the labels and speakers of a prepared corpus, and points out likely mistakes in them.

No mistake is an error here: the user is warned, and the clips keep their labels.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.words import shorten

RARE = 4
"""A label is rare if a similar label has at least this many times as many clips."""
LONG = 4
"""Shortest frequent label that is compared. Short labels, like "sad" and "mad", are often alike."""
SHOWN = 3
SHOWN_LABELS = 20
_ACTOR_FOLDER = re.compile(r"actor[ _-]?0*(\d+)", re.IGNORECASE)


def describe_clips(clips: pa.Table) -> str:
    """Write how many clips each label has, and how many speakers there are.

    Args:
        clips: string columns `emotion` and `speaker`, one row per clip.
    """
    labels = Counter(clips["emotion"].to_pylist()).most_common()
    shown = shorten([f"{label} {count}" for label, count in labels], SHOWN_LABELS)
    speakers = len(pc.unique(clips["speaker"]))
    return f"labels: {shown}\nspeakers: {speakers}"


def find_mistakes(outcomes: pa.Table) -> list[str]:
    """Return a line for each likely mistake in the labels, speakers and splits.

    Args:
        outcomes: one row per listed file, with the columns of the manifest.
    """
    clips = outcomes.filter(pc.equal(outcomes["status"], "ok"))
    lines = _conflicts(outcomes) + _foreign_actors(outcomes)
    if pc.all(pc.is_valid(clips["channel"])).as_py():
        return lines  # the labels and speakers of RAVDESS are not free text
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
    speakers = Counter(clips["speaker"].to_pylist())
    lines += _alike("labels", labels, _plain, "differ only in case, blanks or punctuation")
    lines += _misspelt(labels)
    return lines + _alike("speakers", speakers, _speaker_key, "may be the same person")


def _conflicts(outcomes: pa.Table) -> list[str]:
    rows = outcomes.filter(pc.equal(outcomes["status"], "conflict")).to_pylist()
    lines = [f"{row['path']} {row['reason']}" for row in rows]
    return _first(lines, "files, with the status conflict in the outcomes")


def _first(lines: list[str], what: str) -> list[str]:
    """Return the first lines, and a line with the number of the others."""
    more = len(lines) - SHOWN
    return lines[:SHOWN] + ([f"and {more} more such {what}"] if more > 0 else [])


def _foreign_actors(outcomes: pa.Table) -> list[str]:
    """Point out files of RAVDESS that are in the folder of another actor."""
    found = []
    named = outcomes.filter(pc.is_valid(outcomes["channel"]))
    for path, actor in zip(named["path"].to_pylist(), named["speaker"].to_pylist(), strict=True):
        folders = _ACTOR_FOLDER.findall(path.rpartition("/")[0].rpartition("/")[2])
        if folders and int(folders[-1]) != int(actor):
            found.append(f"{path} (actor {actor})")
    shown = shorten(found, SHOWN)
    line = f"files in the folder of another actor than their names say: {shown}; the names are used"
    return [line] if found else []


def _misspelt(counts: Mapping[str, int]) -> list[str]:
    """Point out rare labels that differ from a frequent label in one letter."""
    lines = []
    frequent = [label for label, count in counts.items() if count >= RARE and len(label) >= LONG]
    for rare, count in counts.items():
        near = [
            label
            for label in frequent
            if counts[label] >= RARE * count
            and not re.search(r"\d", label + rare)
            and _plain(label) != _plain(rare)
            and _spellings(_plain(label)) & _spellings(_plain(rare))
        ]
        if near:
            lines.append(
                f"the label {rare!r} ({_clips(count)}) is one letter from {near[0]!r} "
                f"({_clips(counts[near[0]])})"
            )
    return lines


def _spellings(word: str) -> set[str]:
    """Return the word, and every word that results from deleting one letter.

    Two words share a result if they differ in one letter that was changed, added, lost or moved.
    """
    return {word} | {word[:place] + word[place + 1 :] for place in range(len(word))}


def _alike(
    what: str, counts: Mapping[str, int], key: Callable[[str], str], relation: str
) -> list[str]:
    """Report the first groups of names that have the same key."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[key(name)].append(name)
    shown = [
        " and ".join(f"{name!r} ({_clips(counts[name])})" for name in sorted(names))
        for names in groups.values()
        if len(names) > 1
    ]
    return _first([f"the {what} {names} {relation}" for names in shown], what)


def _plain(name: str) -> str:
    """Return a name in lower case, with plain forms of letters, and no blanks or punctuation."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or name


def _speaker_key(name: str) -> str:
    """Return the plain name, without leading zeros in its numbers."""
    whole = re.sub(r"^(\d+)\.0$", r"\1", name.strip())  # an integer that was stored as a float
    return re.sub(r"(?<!\d)0+(?=\d)", "", _plain(whole))


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"
