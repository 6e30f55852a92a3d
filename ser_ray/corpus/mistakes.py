"""Counts the labels and speakers of a prepared corpus, and points out likely mistakes in them.

A likely mistake only leads to a warning. The clips and their labels are used as they are.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.folds import table_parts
from ser_ray.corpus.words import shorten
from ser_ray.errors import ConfigError

RARE_RATIO = 4
"""A label may be misspelt if a similar label has at least this many times its number of clips."""
MIN_LENGTH = 4
"""A label with fewer letters is never suggested for a misspelt one. Short labels, like "sad" and
"mad", are often similar and both right."""
SAME_PERSON = "may be the same person"
LINES_SHOWN = 3
LABELS_SHOWN = 20
_ACTOR_FOLDER = re.compile(r"actor[ _-]?0*(\d+)", re.IGNORECASE)


def describe_clips(clips: pa.Table) -> str:
    """Return two lines of text: the number of clips by label, and the number of speakers.

    Args:
        clips: string columns `emotion` and `speaker`, one row per clip.
    """
    labels = Counter(clips["emotion"].to_pylist()).most_common()
    shown = shorten([f"{label} {count}" for label, count in labels], LABELS_SHOWN)
    speakers = len(pc.unique(clips["speaker"]))
    return f"labels: {shown}\nspeakers: {speakers}"


def find_mistakes(outcomes: pa.Table) -> list[str]:
    """Return lines about likely mistakes in the files, labels, speakers and splits.

    Args:
        outcomes: one row per listed file or segment, with the columns of the manifest and `digest`,
            a digest of the bytes of a local file.
    """
    clips = outcomes.filter(pc.equal(outcomes["status"], "ok"))
    conflicts = outcomes.filter(pc.equal(outcomes["status"], "conflict")).to_pylist()
    lines = _first_lines(
        [f"{row['path']} {row['reason']}" for row in conflicts],
        "files, with the status conflict in the outcomes",
    )
    lines += _wrong_actor_folders(outcomes) + _contradicting_copies(clips)
    if pc.all(pc.is_valid(clips["channel"])).as_py():
        return lines  # RAVDESS: labels and speakers are codes
    labels = Counter(clips["emotion"].to_pylist())
    if len(labels) == 1:
        lines.append(f"all clips have the label {next(iter(labels))!r}: nothing can be trained")
    if clips["split"].null_count < len(clips):
        try:
            table_parts(clips)
        except ConfigError as error:
            lines.append(str(error))
    speakers = Counter(clips["speaker"].to_pylist())
    lines += _similar("labels", labels, _plain, "differ only in case, blanks or punctuation")
    lines += _misspellings(labels)
    lines += _similar("speakers", speakers, _speaker_key, SAME_PERSON)
    return lines + _similar("speakers", _few_numbers(speakers), _number_of, SAME_PERSON)


def _first_lines(lines: list[str], what: str) -> list[str]:
    """Return the first lines, and a line with the number of the others."""
    more = len(lines) - LINES_SHOWN
    return lines[:LINES_SHOWN] + ([f"and {more} more such {what}"] if more > 0 else [])


def _wrong_actor_folders(outcomes: pa.Table) -> list[str]:
    """Point out files of RAVDESS that are in the folder of another actor."""
    found = []
    named = outcomes.filter(pc.is_valid(outcomes["channel"]))
    for path, actor in zip(named["path"].to_pylist(), named["speaker"].to_pylist(), strict=True):
        folders = _ACTOR_FOLDER.findall(path.rpartition("/")[0].rpartition("/")[2])
        if folders and int(folders[-1]) != int(actor):
            found.append(f"{path} (actor {actor})")
    shown = shorten(found, LINES_SHOWN)
    line = f"files in the folder of another actor: {shown}; the actor in the file name is used"
    return [line] if found else []


def _contradicting_copies(clips: pa.Table) -> list[str]:
    """Point out files with the same bytes and different labels."""
    lines = []
    first: dict[tuple[object, ...], tuple[str, str]] = {}
    columns = (clips[name].to_pylist() for name in ("digest", "start", "end", "path", "emotion"))
    for digest, start, end, path, label in zip(*columns, strict=True):
        other, its_label = first.setdefault((digest, start, end), (path, label))
        if digest is not None and label != its_label:
            lines.append(f"{path} ({label!r}) is a copy of {other} ({its_label!r})")
    return _first_lines(lines, "copies with another label")


def _misspellings(counts: Mapping[str, int]) -> list[str]:
    """Point out labels that differ in one letter from a label with many more clips."""
    lines = []
    frequent = [
        label for label, count in counts.items() if count >= RARE_RATIO and len(label) >= MIN_LENGTH
    ]
    for rare, count in counts.items():
        near = [
            label
            for label in frequent
            if counts[label] >= RARE_RATIO * count
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
    """Return the word, and all words that result from deleting one of its letters.

    Two words share a spelling if one letter was changed, added or lost, or moved to another place.
    """
    return {word} | {word[:place] + word[place + 1 :] for place in range(len(word))}


def _similar(
    what: str, counts: Mapping[str, int], key: Callable[[str], str], relation: str
) -> list[str]:
    """Return a line for each of the first groups of names with the same key."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in counts:
        groups[key(name)].append(name)
    shown = [
        " and ".join(f"{name!r} ({_clips(counts[name])})" for name in sorted(names))
        for names in groups.values()
        if len(names) > 1
    ]
    return _first_lines([f"the {what} {names} {relation}" for names in shown], what)


def _plain(name: str) -> str:
    """Return a name in lower case and Unicode's NFKC form, without blanks and punctuation."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(letter for letter in folded if letter.isalnum()) or name


def _speaker_key(name: str) -> str:
    """Return the plain name, without leading zeros in its numbers."""
    whole = re.sub(r"^(\d+)\.0$", r"\1", name.strip())  # an integer that was stored as a float
    return re.sub(r"(?<!\d)0+(?=\d)", "", _plain(whole))


def _number_of(name: str) -> str:
    """Return the plain name of a speaker without the letters before its number."""
    return re.sub(r"^\D+(?=\d+$)", "", _speaker_key(name))


def _few_numbers(speakers: Counter[str]) -> Counter[str]:
    """Return the few speakers whose names are only a number, and those with letters before it.

    Of several names with the same key, only one is returned.
    """
    names = {_speaker_key(name): name for name in speakers}
    numbers = set(filter(str.isdecimal, names))
    if len(numbers) * RARE_RATIO > len(names):
        return Counter()  # plain numbers are usual names in this corpus
    return Counter({n: speakers[n] for n in names.values() if _number_of(n) in numbers})


def _clips(count: int) -> str:
    return "1 clip" if count == 1 else f"{count} clips"
