"""Splits clips into train, validation and test sides; a protocol is a named list of folds.

`split` takes a table of clips and returns the row numbers of the three sides of a fold. All rows of
a take (the wav and mp4s of a performance), all segments of a file and all rows with identical
content are on the same side, and so are all clips of a speaker, except in `random`. Models are
selected by their scores on the validation side, whose speakers are not trained on. The test side is
used once.

The functions have no side effects, and the order of the rows does not matter.

Sources: the six folds of EmoBox (https://github.com/emo-box/EmoBox) and the five of Luna-Jimenez
(https://github.com/cristinalunaj/MMEmotionRecognition), which define test actors but no validation.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ser_ray.corpus.words import SIDES, shorten
from ser_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

CROSS_CORPUS = "cross-corpus"
ALL = "all"
"""The protocol of a final model, whose recipe was chosen under another protocol."""
PROTOCOLS = {
    "emobox-6": "the six folds of EmoBox over RAVDESS's 24 actors",
    "luna-5": "the five folds of Luna-Jimenez over RAVDESS's 24 actors",
    "loso": "leave one speaker out: as many folds as speakers",
    "speaker-K": "K folds over the speakers of any corpus, K at least 2, as in speaker-5",
    "table": "what the column split of the corpus's table says: its sides, or its folds",
    CROSS_CORPUS: "each of several corpora is tested in turn, and the others train",
    "random": "five folds by take, speakers on every side: SPEAKER-DEPENDENT, for comparison only",
    ALL: "no folds: every speaker trains the model, which has no validation or test scores",
}
"""The names that `--protocol` accepts, and their meaning."""

DEPENDENCE = {True: "SPEAKER-DEPENDENT", False: "speaker-independent"}
"""In the words of every caption, whether training includes the tested speakers."""
_NAMED_FOLDS = {
    "emobox-6": (
        ("01", "11", "20", "21"),
        ("04", "10", "12", "14"),
        ("08", "09", "19", "23"),
        ("03", "05", "07", "24"),
        ("02", "15", "16", "18"),
        ("06", "13", "17", "22"),
    ),
    "luna-5": (
        ("02", "05", "14", "15", "16"),
        ("03", "06", "07", "13", "18"),
        ("10", "11", "12", "19", "20"),
        ("08", "17", "21", "23", "24"),
        ("01", "04", "09", "22"),
    ),
}
_SHOWN = 8  # names in a message
_RANDOM_FOLDS = 5  # a fifth of the takes is the test side
_RANDOM_VALIDATION = 8  # an eighth of the rest, a tenth of all, is the validation side

_LEFT_OUT, _TRAIN, _VALIDATION, _TEST = -1, 0, 1, 2  # a group stays on its highest side

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One fold: the row numbers of the clips on each side, ascending."""

    protocol: str
    fold: int
    train: Rows
    """[num_train]"""
    validation: Rows
    """[num_validation]. Recipes, trials and, if so configured, epochs are selected on it."""
    test: Rows
    """[num_test]. It is used once."""
    left_out: Rows
    """Rows on no side, because their take or content is on the validation or test side already."""
    train_speakers: tuple[str, ...]
    validation_speakers: tuple[str, ...]
    test_speakers: tuple[str, ...]
    tested_corpus: str = ""
    """The corpus that a fold of `cross-corpus` tests."""

    @property
    def speaker_dependent(self) -> bool:
        """Whether a speaker may be on several sides, so that scores are not comparable."""
        shared = {*self.train_speakers, *self.validation_speakers} & {*self.test_speakers}
        return self.protocol == "random" or bool(shared)

    @property
    def label(self) -> str:
        """The protocol and fold, as every caption names them."""
        if self.protocol == ALL:
            return "all speakers, no validation or test part"
        tested = f", tests {self.tested_corpus}" if self.tested_corpus else ""
        return f"{self.protocol} fold {self.fold}{tested} ({DEPENDENCE[self.speaker_dependent]})"


def num_folds(protocol: str, clips: "pa.Table") -> int:
    """Count the folds of a protocol for the clips of a corpus, given as to `split`.

    Raises:
        ConfigError: the protocol is unknown, or does not fit these clips.
    """
    return len(_test_folds(protocol, _kinds(clips), clips))


def suggest_protocol(clips: "pa.Table") -> str:
    """Return a protocol that fits a custom corpus: that of its table, or one by speaker."""
    if clips["split"].null_count < len(clips):
        return "table"
    return _alternative(len(set(clips["speaker"].to_pylist())))


