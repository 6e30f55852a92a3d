"""RAVDESS is listed from any layout and other corpora from tables; errors name what is wrong."""

import itertools
import os
import random
import uuid
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from ser_ray.corpus import manifest as manifest_module
from ser_ray.corpus.manifest import MANIFEST_SCHEMA, exclude, list_corpus
from ser_ray.corpus.ravdess.census import compare_with_ravdess, expected_ravdess
from ser_ray.corpus.ravdess.names import EMOTIONS, EXAMPLE_NAME
from ser_ray.errors import CorpusError
from ser_ray.storage.paths import NOT_UTF8, filesystem_of
from tests.s3_server import s3_bucket


def ravdess_codes():
    """The fields of the 7356 names, from the corpus's description."""
    for modality, actor in itertools.product(("01", "02", "03"), range(1, 25)):
        for channel, emotions in (("01", range(1, 9)), ("02", range(1, 7))):
            if (channel, actor) == ("02", 18):
                continue
            for emotion, strength, statement, again in itertools.product(
                emotions, (1, 2), (1, 2), (1, 2)
            ):
                if (emotion, strength) != (1, 2):
                    rest = (emotion, strength, statement, again, actor)
                    yield (modality, channel, *(f"{code:02d}" for code in rest))


def name_of(codes):
    return "-".join(codes) + (".wav" if codes[0] == "03" else ".mp4")


def zenodo(codes):
    """The folders of Zenodo's zips, all unpacked into one place."""
    channel = {"01": "Speech", "02": "Song"}[codes[1]]
    if codes[0] == "03":
        return f"Audio_{channel}_Actors_01-24/Actor_{codes[6]}/{name_of(codes)}"
    return f"Video_{channel}_Actor_{codes[6]}/Actor_{codes[6]}/{name_of(codes)}"


LAYOUTS = {
    "zenodo": zenodo,
    "flat": name_of,
    "uppercase": lambda codes: f"Actor_{codes[6]}/{name_of(codes).upper()}",
    "deep": lambda codes: f"data/v1.0/RAVDESS/raw/{codes[1]}/{codes[0]}/{name_of(codes)}",
}


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def statuses(corpus):
    return Counter(corpus.manifest["status"].to_pylist())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_complete_corpus_is_recognised_in_every_layout(tmp_path, layout):
    codes = list(ravdess_codes())
    assert len(codes) == 7356
    touch(tmp_path, *map(LAYOUTS[layout], codes))
    touch(tmp_path, ".DS_Store", "Actor_01/._03-01-01-01-01-01-01.wav", "readme.txt")
    touch(tmp_path, "__MACOSX/Actor_01/03-01-01-01-01-01-01.wav", "Actor_01/Thumbs.db")
    corpus = list_corpus(str(tmp_path))
    assert corpus.name == "ravdess"
    assert corpus.labels == EMOTIONS
    assert corpus.manifest.schema.equals(MANIFEST_SCHEMA)
    rows = corpus.manifest.to_pylist()
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    by_path = {row["path"]: row for row in rows if row["status"] is None}
    assert len(by_path) == 7356
    for modality, channel, emotion, strength, statement, again, actor in codes:
        fields = (modality, channel, emotion, strength, statement, again, actor)
        row = by_path.pop(str(tmp_path / LAYOUTS[layout](fields)))
        assert row["modality"] == {"01": "av", "02": "video", "03": "audio"}[modality]
        assert row["channel"] == {"01": "speech", "02": "song"}[channel]
        assert row["emotion"] == EMOTIONS[int(emotion) - 1]
        assert row["intensity"] == {"01": "normal", "02": "strong"}[strength]
        assert (row["statement"], row["repetition"]) == (int(statement), int(again))
        assert (row["speaker"], row["sex"]) == (actor, ("female", "male")[int(actor) % 2])
        assert row["take"] == "-".join(fields[1:])
        assert row["size"] == 0
    lines = compare_with_ravdess(corpus.manifest).splitlines()
    assert lines[0] == "7356 of the 7356 files of RAVDESS"
    assert [line.partition(": all ")[2] for line in lines[1:]] == ["1440", "1012"] * 3
    assert statuses(corpus) == {None: 7356}


