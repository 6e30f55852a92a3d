"""Likely mistakes in a corpus are pointed out, and correct corpora get no warnings."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pytest

from ser_ray.corpus.mistakes import describe_clips, find_mistakes


def outcomes(labels: dict[str, int], speakers: list[str] | None = None) -> pa.Table:
    emotions = [label for label, count in labels.items() for _ in range(count)]
    speakers = speakers or ["anna", "ben"]
    rows = [
        {
            "path": f"/{number}.wav", "emotion": label, "channel": None, "status": "ok",
            "speaker": speakers[number % len(speakers)], "reason": None, "split": None,
            "digest": f"{number}", "start": None, "end": None,
        }
        for number, label in enumerate(emotions)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def replaced(table: pa.Table, **columns: list[Any]) -> pa.Table:
    return pa.table({name: columns.get(name, table[name]) for name in table.column_names})


@pytest.mark.parametrize(
    ("parts", "mistake"),
    [
        (["train", "test"], None),
        (["train", "fold1"], None),
        ([None, None], None),
        (["train", "test", None, "validation"], "the column split has the speaker ben in test and"),
        (["test", "tset"], "the column split has parts (test) and other values (tset). Its"),
    ],
)
def test_a_split_that_cannot_be_used_is_pointed_out(parts: list[str], mistake: str | None) -> None:
    table = outcomes({"sad": 4, "angry": 4})  # anna and ben in turn
    lines = find_mistakes(replaced(table, split=parts * (8 // len(parts))))
    if mistake is None:
        assert lines == []
    else:
        assert len(lines) == 1
        assert lines[0].startswith(f"--protocol table: {mistake}")


@pytest.mark.parametrize(
    ("digests", "starts", "lines"),
    [
        ("abac", [None] * 4, ["/2.wav ('angry') is a copy of /0.wav ('sad')"]),
        ("aabb", [None] * 4, []),
        ("aaaa", [1.0, 2.0, 3.0, 4.0], []),  # segments of a file
        ([None] * 4, [None] * 4, []),  # in a bucket
    ],
)
def test_copies_of_a_file_with_different_labels_are_pointed_out(
    digests: Sequence[str | None], starts: list[float | None], lines: list[str]
) -> None:
    table = outcomes({"sad": 2, "angry": 2})
    assert find_mistakes(replaced(table, digest=list(digests), start=starts)) == lines


def test_labels_are_counted_and_speakers_too() -> None:
    text = describe_clips(outcomes({"sad": 2, "angry": 3}))
    assert text == "labels: angry 3, sad 2\nspeakers: 2"


@pytest.mark.parametrize(
    ("labels", "speakers", "line"),
    [
        ({"angry": 9, "Angry": 1, "sad": 9}, None, "the labels 'Angry' (1 clip) and 'angry' (9"),
        ({"very sad": 5, "very_sad": 5}, None, "the labels 'very sad' (5 clips) and 'very_sad'"),
        ({"happy": 9, "hapy": 1}, None, "the label 'hapy' (1 clip) is one letter from 'happy'"),
        ({"happy": 9, "happpy": 2}, None, "the label 'happpy' (2 clips) is one letter from"),
        ({"calm": 9, "clam": 1}, None, "the label 'clam' (1 clip) is one letter from 'calm'"),
        ({"fear": 9, "feer": 1}, None, "the label 'feer' (1 clip) is one letter from 'fear'"),
        ({"x": 4, "y": 4}, ["1", "01"], "the speakers '01' (4 clips) and '1' (4 clips) may be"),
        ({"x": 4, "y": 4}, ["1.0", "1"], "the speakers '1' (4 clips) and '1.0' (4 clips) may"),
        (
            {"x": 4, "y": 4},
            ["0", "s00", "s01", "s02"],
            "the speakers '0' (2 clips) and 's00' (2 clips) may be the same person",
        ),
        ({"x": 4, "y": 4}, ["Anna", "anna"], "the speakers 'Anna' (4 clips) and 'anna'"),
        ({"x": 4}, None, "all clips have the label 'x': nothing can be trained"),
    ],
)
def test_a_likely_mistake_is_pointed_out(
    labels: dict[str, int], speakers: list[str], line: str
) -> None:
    (found,) = find_mistakes(outcomes(labels, speakers))
    assert found.startswith(line)


@pytest.mark.parametrize(
    ("labels", "speakers"),
    [
        ({"sad": 90, "mad": 1, "happy": 9, "unhappy": 1}, ["01", "02", "10", "100"]),
        ({"angry": 5, "angra": 4}, ["s1", "t1"]),
        ({"level 1": 90, "level 2": 1}, ["anna 1", "anna 11"]),
        ({"x": 4, "y": 4}, ["1", "2", "m1", "f1"]),
    ],
)
def test_intended_differences_are_not_reported(labels: dict[str, int], speakers: list[str]) -> None:
    assert find_mistakes(outcomes(labels, speakers)) == []


def test_a_file_in_the_folder_of_another_actor_is_pointed_out() -> None:
    paths = ["/r/Actor_05/a.wav", "/r/Actor_17/b.wav", "/r/actor 3/c.wav", "/r/Actor_05/x/d.wav"]
    speakers = ["17", "17", "04", "04"]
    table = outcomes({"sad": 4})
    columns = {"path": paths, "speaker": speakers, "channel": ["speech"] * 4}
    (line,) = find_mistakes(replaced(table, **columns))
    assert "/r/Actor_05/a.wav (actor 17), /r/actor 3/c.wav (actor 04);" in line