def split(
    protocol: str, fold: int, clips: "pa.Table", *, seed: int = 0, validation_speakers: int = 0
) -> Split:
    """Split clips by one fold of a protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        fold: 0 to `num_folds` - 1.
        clips: one row per clip, with the string columns `path`, `speaker`, `sex` (may be null),
            `take`, `emotion`, `content` (equal for equal samples), for `table` also `split`, and of
            several corpora `corpus`.
        seed: only used by `random`; the folds of every other protocol are fixed.
        validation_speakers: how many speakers are on the validation side, except in `random`; 0
            for a twelfth of the speakers, as `_validation_speakers` explains.

    Raises:
        ConfigError: the protocol is unknown, the fold out of range, or a side would be empty.
    """
    speakers = np.array(clips["speaker"].to_pylist(), dtype=np.str_)
    kinds = _kinds(clips)
    folds = _test_folds(protocol, kinds, clips)
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold is {fold}: {protocol} has folds 0 to {len(folds) - 1} here")
    groups = _groups(*(clips[name].to_pylist() for name in ("take", "content", "path")))
    tested_corpus = ""
    if protocol == ALL:
        sides = np.full(len(speakers), _TRAIN)
    elif protocol == "random":
        sides = _draw_takes(fold, groups, clips["emotion"].to_pylist(), seed)
    else:
        sides = np.full(len(speakers), _TRAIN)
        parts = _table_parts(clips) if protocol == "table" else {}
        is_tested = np.isin(speakers, folds[fold])
        named, tests = set(itertools.chain(*parts.values())) or set(kinds), folds[: fold + 1]
        if protocol == CROSS_CORPUS:  # corpora may share speakers
            corpora = clips["corpus"].to_pylist()
            tested_corpus = sorted(set(corpora))[fold]
            is_tested = np.array(corpora) == tested_corpus
            named, tests = set(speakers[~is_tested].tolist()), [()]
        held_out: Sequence[str] = parts.get("validation", ())
        if not held_out:
            known = {speaker: kinds[speaker] for speaker in kinds if speaker in named}
            held_out = _validation_speakers(tests, known, validation_speakers)
        sides[np.isin(speakers, held_out)] = _VALIDATION
        sides[is_tested] = _TEST
        if protocol == "table":
            sides[[value is None for value in clips["split"].to_pylist()]] = _LEFT_OUT
    highest = np.zeros(len(groups), np.int64)
    np.maximum.at(highest, groups, sides)
    sides[sides < highest[groups]] = _LEFT_OUT
    train, validation, test, left_out = (
        np.flatnonzero(sides == side) for side in (_TRAIN, _VALIDATION, _TEST, _LEFT_OUT)
    )
    who = [tuple(np.unique(speakers[rows]).tolist()) for rows in (train, validation, test)]
    drawn = Split(
        protocol, fold, train, validation, test, left_out, who[0], who[1], who[2], tested_corpus
    )
    if protocol != ALL:
        _check_sides(drawn, sorted(kinds), folds[fold])
    return drawn


def _kinds(clips: "pa.Table") -> dict[str, str]:
    """The corpus and sex of every speaker: folds and validation sides get some of each kind."""
    corpora = clips["corpus"].to_pylist() if "corpus" in clips.column_names else [""] * len(clips)
    columns = clips["speaker"].to_pylist(), corpora, clips["sex"].to_pylist()
    return {speaker: f"{corpus}/{sex or ''}" for speaker, corpus, sex in zip(*columns, strict=True)}


def one_clip_per_take(clips: "pa.Table") -> Rows:
    """Select the first window of every clip, and of a RAVDESS take only its wav, or else its mp4.

    The wav and the mp4 are one recording, which scores over both would count twice. In other
    corpora (no `channel`), a take may have several recordings, and all of them are selected.

    Args:
        clips: string columns `path`, `take`, `modality` and `channel`, and the number `window`.

    Returns:
        Row numbers, ascending, [num_takes] for RAVDESS.
    """
    selected: dict[str, tuple[bool, str, int]] = {}
    own = []
    names = ("path", "take", "modality", "channel", "window")
    columns = [clips[name].to_pylist() for name in names]
    for row, (path, take, modality, channel, window) in enumerate(zip(*columns, strict=True)):
        if window > 0:
            continue
        if channel is None:
            own.append(row)
        else:
            candidate = (modality != "audio", path, row)
            selected[take] = min(candidate, selected.get(take, candidate))
    return np.array(sorted(own + [row for _, _, row in selected.values()]), np.int64)