def test_the_shallower_copy_of_the_kaggle_archive_is_kept(tmp_path):
    speech = [codes for codes in ravdess_codes() if codes[:2] == ("03", "01")]
    for codes in speech:
        inside = f"Actor_{codes[6]}/{name_of(codes)}"
        touch(tmp_path, inside, f"audio_speech_actors_01-24/{inside}")
    corpus = list_corpus(str(tmp_path))
    assert statuses(corpus) == {None: 1440, "duplicate": 1440}
    for row in corpus.manifest.to_pylist():
        is_copy = "audio_speech_actors_01-24" in row["path"]
        assert (row["status"] == "duplicate") == is_copy
        if is_copy:
            original = row["path"].replace("audio_speech_actors_01-24/", "")
            assert row["reason"] == f"has the file name of {original}"
    text = compare_with_ravdess(corpus.manifest)
    assert "audio speech: all 1440\n" in text
    assert "1440 doubled: " in text


def test_the_shallower_copy_is_kept_wherever_its_path_sorts(tmp_path):
    touch(tmp_path, "a/a/03-01-02-01-01-01-01.wav", "b/03-01-02-01-01-01-01.wav")
    deeper, shallower = list_corpus(str(tmp_path)).manifest.to_pylist()
    assert (deeper["status"], shallower["status"]) == ("duplicate", None)


def test_the_first_of_equally_deep_copies_is_kept_and_case_is_ignored(tmp_path):
    touch(tmp_path, "b/03-01-02-01-01-01-01.wav", "a/03-01-02-01-01-01-01.WAV")
    first, second = list_corpus(str(tmp_path)).manifest.to_pylist()
    assert first["path"].endswith("a/03-01-02-01-01-01-01.WAV")
    assert (first["status"], second["status"]) == (None, "duplicate")


def test_a_copy_that_can_be_opened_is_preferred_to_one_that_cannot(tmp_path):
    touch(tmp_path, "deep/er/03-01-02-01-01-01-01.wav")
    (tmp_path / "03-01-02-01-01-01-01.wav").symlink_to("nowhere")
    link, clip = list_corpus(str(tmp_path)).manifest.to_pylist()
    assert (link["status"], link["reason"]) == ("unreadable", "a link to nothing")
    assert link["take"] == clip["take"]
    assert clip["status"] is None


def test_every_entry_named_like_a_clip_is_a_row(tmp_path):
    touch(tmp_path, "03-01-02-01-01-01-01.wav", "song.wav", "03-01-01-02-01-01-01.wav")
    (tmp_path / "03-01-02-01-01-01-02.wav").mkdir()
    os.mkfifo(tmp_path / "03-01-02-01-01-01-03.wav")
    rows = list_corpus(str(tmp_path)).manifest.to_pylist()
    answers = {Path(row["path"]).name: (row["status"], row["reason"]) for row in rows}
    assert answers == {
        "03-01-02-01-01-01-01.wav": (None, None),
        "03-01-02-01-01-01-02.wav": ("unreadable", "a folder, not a file"),
        "03-01-02-01-01-01-03.wav": ("unreadable", "a device or pipe, not a file"),
        "03-01-01-02-01-01-01.wav": ("name_not_understood", "neutral has no strong intensity"),
        "song.wav": (
            "name_not_understood",
            "not seven two-digit numbers joined by hyphens, as in 03-01-06-01-02-01-12.wav",
        ),
    }


