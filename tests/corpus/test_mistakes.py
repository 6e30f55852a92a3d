"""Likely mistakes in a corpus are pointed out, and correct corpora get no warnings."""

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
        }
        for number, label in enumerate(emotions)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def test_a_speaker_in_two_parts_of_a_table_is_pointed_out() -> None:
    table = outcomes({"sad": 4, "angry": 4}).drop_columns("split")  # anna and ben in turn
    apart = table.append_column("split", pa.array(["train", "test"] * 4))
    mixed = table.append_column("split", pa.array(["train", "test", None, "dev"] * 2))
    assert find_mistakes(apart) == []
    [line] = find_mistakes(mixed)
    assert line.startswith("several parts of the column split have clips of ben, so")


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
    ],
)
def test_intended_differences_are_not_reported(labels: dict[str, int], speakers: list[str]) -> None:
    assert find_mistakes(outcomes(labels, speakers)) == []


def test_a_file_in_the_folder_of_another_actor_is_pointed_out() -> None:
    paths = ["/r/Actor_05/a.wav", "/r/Actor_17/b.wav", "/r/actor 3/c.wav", "/r/Actor_05/x/d.wav"]
    speakers = ["17", "17", "04", "04"]
    rows = {"path": paths, "speaker": speakers, "channel": ["speech"] * 4, "status": ["ok"] * 4}
    (line,) = find_mistakes(pa.table(rows))
    assert "/r/Actor_05/a.wav (actor 17), /r/actor 3/c.wav (actor 04);" in line