def windows_of(windows: Rows, rows: Rows) -> tuple[Rows, Rows]:
    """Find all windows of some clips.

    Args:
        windows: column `window` of all rows [clips]; a clip's windows are neighbours, counted from
            0.
        rows: the row of the first window of each of the clips [num_rows].

    Returns:
        The rows of the windows [num_windows], and for each the index in `rows` of its clip.
    """
    firsts = np.append(np.flatnonzero(windows == 0), len(windows))
    counts = firsts[np.searchsorted(firsts, rows) + 1] - rows
    owners = np.repeat(np.arange(len(rows)), counts)
    return rows[owners] + np.arange(len(owners)) - np.searchsorted(owners, owners), owners


def _table_parts(clips: "pa.Table") -> dict[str, tuple[str, ...]]:
    """Return the speakers of each side or fold that the column `split` names.

    Raises:
        ConfigError: there is no such column, or a speaker is in two parts.
    """
    if "corpus" in clips.column_names:
        corpora, parts = clips["corpus"], clips["split"]
        if whole := sorted(
            {*corpora.to_pylist()} - {*corpora.filter(parts.is_valid()).to_pylist()}
        ):
            raise ConfigError(
                f"table: the corpus {whole[0]} has no column split: choose another --protocol, or "
                "leave it out"
            )
    part_of: dict[str, str] = {}
    for speaker, part in zip(*(clips[n].to_pylist() for n in ("speaker", "split")), strict=True):
        if part is not None and part_of.setdefault(speaker, part) != part:
            raise ConfigError(
                f"table: the column split has the speaker {speaker} in {part_of[speaker]} and in "
                f"{part}, so a model would be tested on a voice that it was trained on: give every "
                "speaker one part and prepare the table again, or choose another --protocol"
            )
    if not part_of:
        raise ConfigError(
            "table: the corpus has no column split with sides or folds: choose another --protocol"
        )
    parts = sorted(set(part_of.values()), key=lambda part: (len(part), part))
    return {part: tuple(sorted(s for s in part_of if part_of[s] == part)) for part in parts}


def _test_folds(
    protocol: str, kinds: Mapping[str, str], clips: "pa.Table"
) -> list[tuple[str, ...]]:
    """Return the test speakers of every fold; none for `random`, whose folds are drawn by take."""
    if protocol == ALL:
        return [()]
    if protocol == "table":
        parts = _table_parts(clips)
        if set(parts) <= set(SIDES.values()):
            return [parts.get("test", ())]
        return [speakers for part, speakers in parts.items() if part != "train"]
    if protocol == "random":
        return [()] * _RANDOM_FOLDS
    if protocol == CROSS_CORPUS:
        return _corpus_folds(clips)
    if protocol == "loso":
        return [(speaker,) for speaker in sorted(kinds)]
    if protocol in _NAMED_FOLDS:
        folds = _NAMED_FOLDS[protocol]
        if strangers := sorted(set(kinds) - set(itertools.chain(*folds))):
            raise ConfigError(
                f"{protocol} is defined for RAVDESS's actors 01 to 24, and this corpus has "
                f"{shorten(strangers, _SHOWN)}: use {_alternative(len(kinds))}"
            )
        return list(folds)
    return _speaker_folds(protocol, kinds)


def _corpus_folds(clips: "pa.Table") -> list[tuple[str, ...]]:
    """Return the speakers of every corpus; the corpora are sorted by name."""
    if "corpus" not in clips.column_names:
        raise ConfigError(
            f"{CROSS_CORPUS} tests one of several corpora: name several shard sets, as in --shards "
            "out/emodb out/iemocap, or choose another --protocol"
        )
    pairs = set(zip(*(clips[name].to_pylist() for name in ("corpus", "speaker")), strict=True))
    corpora = sorted({corpus for corpus, _ in pairs})
    return [tuple(sorted(s for c, s in pairs if c == corpus)) for corpus in corpora]


