"""The corpora of other tools name the same clips as a plain table."""

import gzip
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ser_ray.corpus.manifest import list_corpus
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.features.decode import decode
from ser_ray.shards.config import PrepareConfig, column_names
from ser_ray.shards.digest import file_digest
from tests.clips import voice, write_wav

LABELS = ["joy", "anger"]
NUM_CLIPS = 4
SIDES = ["train", "train", "validation", "test"]
Row = tuple[str, str, str]


def rows() -> list[Row]:
    """Path, label and speaker of every clip."""
    return [(f"wavs/{n}.wav", LABELS[n % 2], f"s{n}") for n in range(NUM_CLIPS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for n in range(NUM_CLIPS):
        write_wav(tmp_path / "wavs" / f"{n}.wav", voice(1.0 + n / 10, seed=n))
    return tmp_path


def json_lines(path: Path, lines: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def emobox(folder: Path) -> Path:
    keys = ("wav", "emo", "spk")
    lines = [{"key": str(n), **dict(zip(keys, row, strict=True))} for n, row in enumerate(rows())]
    return json_lines(folder / "data" / "mine.jsonl", lines)


def emobox_folds(folder: Path) -> Path:
    lines = [json.loads(line) for line in emobox(folder).read_text().splitlines()]
    for fold in (1, 2):
        for side in ("test", "train"):
            chosen = [
                line for n, line in enumerate(lines) if (n % 2 == fold - 1) == (side == "test")
            ]
            json_lines(folder / "folds" / f"fold_{fold}" / f"mine_{side}_fold_{fold}.jsonl", chosen)
    return folder / "folds"


def hugging_face(folder: Path) -> Path:
    """Two Parquet files, each of several row groups, with their recordings inside."""
    sound = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {"audio": {"_type": "Audio"}, "label": {"names": LABELS, "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for side in dict.fromkeys(SIDES):
        chosen = [row for row, of in zip(rows(), SIDES, strict=True) if of == side]
        audio = [{"bytes": (folder / row[0]).read_bytes(), "path": row[0]} for row in chosen]
        labels = [LABELS.index(row[1]) for row in chosen]
        columns = {"audio": pa.array(audio, sound), "label": labels}
        table = pa.table(columns | {"speaker_id": [row[2] for row in chosen]})
        target = folder / "hf" / "data" / f"{side}-00000-of-00001.parquet"
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.replace_schema_metadata(metadata), target, row_group_size=1)
    return folder / "hf"


def hugging_face_paths(folder: Path) -> Path:
    sound = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    audio = pa.array([{"bytes": None, "path": row[0]} for row in rows()], sound)
    columns = {name: [row[n] for row in rows()] for n, name in ((1, "emotion"), (2, "speaker"))}
    pq.write_table(pa.table({"audio": audio, **columns}), folder / "t.parquet")
    return folder / "t.parquet"


def lhotse(folder: Path) -> Path:
    sources = [
        [{"type": "file", "channels": [0], "source": str(folder / row[0])}] for row in rows()
    ]
    recordings = [
        {"id": str(n), "sources": s, "duration": 1 + n / 10} for n, s in enumerate(sources)
    ]
    supervisions = [
        {"id": f"{n}-0", "recording_id": str(n), "start": 0.0, "duration": 1 + n / 10,
         "speaker": row[2], "custom": {"emotion": row[1]}}
        for n, row in enumerate(rows())
    ]  # fmt: skip
    json_lines(folder / "lhotse" / "mine_recordings_all.jsonl.gz", recordings)
    json_lines(folder / "lhotse" / "mine_supervisions_all.jsonl.gz", supervisions)
    return folder / "lhotse"


def kaldi(folder: Path) -> Path:
    (folder / "kaldi").mkdir()
    for column, name in enumerate(("wav.scp", "utt2emo", "utt2spk")):
        lines = [f"u{n} {row[column]}\n" for n, row in enumerate(rows())]
        (folder / "kaldi" / name).write_text("".join(lines))
    (folder / "kaldi" / "text").write_text("".join(f"u{n} some words\n" for n in range(NUM_CLIPS)))
    return folder / "kaldi"


def audformat(folder: Path) -> Path:
    module = pytest.importorskip("audformat")
    database = module.Database("mine")
    database.schemes["emotion"] = module.Scheme(labels=LABELS)
    database.schemes["speaker"] = module.Scheme("str")
    for side in dict.fromkeys(SIDES):
        kind = "dev" if side == "validation" else side
        database.splits[side] = module.Split(kind)
        chosen = [row for row, of in zip(rows(), SIDES, strict=True) if of == side]
        database[side] = module.Table(
            module.filewise_index([row[0] for row in chosen]), split_id=side
        )
        for column, name in ((1, "emotion"), (2, "speaker")):
            database[side][name] = module.Column(scheme_id=name)
            database[side][name].set([row[column] for row in chosen])
    database.save(str(folder), storage_format="csv")
    return folder


MAKERS: dict[Callable[[Path], Path], list[str | None]] = {
    emobox: [None] * 4,
    emobox_folds: ["1", "2", "1", "2"],
    hugging_face: [*SIDES],
    hugging_face_paths: [None] * 4,
    lhotse: [None] * 4,
    kaldi: [None] * 4,
    audformat: [*SIDES],
}


@pytest.mark.filterwarnings("ignore")  # audformat uses what pandas will remove
@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_every_format_names_the_same_clips(folder: Path, make: Callable[[Path], Path]) -> None:
    """Sound, label, speaker and side are those of the plain rows, wherever the tool keeps them."""
    found = list_corpus(str(make(folder))).manifest.to_pylist()
    by_speaker = {row["speaker"]: row for row in found}
    assert len(found) == len(by_speaker) == NUM_CLIPS
    for (path, label, speaker), side in zip(rows(), MAKERS[make], strict=True):
        row = by_speaker[speaker]
        assert (row["emotion"], row["split"], row["status"]) == (label, side, None)
        assert (row["start"], row["end"]) == (None, None)
        expected = decode(str(folder / path))
        np.testing.assert_array_equal(decode(row["path"]).samples, expected.samples)
        assert file_digest(row["path"]) == file_digest(str(folder / path))
        assert row["size"]
    assert len({row["take"] for row in found}) == NUM_CLIPS
    if make is not lhotse:  # it has absolute paths
        assert not any(str(folder) in row["take"] for row in found)


def test_segments_of_kaldi_and_lhotse_have_their_times(folder: Path) -> None:
    source = kaldi(folder)
    (source / "segments").write_text("a u0 0.25 0.75\nb u0 0.5 -1\n")
    for name, values in {"utt2emo": "joy", "utt2spk": "s0"}.items():
        (source / name).write_text(f"a {values}\nb {values}\n")
    found = list_corpus(str(source)).manifest.to_pylist()
    assert [(row["start"], row["end"]) for row in found] == [(0.25, 0.75), (0.5, None)]
    source = lhotse(folder)
    line = {"id": "x", "recording_id": "0", "start": 0.25, "duration": 0.5, "speaker": "s0"}
    json_lines(source / "mine_supervisions_all.jsonl.gz", [line | {"custom": {"emotion": "joy"}}])
    found = list_corpus(str(source)).manifest.to_pylist()
    assert [(row["start"], row["end"]) for row in found] == [(0.25, 0.75)]


def test_columns_with_other_names_are_found_with_the_flag(folder: Path) -> None:
    lines = [f"{n};{row[0]};{row[1]};{row[2]};{of}" for n, (row, of) in
             enumerate(zip(rows(), SIDES, strict=True))]  # fmt: skip
    (folder / "t.csv").write_text("\n".join(["path;clip;Mood;who;part", *lines]))
    words = ("path=clip", "label=mood", "speaker=who", "split=part")
    found = list_corpus(str(folder / "t.csv"), columns=column_names(words)).manifest.to_pylist()
    assert [(row["emotion"], row["speaker"], row["split"]) for row in found] == [
        (row[1], row[2], of) for row, of in zip(rows(), SIDES, strict=True)
    ]
    assert {row["status"] for row in found} == {None}
    with pytest.raises(CorpusError, match="has no column voice, which --columns names as speaker"):
        list_corpus(str(folder / "t.csv"), columns={"speaker": "voice"})
    for word in ("mood", "label=", "emotion=mood"):
        with pytest.raises(ConfigError, match=f"columns is {word}: it must be one of path,label"):
            PrepareConfig(corpus="t.csv", columns=(word,))


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (kaldi, ("kaldi/wav.scp", "u0 sox a.wav -t wav - |\n"), "u0 is a command"),
        (emobox, ("data/mine.jsonl", "[1]\n"), "cannot be read .line 1 is not a JSON object"),
        (emobox, ("data/mine.jsonl", "{\n"), "cannot be read .Expecting property name"),
        (
            emobox,
            ("data/mine.jsonl", '{"wav": "a.wav", "emo": "x", "fold": "1"}\n'),
            "no column speaker.*; if no speaker is in two parts .* --columns speaker=fold",
        ),
        (hugging_face, ("hf/data/test-00000-of-00001.parquet", "no"), "the table cannot be read"),
    ],
)
def test_an_unreadable_corpus_is_an_error_in_one_line(
    folder: Path, make: Callable[[Path], Path], spoil: tuple[str, str], message: str
) -> None:
    source = make(folder)
    (folder / spoil[0]).write_text(spoil[1])
    with pytest.raises(CorpusError, match=message):
        list_corpus(str(source))


def test_lhotse_without_recordings_and_audformat_without_its_package(folder: Path) -> None:
    source = lhotse(folder)
    (source / "mine_recordings_all.jsonl.gz").unlink()
    with pytest.raises(CorpusError, match=r"but not mine_recordings_all.jsonl.gz with its"):
        list_corpus(str(source))
    if importlib.util.find_spec("audformat") is None:
        (folder / "db.yaml").write_text("name: mine\n")
        with pytest.raises(CorpusError, match="needs the package audformat: pip install audformat"):
            list_corpus(str(folder))
