"""Protocols: how many folds each has, and which speakers each fold tests.

Sources: the six folds of EmoBox (https://github.com/emo-box/EmoBox) and the five of Luna-Jimenez
(https://github.com/cristinalunaj/MMEmotionRecognition). Both define test actors, but no validation
actors.
"""

import hashlib
import itertools
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from ser_ray.corpus.words import PARTS, shorten
from ser_ray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

CROSS_CORPUS = "cross-corpus"
ALL = "all"
"""The protocol that trains a final model. Another protocol is used to choose the model's recipe."""
PROTOCOLS = {
    "emobox-6": "the six folds of EmoBox over RAVDESS's 24 actors",
    "luna-5": "the five folds of Luna-Jimenez over RAVDESS's 24 actors",
    "loso": "leave one speaker out; there is a fold for each speaker",
    "speaker-K": "K folds over the speakers of any corpus, K at least 2, as in speaker-5",
    "table": "the parts or folds in the column `split` of the corpus's table",
    CROSS_CORPUS: "each of several corpora is tested in turn, and the others are for training",
    "random": "five folds by take, which share the speakers (SPEAKER-DEPENDENT, for comparison)",
    ALL: "no folds; all clips are for training, so there are no validation or test scores",
}
"""The names that `--protocol` accepts, and their meaning."""

DEPENDENCE = {True: "SPEAKER-DEPENDENT", False: "speaker-independent"}
"""What captions say, by `Split.speaker_dependent`."""
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
RANDOM_FOLDS = 5
"""The number of folds of `random`, each of which tests one fifth of the takes."""


def num_folds(protocol: str, clips: "pa.Table") -> int:
    """Return the number of folds of a protocol; `clips` has the columns that `splits.split` needs.

    Raises:
        ConfigError: the protocol is unknown, or does not fit these clips.
    """
    return len(list_folds(protocol, speaker_strata(clips), clips))


def suggest_protocol(clips: "pa.Table") -> str:
    """Return a protocol that fits a custom corpus: `table`, or else the `fallback_protocol`."""
    with suppress(ConfigError):  # the column `split` does not fit `table`
        if len(table_parts(clips)) > 1 and all(list_folds("table", {}, clips)):
            return "table"
    return fallback_protocol(len(set(clips["speaker"].to_pylist())))


def speaker_strata(clips: "pa.Table") -> dict[str, str]:
    """Return the stratum of every speaker: corpus and sex.

    The folds of `speaker-K`, and the chosen validation parts, have speakers of every stratum, as
    equally as possible.
    """
    corpora = clips["corpus"].to_pylist() if "corpus" in clips.column_names else [""] * len(clips)
    columns = clips["speaker"].to_pylist(), corpora, clips["sex"].to_pylist()
    return {speaker: f"{corpus}/{sex or ''}" for speaker, corpus, sex in zip(*columns, strict=True)}


def list_folds(
    protocol: str, strata: Mapping[str, str], clips: "pa.Table"
) -> list[tuple[str, ...]]:
    """Return the test speakers of every fold.

    The folds of `random` have no test speakers, because they test takes of all speakers. The fold
    of `all` has none, because it tests nothing.
    """
    if protocol == ALL:
        return [()]
    if protocol == "table":
        parts = table_parts(clips)
        if set(parts) <= set(PARTS.values()):
            return [parts.get("test", ())]
        return [speakers for part, speakers in parts.items() if part != "train"]
    if protocol == "random":
        return [()] * RANDOM_FOLDS
    if protocol == CROSS_CORPUS:
        return _corpus_folds(clips)
    if protocol == "loso":
        return [(speaker,) for speaker in sorted(strata)]
    if protocol in _NAMED_FOLDS:
        folds = _NAMED_FOLDS[protocol]
        if others := sorted(set(strata) - set(itertools.chain(*folds))):
            raise ConfigError(
                f"{protocol} is defined for RAVDESS's actors 01 to 24, and this corpus has "
                f"{shorten(others)}: use {fallback_protocol(len(strata))}"
            )
        return list(folds)
    return _speaker_folds(protocol, strata)


