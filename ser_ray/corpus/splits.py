"""Splits clips into the train, validation and test sides of a fold.

`split` takes a table of clips and returns the row numbers of each side. All rows of a take (the wav
and mp4s of a performance) are on the same side, and so are all segments of a file and all rows with
identical content. Except in `random`, all clips of a speaker are on the same side too. Models are
selected by their scores on the validation side. The test side is used once.

The functions have no side effects, and the order of the rows does not matter.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ser_ray.corpus.folds import (
    ALL,
    CROSS_CORPUS,
    DEPENDENCE,
    RANDOM_FOLDS,
    SHOWN,
    alternative,
    list_folds,
    speaker_strata,
    table_parts,
)
from ser_ray.corpus.words import shorten
from ser_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_RANDOM_VALIDATION = 8
"""In `random`, an eighth of the takes that are not tested are the validation side."""
_LEFT_OUT, _TRAIN, _VALIDATION, _TEST = -1, 0, 1, 2
"""The sides. If the rows of a group are on several sides, only the highest side keeps its rows."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One fold: the row numbers of the clips on each side, ascending."""

    protocol: str
    fold: int
    train: Rows
    """[num_train]"""
    validation: Rows
    """[num_validation]. Its scores select recipes, trials and, with `keep="best"`, epochs."""
    test: Rows
    """[num_test]. It is used once."""
    left_out: Rows
    """Rows on no side, because the validation or test side has their take or content already."""
    train_speakers: tuple[str, ...]
    validation_speakers: tuple[str, ...]
    test_speakers: tuple[str, ...]
    tested_corpus: str = ""
    """The tested corpus, in a fold of `cross-corpus`."""

    @property
    def speaker_dependent(self) -> bool:
        """Whether tested speakers are also trained or validated on, so scores are too high."""
        shared = {*self.train_speakers, *self.validation_speakers} & {*self.test_speakers}
        return self.protocol == "random" or bool(shared)

    @property
    def label(self) -> str:
        """The name of the protocol and fold, as captions show it."""
        if self.protocol == ALL:
            return "all speakers, no validation or test part"
        tested = f", tests {self.tested_corpus}" if self.tested_corpus else ""
        return f"{self.protocol} fold {self.fold}{tested} ({DEPENDENCE[self.speaker_dependent]})"


def split(
    protocol: str, fold: int, clips: "pa.Table", *, seed: int = 0, validation_speakers: int = 0
) -> Split:
    """Split clips by one fold of a protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        fold: 0 to `num_folds` - 1.
        clips: one row per clip, with the string columns `path`, `speaker`, `sex` (may be null),
            `take`, `emotion` and `content` (equal for equal samples). `table` also needs `split`,
            and several corpora need `corpus`.
        seed: only used by `random`; the folds of every other protocol are fixed.
        validation_speakers: number of speakers on the validation side, except in `random`. 0
            means the default of `_choose_validation`.

    Raises:
        ConfigError: the protocol is unknown, the fold is out of range, or a side is empty.
    """
    speakers = np.array(clips["speaker"].to_pylist(), dtype=np.str_)
    strata = speaker_strata(clips)
    folds = list_folds(protocol, strata, clips)
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold is {fold}: {protocol} has folds 0 to {len(folds) - 1} here")
    groups = _groups(*(clips[name].to_pylist() for name in ("take", "content", "path")))
    tested_corpus = ""
    if protocol == CROSS_CORPUS:
        tested_corpus = sorted(set(clips["corpus"].to_pylist()))[fold]
    if protocol == "random":
        sides = _draw_takes(fold, groups, clips["emotion"].to_pylist(), seed)
    else:
        tests = folds[: fold + 1]
        sides = _sides_by_speaker(protocol, tests, clips, tested_corpus, validation_speakers)
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
        _check_sides(drawn, sorted(strata), folds[fold])
    return drawn