def test_the_manifest_does_not_depend_on_the_order_of_the_listing(tmp_path, monkeypatch):
    names = [name_of(codes) for codes in ravdess_codes() if codes[6] == "07"]
    touch(tmp_path, *names, *(f"copy/{name}" for name in names))
    whole = list_corpus(str(tmp_path)).manifest
    files = list(manifest_module.list_files(str(tmp_path)))
    random.Random(0).shuffle(files)
    monkeypatch.setattr(manifest_module, "list_files", lambda _: iter(files))
    assert list_corpus(str(tmp_path)).manifest.equals(whole)


def test_thousands_of_links_are_listed(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"abcd")
    corpus = tmp_path / "corpus"
    names = [name_of(codes) for codes in ravdess_codes()]
    for place in range(8_000):
        folder = corpus / f"{place // len(names)}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[place % len(names)]).symlink_to(target)
    listed = list_corpus(str(corpus))
    assert statuses(listed) == {None: 7356, "duplicate": 8_000 - 7356}
    assert set(listed.manifest["size"].to_pylist()) == {4}


def test_a_bucket_is_listed_like_a_folder(tmp_path):
    names = ["Actor_01/03-01-02-01-01-01-01.wav", "Actor 02/01-01-02-01-01-01-02.MP4", "x.wav"]
    touch(tmp_path, *names)
    local = list_corpus(str(tmp_path)).manifest
    with s3_bucket("corpora") as uri:
        for root in (uri.format("ravdess"), f"memory://{uuid.uuid4().hex}"):
            filesystem, path = filesystem_of(root)
            for name in names:
                filesystem.create_dir(f"{path}/{name}".rpartition("/")[0])
                filesystem.open_output_stream(f"{path}/{name}").close()
            remote = list_corpus(root).manifest
            places = ["path", "modified"]
            assert remote.drop_columns(places).equals(local.drop_columns(places))
            for location in remote["path"].to_pylist():
                filesystem, path = filesystem_of(location)
                assert filesystem.get_file_info(path).is_file


def test_the_synthetic_corpus_is_never_called_ravdess(tmp_path):
    touch(tmp_path, "Actor_01/03-01-02-01-01-01-01.wav", "SYNTHETIC.txt")
    assert list_corpus(str(tmp_path)).name == "synthetic"


def test_without_a_clip_the_error_says_what_was_found_and_what_is_needed(tmp_path):
    with pytest.raises(CorpusError, match=r"found: no files.*03-01-06-01-02-01-12\.wav"):
        list_corpus(str(tmp_path))
    touch(tmp_path, "Audio_Speech_Actors_01-24.zip", "Audio_Song_Actors_01-24.ZIP", "LICENCE")
    with pytest.raises(CorpusError, match=r"2 \.zip, 1 without suffix; unpack archives"):
        list_corpus(str(tmp_path))
    touch(tmp_path, "happy_1.wav")
    with pytest.raises(CorpusError, match=r"1 recordings; the first is .*happy_1\.wav \(not seven"):
        list_corpus(str(tmp_path))
    with pytest.raises(CorpusError, match="this folder or table does not exist"):
        list_corpus(str(tmp_path / "elsewhere"))
    with pytest.raises(CorpusError, match=r"neither a folder nor a table"):
        list_corpus(str(tmp_path / "Audio_Speech_Actors_01-24.zip"))


def test_synthetic_clips_among_others_are_refused(tmp_path):
    touch(tmp_path, "synthetic/SYNTHETIC.txt", "synthetic/Actor_01/03-01-02-01-01-01-01.wav")
    touch(tmp_path, "ravdess/03-01-02-01-01-01-02.wav")
    assert list_corpus(str(tmp_path / "synthetic" / "Actor_01")).name == "synthetic"
    assert list_corpus(str(tmp_path / "ravdess")).name == "ravdess"
    with pytest.raises(CorpusError, match=r"its folder .*synthetic has synthetic clips"):
        list_corpus(str(tmp_path))