def table_parts(clips: "pa.Table") -> dict[str, tuple[str, ...]]:
    """Return the speakers of each part or fold that the column `split` names.

    Raises:
        ConfigError: a corpus has no such column, it mixes parts and folds, or a speaker is in two
            parts.
    """
    if "corpus" in clips.column_names:
        corpora = clips["corpus"]
        with_split = corpora.filter(clips["split"].is_valid())
        if without_split := sorted({*corpora.to_pylist()} - {*with_split.to_pylist()}):
            raise ConfigError(
                f"--protocol table: the corpus {without_split[0]} has no column split; choose "
                "another protocol, or leave this corpus out"
            )
    values = set(clips["split"].to_pylist()) - {None}
    folds = values.difference(PARTS.values())
    if folds and values & {"validation", "test"}:
        parts, others = (shorten(sorted(names)) for names in (values - folds, folds))
        raise ConfigError(
            f"--protocol table: the column split has parts ({parts}) and other values ({others}). "
            "Its values must be train, validation and test, or names of folds and train. Correct "
            "it and prepare the table again, or choose another protocol"
        )
    part_of: dict[str, str] = {}
    for speaker, part in zip(*(clips[n].to_pylist() for n in ("speaker", "split")), strict=True):
        if part is not None and part_of.setdefault(speaker, part) != part:
            raise ConfigError(
                f"--protocol table: the column split has the speaker {speaker} in "
                f"{part_of[speaker]} and in {part}, so a model could be tested on a voice from its "
                "training. Give every speaker one part and prepare the table again, or choose "
                "another protocol"
            )
    if not part_of:
        raise ConfigError(
            "--protocol table: the corpus has no column split with parts or folds; choose another "
            "protocol"
        )
    ordered = sorted(values, key=lambda part: (len(part), part))
    return {part: tuple(sorted(s for s in part_of if part_of[s] == part)) for part in ordered}


def _corpus_folds(clips: "pa.Table") -> list[tuple[str, ...]]:
    """Return the speakers of every corpus, sorted by the name of the corpus."""
    named = clips["corpus"].to_pylist() if "corpus" in clips.column_names else []
    pairs = set(zip(named, clips["speaker"].to_pylist(), strict=False))
    corpora = sorted(set(named))
    if len(corpora) < 2:
        raise ConfigError(
            f"{CROSS_CORPUS} tests one of several corpora: name several shard sets with clips, as "
            "in --shards out/emodb out/iemocap, or choose another --protocol"
        )
    return [tuple(sorted(s for c, s in pairs if c == corpus)) for corpus in corpora]


def _speaker_folds(protocol: str, strata: Mapping[str, str]) -> list[tuple[str, ...]]:
    """Return the test speakers of every fold of speaker-K."""
    match = re.fullmatch(r"speaker-([1-9]\d{0,5})", protocol, re.ASCII)
    if match is None or (count := int(match[1])) < 2:
        raise ConfigError(f"protocol is {protocol!r}: it must be one of {', '.join(PROTOCOLS)}")
    if count > len(strata):
        raise ConfigError(
            f"{protocol} needs {count} speakers and the corpus has {len(strata)}: use "
            f"{fallback_protocol(len(strata))}"
        )
    # Speakers are sorted by stratum, and each fold tests every `count`-th of them, so each stratum
    # is spread equally over the folds. Within a stratum, speakers are sorted by a hash, because the
    # order of their names may have a meaning.
    ordered = sorted(strata, key=lambda s: (strata[s], hashlib.sha256(s.encode()).digest()))
    return [tuple(sorted(ordered[fold::count])) for fold in range(count)]


def fallback_protocol(num_speakers: int) -> str:
    """Return `speaker-K` with at most 5 folds, or `random` if there are fewer than 3 speakers."""
    return f"speaker-{min(num_speakers, 5)}" if num_speakers >= 3 else "random"