def _sides_by_speaker(
    protocol: str,
    tests: Sequence[tuple[str, ...]],
    clips: "pa.Table",
    tested_corpus: str,
    num_validation: int,
) -> Rows:
    """Assign every row the side of its speaker, [num_rows].

    Args:
        protocol: any protocol except `random`.
        tests: the test speakers of every fold up to this one.
        clips: as in `split`.
        tested_corpus: the corpus that is tested, for `cross-corpus`.
        num_validation: number of validation speakers; 0 means the default.
    """
    speakers = np.array(clips["speaker"].to_pylist(), dtype=np.str_)
    sides = np.full(len(speakers), _TRAIN)
    if protocol == ALL:
        return sides
    strata = speaker_strata(clips)
    is_tested = np.isin(speakers, tests[-1])
    held_out: Sequence[str] = ()
    if protocol == CROSS_CORPUS:  # corpora may share speakers
        is_tested = np.array(clips["corpus"].to_pylist()) == tested_corpus
        strata = {speaker: strata[speaker] for speaker in speakers[~is_tested].tolist()}
        tests = [()]
    elif protocol == "table":
        parts = table_parts(clips)
        strata = {speaker: strata[speaker] for part in parts.values() for speaker in part}
        held_out = parts.get("validation", ())
    held_out = held_out or _choose_validation(tests, strata, num_validation)
    sides[np.isin(speakers, held_out)] = _VALIDATION
    sides[is_tested] = _TEST
    if protocol == "table":
        sides[clips["split"].is_null().to_numpy()] = _LEFT_OUT
    return sides


def one_clip_per_take(clips: "pa.Table") -> Rows:
    """Select the clips that scores count: one clip per RAVDESS take, or every clip of a table.

    The wav and the mp4 of a RAVDESS take are the same recording. The wav is selected if there is
    one. Clips of a table have no `channel`. Only the first window of a clip is selected.

    Args:
        clips: the string columns `path`, `take`, `modality` and `channel`, and the number `window`.

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
    """Find all windows of the given clips.

    Args:
        windows: the column `window` of all rows. The windows of a clip are consecutive rows,
            numbered from 0.
        rows: the row of each clip's first window [num_rows].

    Returns:
        The rows of the windows [num_windows], and the index in `rows` of the clip of each window.
    """
    firsts = np.append(np.flatnonzero(windows == 0), len(windows))
    counts = firsts[np.searchsorted(firsts, rows) + 1] - rows
    owners = np.repeat(np.arange(len(rows)), counts)
    return rows[owners] + np.arange(len(owners)) - np.searchsorted(owners, owners), owners


def _choose_validation(
    tests: Sequence[tuple[str, ...]], strata: Mapping[str, str], wanted: int
) -> list[str]:
    """Choose the validation speakers of the last fold in `tests`.

    Every stratum contributes the same number of speakers. Speakers take turns over the folds. By
    default, a twelfth of all speakers validate, but at least two speakers, and at most a third of
    the speakers that are not tested. The others train.

    Args:
        tests: the test speakers of every fold up to this one.
        strata: the stratum of every speaker.
        wanted: number of validation speakers; 0 means the default.

    Raises:
        ConfigError: `wanted` leaves no speaker to train on.
    """
    names = sorted(set(strata.values()))
    turns: Counter[str] = Counter()
    selected: list[str] = []
    for fold, test in enumerate(tests):
        free = sorted(strata.keys() - set(test), key=lambda speaker: (turns[speaker], speaker))
        if 0 < len(free) <= wanted:
            raise ConfigError(
                f"validation_speakers is {wanted}: {len(free)} speakers are left to train and "
                "validate on; hold out fewer"
            )
        count = wanted or min(max(2, len(strata) // 12), max(1, len(free) // 3))
        first = fold % len(names)  # this stratum contributes the odd speaker
        queues = [[s for s in free if strata[s] == name] for name in names[first:] + names[:first]]
        in_turn = itertools.chain(*itertools.zip_longest(*queues))
        selected = [speaker for speaker in in_turn if speaker is not None][:count]
        turns.update(selected)
    return selected


def _groups(takes: Sequence[str], contents: Sequence[str | None], paths: Sequence[str]) -> Rows:
    """Return a group number for each row; rows with the same take, content or path are a group.

    Takes that share a content or path are in one group, directly or through other takes. Groups are
    numbered by their first take, so the order of the rows does not matter.
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
    """Assign every row a side, by a random split of the groups, stratified by label [num_rows]."""
    label_of: dict[int, str] = {}
    for group, label in zip(groups.tolist(), labels, strict=True):
        label_of[group] = min(label, label_of.get(group, label))
    rng = np.random.default_rng(seed)
    dealt: list[int] = []
    for label in sorted(set(label_of.values())):
        dealt += rng.permutation([g for g in sorted(label_of) if label_of[g] == label]).tolist()
    side_of = np.full(len(label_of), _TRAIN)
    test = dealt[fold::RANDOM_FOLDS]
    others = [group for place, group in enumerate(dealt) if place % RANDOM_FOLDS != fold]
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
                f"{shorten(present, SHOWN)}{tests}. Use {alternative(len(present))}, or add clips"
            )