def test_a_folder_on_a_disk_that_is_not_mounted_is_an_error(tmp_path):
    touch(tmp_path, "Actor_01/03-01-02-01-01-01-01.wav")
    (tmp_path / "Actor_02").symlink_to("/mnt/unmounted/Actor_02")
    with pytest.raises(
        CorpusError, match=r"Actor_02: a link to nothing; if this should be a folder"
    ):
        list_corpus(str(tmp_path))


def test_the_largest_copy_is_kept(tmp_path):
    name = "03-01-02-01-01-01-01.wav"
    touch(tmp_path, name, f"copy/{name}", f"copy/again/{name}")
    (tmp_path / "copy" / name).write_bytes(b"whole")
    (tmp_path / name).write_bytes(b"cut")
    rows = list_corpus(str(tmp_path)).manifest.to_pylist()
    kept = [row["path"] for row in rows if row["status"] is None]
    assert kept == [str(tmp_path / "copy" / name)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("s3://key:secret@bucket/a.wav,y,2", r"row 2 .*must not have a password"),
        ("{folder}/a.wav,y,1", r"rows 1 and 2 .* are one clip, '.*a.wav', but their label is"),
    ],
)
def test_a_row_that_must_not_enter_the_shards_is_named(tmp_path, row, message):
    text = "path,label,speaker\na.wav,x,1\n" + row.format(folder=tmp_path) + "\n"
    with pytest.raises(CorpusError, match=message) as caught:
        list_corpus(table(tmp_path, text))
    assert "secret" not in str(caught.value).replace("secret key", "")


def test_excluded_modalities_are_marked_and_other_statuses_are_kept(tmp_path):
    touch(tmp_path, "01-01-02-01-01-01-01.mp4", "02-01-02-01-01-01-01.mp4")
    touch(tmp_path, "03-01-02-01-01-01-01.wav", "copy/01-01-02-01-01-01-01.mp4", "x.mp4")
    listed = list_corpus(str(tmp_path))
    manifest = exclude(listed.manifest, ["audio", "video"])
    assert manifest.schema.equals(MANIFEST_SCHEMA)
    answers = {row["path"][len(str(tmp_path)) + 1 :]: row for row in manifest.to_pylist()}
    assert {path: row["status"] for path, row in answers.items()} == {
        "01-01-02-01-01-01-01.mp4": "excluded",
        "02-01-02-01-01-01-01.mp4": None,
        "03-01-02-01-01-01-01.wav": None,
        "copy/01-01-02-01-01-01-01.mp4": "duplicate",
        "x.mp4": "name_not_understood",
    }
    assert answers["01-01-02-01-01-01-01.mp4"]["reason"] == "only audio,video is included"
    assert exclude(listed.manifest, ["audio", "av", "video"]).equals(listed.manifest)


# --- what RAVDESS should hold ---


def test_the_expected_files_are_those_of_the_description():
    names = ["-".join(codes) for codes in ravdess_codes()]
    ours = [
        f"{('av', 'video', 'audio').index(clip.modality) + 1:02d}-{clip.take}"
        for clip in expected_ravdess()
    ]
    assert sorted(ours) == sorted(names)


def test_missing_doubled_and_unexpected_files_are_named(tmp_path):
    speech = [codes for codes in ravdess_codes() if codes[:2] == ("03", "01")]
    kept = [codes for codes in speech if codes[6] not in ("05", "11") and codes[2] != "07"]
    kept += [codes for codes in speech if codes[2] == "07" and codes[6] not in ("05", "09", "11")]
    touch(tmp_path, *map(name_of, kept), "copy/03-01-01-01-01-01-01.wav")
    touch(tmp_path, "03-02-02-01-01-01-18.wav", "whisper.wav")
    assert compare_with_ravdess(list_corpus(str(tmp_path)).manifest).splitlines() == [
        "1312 of the 7356 files of RAVDESS",
        "av speech: none of 1440",
        "av song: none of 1012",
        "video speech: none of 1440",
        "video song: none of 1012",
        "audio speech: 1312 of 1440; actors 05, 11 absent; actor 09 lacks 8: "
        "03-01-07-01-01-01-09.wav, 03-01-07-01-01-02-09.wav, 03-01-07-01-02-01-09.wav and 5 more",
        "audio song: none of 1012",
        "1 doubled: 03-01-01-01-01-01-01.wav",
        f"2 unexpected: {tmp_path / '03-02-02-01-01-01-18.wav'}, {tmp_path / 'whisper.wav'}",
    ]