def _speaker_folds(protocol: str, kinds: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the test speakers of every fold of speaker-K."""
    match = re.fullmatch(r"speaker-([1-9]\d{0,5})", protocol, re.ASCII)
    if match is None or (count := int(match[1])) < 2:
        raise ConfigError(f"protocol is {protocol!r}: it must be one of {', '.join(PROTOCOLS)}")
    if count > len(kinds):
        raise ConfigError(
            f"{protocol} needs {count} speakers and the corpus has {len(kinds)}: use "
            f"{_alternative(len(kinds))}"
        )
    # Speakers are dealt out one kind after the other, in a fixed order unrelated to their names.
    dealt = sorted(kinds, key=lambda s: (kinds[s], hashlib.sha256(s.encode()).digest()))
    return [tuple(sorted(dealt[fold::count])) for fold in range(count)]


def _validation_speakers(
    tests: Sequence[tuple[str, ...]], kinds: Mapping[str, str], wanted: int
) -> list[str]:
    """Choose the validation speakers of the last fold in `tests`.

    As many of each corpus and sex are chosen, and first those who were chosen in the fewest earlier
    folds. By default a twelfth of all speakers is chosen, at least two, and at most a third of
    those that are not tested, because scores depend most on the number of training speakers.

    Args:
        tests: the test speakers of every fold up to this one.
        kinds: the corpus and sex of every speaker.
        wanted: how many validation speakers; 0 for the default.

    Raises:
        ConfigError: `wanted` leaves no speaker to train on.
    """
    of_kind = sorted(set(kinds.values()))
    turns: Counter[str] = Counter()
    selected: list[str] = []
    for fold, test in enumerate(tests):
        free = sorted(kinds.keys() - set(test), key=lambda speaker: (turns[speaker], speaker))
        if 0 < len(free) <= wanted:
            raise ConfigError(
                f"validation_speakers is {wanted}: {len(free)} speakers are left to train and "
                "validate on; hold out fewer"
            )
        count = wanted or min(max(2, len(kinds) // 12), max(1, len(free) // 3))
        first = fold % len(of_kind)  # gets the odd speaker
        queues = [
            [s for s in free if kinds[s] == kind] for kind in of_kind[first:] + of_kind[:first]
        ]
        in_turn = itertools.chain(*itertools.zip_longest(*queues))
        selected = [speaker for speaker in in_turn if speaker is not None][:count]
        turns.update(selected)
    return selected


def _groups(takes: Sequence[str], contents: Sequence[str | None], paths: Sequence[str]) -> Rows:
    """Number the rows so that those with the same take, content or path share a number, [num_rows].

    Takes that share a content or path are one group, directly or through other takes. Groups are
    numbered in the order of their first takes, so the order of the rows does not matter.
    """
    leader = {take: take for take in takes}

    def find(take: str) -> str:
        while leader[take] != take:
            leader[take] = take = leader[leader[take]]
        return take

    first: dict[tuple[str, str | None], str] = {}
    for take, content, path in zip(takes, contents, paths, strict=True):
        for shared in (("content", content), ("path", path)):
            if shared[1] is not None:
                one, other = sorted((find(take), find(first.setdefault(shared, take))))
                leader[other] = one
    return np.unique([find(take) for take in takes], return_inverse=True)[1].astype(np.int64)


def _draw_takes(fold: int, groups: Rows, labels: Sequence[str], seed: int) -> Rows:
    """Assign every row a side by a random split of the groups, stratified by label, [num_rows]."""
    label_of: dict[int, str] = {}
    for group, label in zip(groups.tolist(), labels, strict=True):
        label_of[group] = min(label, label_of.get(group, label))
    rng = np.random.default_rng(seed)
    dealt: list[int] = []
    for label in sorted(set(label_of.values())):
        dealt += rng.permutation([g for g in sorted(label_of) if label_of[g] == label]).tolist()
    side_of = np.full(len(label_of), _TRAIN)
    test = dealt[fold::_RANDOM_FOLDS]
    others = [group for place, group in enumerate(dealt) if place % _RANDOM_FOLDS != fold]
    side_of[others[fold::_RANDOM_VALIDATION]] = _VALIDATION
    side_of[test] = _TEST
    return side_of[groups]


def _check_sides(drawn: Split, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse a fold with an empty side."""
    for side in ("train", "validation", "test"):
        if len(getattr(drawn, side)) == 0:
            tests = f" and the fold tests {', '.join(wanted)}" if wanted else ""
            raise ConfigError(
                f"{drawn.label}: its {side} side has no clips; the corpus has the speakers "
                f"{shorten(present, _SHOWN)}{tests}. Use {_alternative(len(present))}, or add clips"
            )


def _alternative(num_speakers: int) -> str:
    """Return a protocol that works with this number of speakers."""
    return f"speaker-{min(num_speakers, 5)}" if num_speakers >= 3 else "random"
