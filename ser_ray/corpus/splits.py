"""Who is trained on and who is tested: a protocol is a named list of folds.

Clips come in, as rows of who spoke what; the row numbers of a fold's train, validation and test
sides go out. Rows of one take (a performance's wav and mp4s) or of identical content never stand on
two sides, nor, but for `random`, does a speaker. Choices are made on the validation side, whose
speakers are held out of the training part; the test side is read once.

Everything here is a pure function of its arguments, whatever the order of the rows.

Sources: the six folds of EmoBox (https://github.com/emo-box/EmoBox) and the five of Luna-Jimenez
(https://github.com/cristinalunaj/MMEmotionRecognition), which name test actors and no validation.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ser_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

PROTOCOLS = {
    "emobox-6": "the six folds of EmoBox over RAVDESS's 24 actors",
    "luna-5": "the five folds of Luna-Jimenez over RAVDESS's 24 actors",
    "loso": "leave one speaker out: as many folds as speakers",
    "speaker-K": "K folds over the speakers of any corpus, K at least 2, as in speaker-5",
    "random": "five folds by take, speakers on every side: SPEAKER-DEPENDENT, for comparison only",
}
"""The names `--protocol` takes and what they mean."""

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
_RANDOM_FOLDS = 5  # a fifth of the takes is the test side
_RANDOM_VALIDATION = 8  # an eighth of the rest, a tenth of all, is the validation side

_LEFT_OUT, _TRAIN, _VALIDATION, _TEST = -1, 0, 1, 2  # a group keeps to its highest side

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """One fold: the rows of each side, as numbers into the clips it was drawn for, ascending."""

    protocol: str
    fold: int
    train: Rows
    """[num_train]"""
    validation: Rows
    """[num_validation]: recipes, trials and, if told so, epochs are selected by it."""
    test: Rows
    """[num_test]: is read once."""
    left_out: Rows
    """Rows on no side: their take or content is another speaker's on a side that counts more."""
    train_speakers: tuple[str, ...]
    validation_speakers: tuple[str, ...]
    test_speakers: tuple[str, ...]

    @property
    def speaker_dependent(self) -> bool:
        """The same speakers are on all sides: figures do not compare with other protocols'."""
        return self.protocol == "random"

    @property
    def label(self) -> str:
        """How every figure of this fold is to be captioned."""
        return f"{self.protocol} fold {self.fold} ({dependence_of(self.protocol)})"


def dependence_of(protocol: str) -> str:
    """Whether the tested speakers were learned from, as it is to stand beside every figure."""
    return "SPEAKER-DEPENDENT" if protocol == "random" else "speaker-independent"


def num_folds(protocol: str, speakers: Iterable[str]) -> int:
    """Count the folds of a protocol over a corpus's speakers.

    Raises:
        ConfigError: the protocol is unknown, or does not fit these speakers.
    """
    return len(_test_folds(protocol, dict.fromkeys(speakers)))


def split(
    protocol: str, fold: int, clips: "pa.Table", *, seed: int = 0, validation_speakers: int = 0
) -> Split:
    """Draw one fold of a protocol.

    Args:
        protocol: a name of `PROTOCOLS`.
        fold: 0 to `num_folds` - 1.
        clips: string columns `speaker`, `sex` (may be null), `take`, `emotion` and `content`, equal
            where the decoded samples are; one row a clip.
        seed: for `random` alone; the folds of every other protocol are fixed.
        validation_speakers: how many speakers validate, of every protocol but `random`; 0 leaves it
            to the protocol. The test side does not depend on it.

    Raises:
        ConfigError: the protocol is unknown, the fold out of range, or a side would be empty.
    """
    speakers = np.array(clips["speaker"].to_pylist(), dtype=np.str_)
    sexes = dict(zip(speakers.tolist(), clips["sex"].to_pylist(), strict=True))
    folds = _test_folds(protocol, sexes)
    if not 0 <= fold < len(folds):
        raise ConfigError(f"fold is {fold}: {protocol} has folds 0 to {len(folds) - 1} here")
    groups = _groups(clips["take"].to_pylist(), clips["content"].to_pylist())
    if protocol == "random":
        sides = _draw_takes(fold, groups, clips["emotion"].to_pylist(), seed)
    else:
        sides = np.full(len(speakers), _TRAIN)
        held_out = _validation_speakers(folds[: fold + 1], sexes, validation_speakers)
        sides[np.isin(speakers, held_out)] = _VALIDATION
        sides[np.isin(speakers, folds[fold])] = _TEST
    highest = np.zeros(len(groups), np.int64)
    np.maximum.at(highest, groups, sides)
    sides[sides < highest[groups]] = _LEFT_OUT
    train, validation, test, left_out = (
        np.flatnonzero(sides == side) for side in (_TRAIN, _VALIDATION, _TEST, _LEFT_OUT)
    )
    who = [tuple(np.unique(speakers[rows]).tolist()) for rows in (train, validation, test)]
    drawn = Split(protocol, fold, train, validation, test, left_out, *who)
    _check_sides(drawn, sorted(sexes), folds[fold])
    return drawn