# --- own corpora ---


def table(folder, text, name="table.csv"):
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def test_a_table_names_files_labels_and_speakers(tmp_path):
    elsewhere = tmp_path / "elsewhere" / "d.webm"
    touch(tmp_path, "clips/a.flac", "clips/b.mp3", "elsewhere/d.webm")
    source = table(
        tmp_path,
        "note,label,speaker,path\n"
        "x,calm ,01,clips/a.flac\n"
        "y,angry,02,./clips/b.mp3\n"
        '"z, z",calm,01,s3://bucket/c.ogg\n'
        f"z,42,anna,{elsewhere}\n",
    )
    corpus = list_corpus(source)
    assert (corpus.name, corpus.root) == ("table", source)
    assert corpus.labels == ("42", "angry", "calm")
    assert corpus.manifest.schema.equals(MANIFEST_SCHEMA)
    assert [
        [row[name] for name in ("path", "size", "emotion", "speaker", "take", "status")]
        for row in corpus.manifest.to_pylist()
    ] == [
        [str(tmp_path / "clips/a.flac"), 0, "calm", "01", "clips/a", None],
        [str(tmp_path / "clips/b.mp3"), 0, "angry", "02", "clips/b", None],
        [str(elsewhere), 0, "42", "anna", "elsewhere/d", None],
        ["s3://bucket/c.ogg", None, "calm", "01", "s3://bucket/c", None],
    ]
    assert set(corpus.manifest["modality"].to_pylist()) == {"audio"}
    for column in ("channel", "intensity", "statement", "repetition", "sex"):
        assert corpus.manifest[column].null_count == 4


def test_a_table_reads_alike_from_csv_parquet_and_a_bucket(tmp_path):
    columns = {
        "path": ["b.wav", "a.wav", "c.wav"],
        "label": pa.array(["yes", "no", "yes"]).dictionary_encode(),
        "speaker": [7, 8, 7],
        "take": ["t1", "t2", "t1"],
    }
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    pa.parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    text = "\ufeffpath,label,speaker,take\r\nb.wav,yes,7,t1\r\na.wav,no,8,t2\r\nc.wav,yes,7,t1\r\n"
    from_csv = list_corpus(table(tmp_path, text, "t.CSV"))
    assert from_csv.manifest["speaker"].to_pylist() == ["8", "7", "7"]
    assert from_csv.manifest["take"].to_pylist() == ["t2", "t1", "t1"]
    assert list_corpus(str(tmp_path / "t.parquet")).manifest.equals(from_csv.manifest)
    root = f"memory://{uuid.uuid4().hex}"
    filesystem, path = filesystem_of(root)
    filesystem.create_dir(path)
    with filesystem.open_output_stream(f"{path}/t.csv") as file:
        file.write(text.encode())
    remote = list_corpus(f"{root}/t.csv")
    assert remote.manifest["path"].to_pylist() == [f"{root}/{name}.wav" for name in "abc"]
    assert remote.labels == from_csv.labels == ("no", "yes")


