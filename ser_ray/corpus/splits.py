"""Splits clips into the train, validation and test part of a fold.

`split` gets a table of clips and returns the row numbers of each part. Rows are never in different
parts if they have the same take, file or decoded sound. (The wav and the mp4s of a performance have
the same take.) The clips of a speaker are never in different parts either, except in `random`, and
in `cross-corpus` if corpora share the speaker. Models are selected by their scores on the
validation part. Only the selected model is scored on the test part.

The part of a clip does not depend on the order of the rows.
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
    fallback_protocol,
    list_folds,
    speaker_strata,
    table_parts,
)
from ser_ray.corpus.words import shorten
from ser_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

_RANDOM_VALIDATION = 8
"""In `random`, one eighth of the takes outside the test part are used for validation."""
_LEFT_OUT, _TRAIN, _VALIDATION, _TEST = -1, 0, 1, 2
"""Numbers of the parts. If the rows of one group (see `_number_groups`) are in several parts, only
the rows in the part with the highest number stay, and the others are left out."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One fold: the row numbers of the clips in each part, ascending."""

    protocol: str
    fold: int
    train: IntArray
    """[num_train]"""
    validation: IntArray
    """[num_validation]. Its scores select recipes, trials and, with `keep="best"`, epochs."""
    test: IntArray
    """[num_test]. Only the selected model is scored on it."""
    left_out: IntArray
    """Rows in no part. Either another row of their group is in the validation or test part, or
    their value in the column `split` is null and the protocol is `table`."""
    train_speakers: tuple[str, ...]
    validation_speakers: tuple[str, ...]
    test_speakers: tuple[str, ...]
    tested_corpus: str
    """The name of the tested corpus if the protocol is `cross-corpus`, and otherwise empty."""

    @property
    def speaker_dependent(self) -> bool:
        """Whether a test speaker is in another part too. The scores are then too high.

        It is always true for the protocol `random`.
        """
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
            `take`, `emotion` and `content` (a digest of the decoded sound). The protocol `table`
            also needs the column `split`, and several corpora need `corpus`.
        seed: only used by `random`; the folds of every other protocol are fixed.
        validation_speakers: number of validation speakers; 0 means the default of
            `_choose_validation`. The protocols `random` and `all`, and a table with a validation
            part, ignore this number.

    Raises:
        ConfigError: there are no clips, the protocol is unknown or does not fit the clips, the fold
            is out of range, `validation_speakers` leaves no speaker to train on, or a part is empty
            (the protocol `all` may have empty parts).
    """
    if not len(clips):
        raise ConfigError("the shards have no clips; `ser-ray prepare` says why, if run again")
    strata = speaker_strata(clips)
    folds = list_folds(protocol, strata, clips)
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold is {fold}: {protocol} has folds 0 to {len(folds) - 1} here")
    tested_corpus = ""
    if protocol == CROSS_CORPUS:
        tested_corpus = sorted(set(clips["corpus"].to_pylist()))[fold]
    groups = _number_groups(*(clips[name].to_pylist() for name in ("take", "content", "path")))
    if protocol == ALL:
        parts = np.full(len(clips), _TRAIN)
    elif protocol == "random":
        parts = _parts_at_random(fold, groups, clips["emotion"].to_pylist(), seed)
    else:
        parts = _parts_by_speaker(
            protocol, folds[: fold + 1], clips, strata, tested_corpus, validation_speakers
        )
    highest = np.zeros(len(groups), np.int64)  # of each group
    np.maximum.at(highest, groups, parts)
    parts[parts < highest[groups]] = _LEFT_OUT
    train, validation, test = (
        np.flatnonzero(parts == part) for part in (_TRAIN, _VALIDATION, _TEST)
    )
    result = Split(
        protocol=protocol,
        fold=fold,
        train=train,
        validation=validation,
        test=test,
        left_out=np.flatnonzero(parts == _LEFT_OUT),
        train_speakers=speakers_of(clips, train),
        validation_speakers=speakers_of(clips, validation),
        test_speakers=speakers_of(clips, test),
        tested_corpus=tested_corpus,
    )
    if protocol != ALL:
        _require_clips(result, sorted(strata), folds[fold])
    return result


def speakers_of(clips: "pa.Table", rows: IntArray) -> tuple[str, ...]:
    """Return the speakers of some rows, sorted."""
    return tuple(sorted(set(clips["speaker"].take(rows).to_pylist())))


def _parts_by_speaker(
    protocol: str,
    folds: Sequence[tuple[str, ...]],
    clips: "pa.Table",
    strata: Mapping[str, str],
    tested_corpus: str,
    num_validation: int,
) -> IntArray:
    """Return the part of each row [num_rows].

    All rows of a speaker are in the same part, with two exceptions: `cross-corpus` tests all rows
    of a corpus, also of speakers that other corpora share, and `table` leaves out rows without a
    part.

    Args:
        protocol: any protocol except `random` and `all`.
        folds: the test speakers of every fold up to this one.
        clips, strata: all clips, and the stratum of every speaker.
        tested_corpus, num_validation: `Split.tested_corpus`, and `count` of `_choose_validation`.
    """
    speakers = np.array(clips["speaker"].to_pylist(), dtype=np.str_)
    is_test = np.isin(speakers, folds[-1])
    is_used = is_candidate = np.full(len(speakers), True)
    validation: Sequence[str] = ()
    if protocol == CROSS_CORPUS:
        # By corpus and not by speaker, because corpora may share speakers.
        is_test = np.array(clips["corpus"].to_pylist()) == tested_corpus
        folds, is_candidate = [()], ~is_test
    elif protocol == "table":
        is_used = is_candidate = clips["split"].is_valid().to_numpy()
        validation = table_parts(clips).get("validation", ())
    candidates = {speaker: strata[speaker] for speaker in speakers[is_candidate].tolist()}
    validation = validation or _choose_validation(folds, candidates, num_validation)
    parts = np.full(len(speakers), _TRAIN)
    parts[np.isin(speakers, validation)] = _VALIDATION
    parts[is_test] = _TEST
    parts[~is_used] = _LEFT_OUT
    return parts


def one_clip_per_take(clips: "pa.Table") -> IntArray:
    """Select the clips to train on and to score: one for each RAVDESS take, and each of a table.

    The wav and the mp4 of a RAVDESS take are the same recording. The wav is selected if there is
    one. Clips of a table are recognised by their `channel`, which is null. Only the first window of
    a clip is selected.

    Args:
        clips: the string columns `path`, `take`, `modality` and `channel`, and the number `window`.

    Returns:
        Row numbers, ascending, [num_takes] for RAVDESS.
    """
    selected: dict[str | int, tuple[bool, str, int]] = {}
    names = ("path", "take", "modality", "channel", "window")
    columns = [clips[name].to_pylist() for name in names]
    for row, (path, take, modality, channel, window) in enumerate(zip(*columns, strict=True)):
        if window == 0:
            key = row if channel is None else take
            candidate = (modality != "audio", path, row)
            selected[key] = min(candidate, selected.get(key, candidate))
    return np.array(sorted(row for *_, row in selected.values()), np.int64)


def windows_of(numbers: IntArray, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Find all windows of the given clips.

    Args:
        numbers: the column `window` of all rows. The windows of a clip are consecutive rows,
            numbered from 0.
        rows: the row of each clip's first window [num_clips].

    Returns:
        The row of each window, and the index of its clip in `rows`, both [num_windows].
    """
    firsts = np.append(np.flatnonzero(numbers == 0), len(numbers))
    counts = firsts[np.searchsorted(firsts, rows) + 1] - rows
    starts = np.cumsum(counts) - counts  # where the windows of each clip begin in the result
    owners = np.repeat(np.arange(len(rows)), counts)
    return rows[owners] + np.arange(len(owners)) - starts[owners], owners


