"""The corpora of other tools name the same clips as a plain table."""

import gzip
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ser_ray.corpus.manifest import list_corpus
from ser_ray.errors import ConfigError, CorpusError
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
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


def hugging_face_folders(folder: Path) -> Path:
    """A folder a split, and another name for the recordings, beside a path that is long gone."""
    for file in (hugging_face(folder) / "data").iterdir():
        table = pq.read_table(file)
        gone = pa.array([f"/gone/{n}.wav" for n in range(len(table))])
        told = table.schema.metadata
        table = table.rename_columns({"audio": "speech"}).append_column("path", gone)
        side = file.name.partition("-")[0]
        (folder / "hf" / "default" / side).mkdir(parents=True)
        target = folder / "hf" / "default" / side / "0000.parquet"
        pq.write_table(table.replace_schema_metadata(told), target, row_group_size=1)
    return folder / "hf" / "default"


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


def lhotse_cuts(folder: Path) -> Path:
    """One cut for each recording, with one supervision, and a folder of nothing else."""
    source = lhotse(folder)
    files = [source / f"mine_{name}_all.jsonl.gz" for name in ("recordings", "supervisions")]
    recordings, supervisions = (
        [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
        for file in files
    )
    for recording, supervision, side in zip(recordings, supervisions, SIDES, strict=True):
        cut = {"id": supervision["id"], "start": 0.0, "duration": recording["duration"]}
        cut |= {"supervisions": [supervision], "recording": recording, "type": "MonoCut"}
        name = f"cuts_{'dev' if side == 'validation' else side}.jsonl.gz"
        old = folder / "cuts" / name
        before = gzip.decompress(old.read_bytes()).splitlines() if old.exists() else []
        json_lines(old, [*map(json.loads, before), cut])
    return folder / "cuts"


def kaldi(folder: Path, name: str = "kaldi", chosen: Sequence[int] = range(NUM_CLIPS)) -> Path:
    target = folder / name
    target.mkdir(parents=True)
    for column, file in enumerate(("wav.scp", "utt2emo", "utt2spk")):
        lines = [f"u{n} {row[column]}\n" for n, row in enumerate(rows()) if n in chosen]
        (target / file).write_text("".join(lines))
    (target / "text").write_text("".join(f"u{n} some words\n" for n in chosen))
    return target


def kaldi_sides(folder: Path) -> Path:
    for side in dict.fromkeys(SIDES):
        name = "dev" if side == "validation" else side
        kaldi(folder, f"sets/{name}", [n for n in range(NUM_CLIPS) if SIDES[n] == side])
    return folder / "sets"


def nkululeko_sides(folder: Path) -> Path:
    """The files of a folder of nkululeko, in which a table of all clips is beside the sides."""
    lines = [f"{path},{speaker},female,30,{label}" for path, label, speaker in rows()]
    for side in ("", *dict.fromkeys(SIDES)):
        name = f"mine_{side}.csv" if side else "mine.csv"
        chosen = [line for line, of in zip(lines, SIDES, strict=True) if side in ("", of)]
        (folder / name).write_text("\n".join(["file,speaker,gender,age,emotion", *chosen]))
    return folder


def hugging_face_metadata(folder: Path) -> Path:
    lines = [",".join(row) for row in rows()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,label,speaker", *lines]))
    return folder


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
    hugging_face_folders: [*SIDES],
    hugging_face_paths: [None] * 4,
    hugging_face_metadata: [None] * 4,
    lhotse: [None] * 4,
    lhotse_cuts: [*SIDES],
    kaldi: [None] * 4,
    kaldi_sides: [*SIDES],
    nkululeko_sides: [*SIDES],
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
    if make not in (lhotse, lhotse_cuts):  # they have absolute paths
        assert not any(str(folder) in row["take"] for row in found)


def test_files_of_kaldi_may_begin_with_a_byte_order_mark(folder: Path) -> None:
    source = kaldi(folder)
    expected = list_corpus(str(source)).manifest
    for name in ("wav.scp", "utt2emo"):
        (source / name).write_text((source / name).read_text(), "utf-8-sig")
    assert list_corpus(str(source)).manifest.equals(expected)


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


def test_a_supervision_in_a_cut_has_the_times_of_the_recording(folder: Path) -> None:
    """It starts in the cut, which starts in the recording, and ends with the cut at the latest."""
    source = lhotse_cuts(folder)
    file = source / "cuts_train.jsonl.gz"
    cut = json.loads(gzip.decompress(file.read_bytes()).splitlines()[0])
    [supervision] = cut["supervisions"]
    cut |= {"start": 0.25, "duration": 0.5}
    for start, duration in ((-0.125, 0.25), (0.125, 0.25), (0.25, 0.5)):
        cut["supervisions"] = [supervision | {"start": start, "duration": duration}]
        found = list_corpus(str(json_lines(file, [cut]))).manifest.to_pylist()
        end = min(0.25 + start + duration, 0.75)
        assert [(row["start"], row["end"]) for row in found] == [(0.25 + max(start, 0), end)]
    del cut["type"]
    json_lines(file, [cut | {"type": "MixedCut", "tracks": []}])
    with pytest.raises(CorpusError, match=r"the cut 0-0 is a mixture of several recordings"):
        list_corpus(str(file))


def test_the_recordings_of_one_lhotse_file_are_found_beside_it(folder: Path) -> None:
    source = lhotse(folder)
    whole = list_corpus(str(source)).manifest
    assert list_corpus(str(source / "mine_supervisions_all.jsonl.gz")).manifest.equals(whole)


def test_tables_in_a_folder_that_are_no_side_are_named(folder: Path) -> None:
    [note] = list_corpus(str(nkululeko_sides(folder))).notes
    assert note.endswith("mine_train.csv, mine_validation.csv were read, and mine.csv were not")


def test_rows_without_a_recording_are_outcomes(folder: Path) -> None:
    file = hugging_face(folder) / "data" / "train-00000-of-00001.parquet"
    table = pq.read_table(file)
    empty = pa.array([{"bytes": None, "path": "a.wav"}], table["audio"].type)
    audio = pa.chunked_array([empty, table["audio"].combine_chunks()[1:]])
    pq.write_table(table.set_column(0, "audio", audio), file)
    found = list_corpus(str(file)).manifest.to_pylist()
    with pytest.raises(ClipError, match="the row has no recording"):
        decode(found[0]["path"])
    assert len(decode(found[1]["path"]).samples)


@pytest.mark.filterwarnings("ignore")
def test_pickles_and_code_in_a_folder_of_audformat_are_not_run(folder: Path) -> None:
    source = audformat(folder)
    wanted = list_corpus(str(source)).manifest
    for side in dict.fromkeys(SIDES):
        (source / f"db.{side}.pkl").write_bytes(b"not a pickle")  # newer than the other file
    assert list_corpus(str(source)).manifest.equals(wanted)
    mark, header = folder / "mark", source / "db.yaml"
    plain = header.read_text()
    header.write_text(f"{plain}\nmeta: !!python/object/apply:os.mkdir ['{mark}']\n")
    with pytest.raises(CorpusError, match=r"db.yaml: is not an audformat header with plain"):
        list_corpus(str(source))
    assert not mark.exists()
    header.write_text(plain)
    (source / "db.test.csv").unlink()
    with pytest.raises(CorpusError, match="its table test exists only as a pickle"):
        list_corpus(str(source))


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
        with pytest.raises(ConfigError, match=f"columns is {word}: it must be COLUMN=NAME, as in"):
            PrepareConfig(corpus="t.csv", columns=(word,))


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (kaldi, ("kaldi/wav.scp", "u0 sox a.wav -t wav - |\n"), "u0 is the output of a command"),
        (hugging_face, ("hf/dataset_dict.json", "{}"), "was written by save_to_disk"),
        (emobox, ("data/mine.jsonl", "[1]\n"), "cannot be read .line 1 is not a JSON object"),
        (emobox, ("data/mine.jsonl", "{\n"), "cannot be read .line 1 is not a JSON object"),
        (
            emobox,
            ("data/mine.jsonl", '{"wav": "a.wav", "emo": "x", "fold": "1"}\n'),
            "no column speaker.* If no speaker is in two parts .* --columns speaker=fold",
        ),
        (
            emobox_folds,
            ("folds/fold_1/mine_train_fold_1.jsonl", '{"wav": "a.wav", "emo": "x", "spk": "1"}\n'),
            "mine_train_fold_1.jsonl: a row has no key",
        ),
        (
            lhotse_cuts,
            (
                "cuts/cuts_test.jsonl",
                '{"id": "c", "start": 0, "duration": 1, "recording": "x", "supervisions": '
                '[{"id": "s", "start": 0, "duration": 1, "speaker": "1"}]}\n',
            ),
            "the table cannot be read .its content is damaged",
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


def test_transcripts_are_not_taken_for_labels(folder: Path) -> None:
    source = kaldi(folder)
    (source / "utt2emo").rename(source / "utt2mood")
    with pytest.raises(CorpusError, match=r"hold transcripts, such as 'some words'; name the file"):
        list_corpus(str(source))
    found = list_corpus(str(source), columns={"label": "utt2mood"})
    assert found.labels == tuple(sorted(LABELS))


def test_a_command_of_lhotse_is_not_run(folder: Path) -> None:
    source = lhotse(folder)
    file = source / "mine_recordings_all.jsonl.gz"
    lines = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    lines[1]["sources"][0] |= {"type": "command", "source": "touch mark"}
    json_lines(file, lines)
    with pytest.raises(CorpusError, match="lhotse: 1 is the output of a command, and commands"):
        list_corpus(str(source))


def test_lhotse_without_recordings_and_audformat_without_its_package(folder: Path) -> None:
    source = lhotse(folder)
    (source / "mine_recordings_all.jsonl.gz").unlink()
    with pytest.raises(CorpusError, match=r"but not mine_recordings_all.jsonl.gz with its"):
        list_corpus(str(source))
    if importlib.util.find_spec("audformat") is None:
        (folder / "db.yaml").write_text("name: mine\n")
        with pytest.raises(CorpusError, match="needs the package audformat; run"):
            list_corpus(str(folder))


@pytest.mark.parametrize("outer", [".", "data"])
def test_paths_start_at_the_folder_of_their_table(tmp_path: Path, outer: str) -> None:
    """As in Hugging Face's folders of recordings, with a table in the folder of each part."""
    for part, label in (("train", "joy"), ("test", "anger")):
        part_folder = tmp_path / outer / part
        part_folder.mkdir(parents=True)
        (part_folder / "1.wav").touch()
        text = f"file_name,label,speaker\n1.wav,{label},{part}\n"
        (part_folder / "metadata.csv").write_text(text)
    found = list_corpus(str(tmp_path)).manifest.to_pylist()
    below = "" if outer == "." else f"{outer}/"
    assert [(row["path"], row["take"], row["emotion"], row["split"]) for row in found] == [
        (f"{tmp_path}/{below}test/1.wav", f"{below}test/1", "anger", "test"),
        (f"{tmp_path}/{below}train/1.wav", f"{below}train/1", "joy", "train"),
    ]
    assert [row["status"] for row in found] == [None, None]


def test_the_parts_of_a_corpus_may_have_other_columns_and_types(tmp_path: Path) -> None:
    for name in ("1.wav", "2.wav", "3.wav"):
        (tmp_path / name).touch()
    one = pa.table({"file": ["1.wav"], "emotion": ["x"], "speaker": [1]})
    two = pa.table({"wav": ["2.wav"], "label": ["y"], "spk": ["2"]})
    pq.write_table(one, tmp_path / "train-0.PARQUET")
    pq.write_table(two, tmp_path / "test-0.parquet")
    (tmp_path / "._test-0.parquet").write_bytes(b"of macOS")
    found = list_corpus(str(tmp_path)).manifest.to_pylist()
    assert [(row["emotion"], row["speaker"], row["split"]) for row in found] == [
        ("x", "1", "train"),
        ("y", "2", "test"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("wav.scp", b"u1\nu2 2.wav\n", "wav.scp has no path for u1"),
        ("wav.scp", b"u1 1.wav\nu1 3.wav\nu2 2.wav\n", "wav.scp has two values for u1"),
        ("utt2emo", b"u1 x\nu2 y\nu2 z\n", "utt2emo has two values for u2"),
        ("utt2emo", "u1 é\nu2 y\n".encode("cp1252"), "utt2emo is not text in UTF-8"),
        ("segments", b"s1 u1 0\n", "segments has no recording, start and end for s1"),
        ("segments", b"s1 u3 0 1\n", "wav.scp has no path for u3"),
    ],
)
def test_no_line_of_kaldi_is_lost(tmp_path: Path, name: str, text: bytes, reason: str) -> None:
    files = {"wav.scp": b"u1 1.wav\nu2 2.wav\n", "utt2spk": b"u1 a\nu2 b\n", "utt2emo": b"u1 x\n"}
    for file, content in (files | {name: text}).items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(f"({reason})")):
        list_corpus(str(tmp_path))


def test_a_missing_value_in_a_folder_of_tables_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a_train.csv").write_text("file,emotion,speaker\n1.wav,x,1\n")
    (tmp_path / "a_test.csv").write_text("file,emotion,speaker\n2.wav,,2\n")
    with pytest.raises(CorpusError, match=r"has no label, for 2\.wav"):
        list_corpus(str(tmp_path))


def test_a_label_in_a_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "1.wav", "label": ["x"], "speaker": 1}\n')
    with pytest.raises(CorpusError, match="the column label has values that are not texts"):
        list_corpus(str(tmp_path / "t.jsonl"))