def test_a_table_has_one_row_per_listed_file(tmp_path):
    touch(tmp_path, "a.wav", "b.wav")
    (tmp_path / "folder.wav").mkdir()
    source = table(
        tmp_path,
        "path,label,speaker\nb.wav,x,1\na.wav,x,1\n./b.wav,x,1\ngone.wav,y,2\nfolder.wav,y,2\n",
    )
    rows = list_corpus(source).manifest.to_pylist()
    assert [(Path(row["path"]).name, row["status"], row["reason"]) for row in rows] == [
        ("a.wav", None, None),
        ("b.wav", None, None),
        ("b.wav", "duplicate", f"the table lists it before: {tmp_path / 'b.wav'}"),
        ("folder.wav", "unreadable", "a folder, not a file"),
        ("gone.wav", "unreadable", "there is no such file"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.wav,x\n", "no column speaker; .* it has path,label. Use another column"),
        ("a.wav,x,1\n", "no column label, path, speaker; .* it has a.wav,x,1"),
        ("path,Path,label,speaker\na,b,x,1\n", "column path twice, as 'path' and 'Path'"),
        ("path,onset,end,label,speaker\na,0,1,x,1\n", "column onset, so .* segments of files"),
        (
            "path,start,end,label,speaker\na,0,1,x,1\na,2,1,x,1\n",
            r"row 2 .* start 2 and the end 1;",
        ),
        (
            "path,start,end,label,speaker\na,one,1,x,1\n",
            r"row 1 .* start one and the end 1; .*a start before its end",
        ),
        ("path,end,label,speaker\na,-1,x,1\n", r"row 1 .* start of the file and the end -1;"),
        (
            "path,start,end,label,speaker\na,0,1,x,1\na,1,2,y,1\na,0.0,1,y,1\n",
            "rows 1 and 3 .* are one clip, '.*/a 0 1', but their label is 'x' and 'y'",
        ),
        ("path,label,speaker\n", "the table has no rows"),
        ("", "the table is empty"),
        (
            "path,label,speaker\na.wav,x\n",
            "the header row has 3 values, and a row has 2: 'a.wav,x'",
        ),
        ("path,label,speaker\na.wav,x,1\nb.wav, ,1\n", r"row 2 \(after the header\) has no label"),
        ("path,label,speaker\n,x,1\n", "row 1 .* has no path"),
        ("path,label,speaker,take\na.wav,x,1,\n", "row 1 .* has no take"),
        (
            "path,label,speaker,take\na.wav,x,1,t\nb.wav,x,1,t\nc.wav,x,2,t\n",
            r"rows 1 and 3 .* are one take, 't', but their speaker is '1' and '2'",
        ),
        ("path,label,speaker\na.wav,x,1\na.mp3,y,1\n", "one take, 'a', but their label is 'x' and"),
        ("path,label,speaker\na.wav,x,1\n./a.wav,y,1\n", "rows 1 and 2 .* their label is 'x' and"),
    ],
)
def test_a_table_that_contradicts_itself_is_refused_by_row(tmp_path, text, message):
    source = table(tmp_path, text)
    with pytest.raises(CorpusError, match=message) as error:
        list_corpus(source)
    assert source in str(error.value)


@pytest.mark.corpus
@pytest.mark.skipif("SER_RAY_TEST_CORPUS" not in os.environ, reason="needs the real clips")
def test_the_real_speech_clips_are_all_there():
    corpus = list_corpus(os.environ["SER_RAY_TEST_CORPUS"])
    text = compare_with_ravdess(corpus.manifest)
    assert "audio speech: all 1440" in text
    assert "doubled" not in text
    assert "unexpected" not in text


def test_names_that_are_not_utf8_are_rows_with_a_reason(tmp_path):
    (tmp_path / EXAMPLE_NAME).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/03-01-06-01-02-01-11\xff.wav")).touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/train\xff")).mkdir()
    (tmp_path / "@eaDir" / EXAMPLE_NAME).mkdir(parents=True)
    rows = list_corpus(str(tmp_path)).manifest.to_pylist()
    assert [row["reason"] for row in rows] == [NOT_UTF8, None]


def test_a_table_in_a_folder_must_be_given_itself(tmp_path):
    (tmp_path / "mine.csv").write_text("path,label,speaker\na.wav,x,1\n")
    with pytest.raises(CorpusError, match="given by its own path"):
        list_corpus(str(tmp_path))