def _choose_validation(
    folds: Sequence[tuple[str, ...]], strata: Mapping[str, str], count: int
) -> list[str]:
    """Choose the validation speakers of the last fold in `folds`.

    The strata contribute as equally as possible. Over the folds, all speakers are chosen equally
    often, as far as possible. The default is one twelfth of all speakers, but at least two. If
    this is more than a third of the speakers outside the test part, the default is that third, but
    at least one.

    Args:
        folds: the test speakers of every fold up to this one.
        strata: the stratum of every speaker; in `cross-corpus`, only of speakers of the other
            corpora; in `table`, only of speakers with a part.
        count: number of validation speakers; 0 means the default.

    Raises:
        ConfigError: `count` leaves no speaker to train on.
    """
    names = sorted(set(strata.values()))
    num_chosen: Counter[str] = Counter()
    selected: list[str] = []
    for fold, test_speakers in enumerate(folds):
        free = sorted(strata.keys() - set(test_speakers), key=lambda name: (num_chosen[name], name))
        if 0 < len(free) <= count:
            raise ConfigError(
                f"validation_speakers is {count}: {len(free)} speakers are outside the test part, "
                "and at least one of them is needed for training; choose fewer"
            )
        needed = count or min(max(2, len(strata) // 12), max(1, len(free) // 3))
        first = fold % len(names)  # the first stratum may contribute one more than the last
        queues = [[s for s in free if strata[s] == name] for name in names[first:] + names[:first]]
        in_turn = itertools.chain(*itertools.zip_longest(*queues))
        selected = [speaker for speaker in in_turn if speaker is not None][:needed]
        num_chosen.update(selected)
    return selected


def _number_groups(
    takes: Sequence[str], contents: Sequence[str | None], paths: Sequence[str]
) -> IntArray:
    """Return the group of each row [num_rows]. All rows of a group must be in the same part.

    Rows with the same take, content or path are in one group, directly or through other rows.
    Groups are numbered in the alphabetical order of their smallest take, so the numbers do not
    depend on the order of the rows.
    """
    known = [content or take for content, take in zip(contents, takes, strict=True)]
    columns = []
    for names in (takes, known, paths):
        row_of = {name: row for row, name in enumerate(names)}
        columns.append(np.array([row_of[name] for name in names]))
    groups, before = np.unique(takes, return_inverse=True)[1], np.empty(0, np.int64)
    while not np.array_equal(groups, before):
        before = groups
        for rows in columns:  # rows with the same name get the smallest of their groups
            smallest = np.full(len(groups), len(groups))
            np.minimum.at(smallest, rows, groups)
            groups = smallest[rows]
    return np.unique(groups, return_inverse=True)[1].astype(np.int64)


def _parts_at_random(fold: int, groups: IntArray, labels: Sequence[str], seed: int) -> IntArray:
    """Return the part of each row [num_rows]. Groups are split at random, stratified by label."""
    label_of: dict[int, str] = {}
    for group, label in zip(groups.tolist(), labels, strict=True):
        label_of[group] = min(label, label_of.get(group, label))
    rng = np.random.default_rng(seed)
    ordered: list[int] = []  # by label, and at random within a label
    for label in sorted(set(label_of.values())):
        ordered += rng.permutation([g for g in sorted(label_of) if label_of[g] == label]).tolist()
    others = [group for place, group in enumerate(ordered) if place % RANDOM_FOLDS != fold]
    part_of = np.full(len(label_of), _TRAIN)
    part_of[others[fold::_RANDOM_VALIDATION]] = _VALIDATION
    part_of[ordered[fold::RANDOM_FOLDS]] = _TEST
    return part_of[groups]


def _require_clips(
    result: Split, all_speakers: Sequence[str], test_speakers: Sequence[str]
) -> None:
    """Raise a ConfigError if a part of the fold is empty."""
    for part in ("train", "validation", "test"):
        if len(getattr(result, part)) == 0:
            tests = f" and the fold tests {', '.join(test_speakers)}" if test_speakers else ""
            raise ConfigError(
                f"{result.label}: its {part} part has no clips; the corpus has the speakers "
                f"{shorten(all_speakers)}{tests}. "
                f"Use {fallback_protocol(len(all_speakers))}, or add clips"
            )