def one_clip_per_take(clips: "pa.Table") -> Rows:
    """Choose the rows to count performances by: the wav of a take where it has one, else its mp4.

    The wav and the mp4 of RAVDESS are one performance recorded once; figures over both would count
    it twice. In own corpora (no `channel`) a take may group several recordings; all are selected.

    Args:
        clips: string columns `path`, `take`, `modality` and `channel`.

    Returns:
        Row numbers, ascending, [num_takes] for RAVDESS.
    """
    selected: dict[str, tuple[bool, str, int]] = {}
    own = []
    columns = [clips[name].to_pylist() for name in ("path", "take", "modality", "channel")]
    for row, (path, take, modality, channel) in enumerate(zip(*columns, strict=True)):
        if channel is None:
            own.append(row)
        else:
            candidate = (modality != "audio", path, row)
            selected[take] = min(candidate, selected.get(take, candidate))
    return np.array(sorted(own + [row for _, _, row in selected.values()]), np.int64)


def _test_folds(protocol: str, sexes: Mapping[str, str | None]) -> list[tuple[str, ...]]:
    """The test speakers of every fold; of `random`, whose folds are drawn by take, none."""
    if protocol == "random":
        return [()] * _RANDOM_FOLDS
    if protocol == "loso":
        return [(speaker,) for speaker in sorted(sexes)]
    if protocol in _NAMED_FOLDS:
        folds = _NAMED_FOLDS[protocol]
        if strangers := sorted(set(sexes) - set(itertools.chain(*folds))):
            raise ConfigError(
                f"{protocol} names RAVDESS's actors 01 to 24, and this corpus has "
                f"{_shorten(strangers)}: use {_alternative(len(sexes))}"
            )
        return list(folds)
    match = re.fullmatch(r"speaker-([1-9]\d{0,5})", protocol, re.ASCII)
    if match is None or (count := int(match[1])) < 2:
        raise ConfigError(f"protocol is {protocol!r}: it must be one of {', '.join(PROTOCOLS)}")
    if count > len(sexes):
        raise ConfigError(
            f"{protocol} needs {count} speakers and the corpus has {len(sexes)}: use "
            f"{_alternative(len(sexes))}"
        )
    # Dealt out one sex after the other, in an order that no name or number decides.
    dealt = sorted(sexes, key=lambda s: (sexes[s] or "", hashlib.sha256(s.encode()).digest()))
    return [tuple(sorted(dealt[fold::count])) for fold in range(count)]


def _validation_speakers(
    tests: Sequence[tuple[str, ...]], sexes: Mapping[str, str | None], wanted: int
) -> list[str]:
    """Choose who validates the last of the folds whose test speakers are given, 0 to that one.

    As many women as men, and whoever had the fewest turns in the folds before. If no number is
    wanted, a twelfth of the corpus's speakers and at least two, but no more than a third of those
    that are not tested: the voices that are learned from are what scores hang on most.

    Raises:
        ConfigError: so many are wanted that nobody is left to learn from.
    """
    kinds = sorted(set(sexes.values()), key=str)
    turns: Counter[str] = Counter()
    selected: list[str] = []
    for fold, test in enumerate(tests):
        free = sorted(sexes.keys() - set(test), key=lambda speaker: (turns[speaker], speaker))
        if 0 < len(free) <= wanted:
            raise ConfigError(
                f"validation_speakers is {wanted}: {len(free)} speakers are left to learn from and "
                "to validate on; hold out fewer"
            )
        count = wanted or min(max(2, len(sexes) // 12), max(1, len(free) // 3))
        first = fold % len(kinds)  # takes the odd one
        queues = [[s for s in free if sexes[s] == kind] for kind in kinds[first:] + kinds[:first]]
        in_turn = itertools.chain(*itertools.zip_longest(*queues))
        selected = [speaker for speaker in in_turn if speaker is not None][:count]
        turns.update(selected)
    return selected


def _groups(takes: Sequence[str], contents: Sequence[str | None]) -> Rows:
    """Number the rows so that rows of one take or of one content share a number, [num_rows].

    Takes are joined through shared content, directly or through others. The numbers follow the
    smallest take of each group and so do not depend on the order of the rows.
    """
    leader = {take: take for take in takes}

    def find(take: str) -> str:
        while leader[take] != take:
            leader[take] = take = leader[leader[take]]
        return take

    first: dict[str, str] = {}
    for take, content in zip(takes, contents, strict=True):
        if content is not None:
            one, other = sorted((find(take), find(first.setdefault(content, take))))
            leader[other] = one
    return np.unique([find(take) for take in takes], return_inverse=True)[1].astype(np.int64)


def _draw_takes(fold: int, groups: Rows, labels: Sequence[str], seed: int) -> Rows:
    """The side of every row in a random split of the groups, stratified by label, [num_rows]."""
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
                f"{drawn.label}: no clip for its {side} side; the corpus has speakers "
                f"{_shorten(present)}{tests}. Use {_alternative(len(present))}, or more clips"
            )


def _alternative(num_speakers: int) -> str:
    """A protocol that can be held with so many speakers."""
    return f"speaker-{min(num_speakers, 5)}" if num_speakers >= 3 else "random"


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
