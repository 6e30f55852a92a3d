"""The recordings of a folder or pattern are listed, and all other files are counted."""

import os
import unicodedata
from pathlib import Path

import pytest

from ser_ray.corpus.audio_files import AUDIO_SUFFIXES, describe_left_out, list_audio
from ser_ray.errors import ConfigError, CorpusError


def test_folders_patterns_and_names_list_their_files(tmp_path):
    for name in ("b.wav", "a.MP4", "notes.txt", ".hidden.wav", "sub/c.flac", "sub/deep/d.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = {
        ".": "a.MP4 b.wav sub/c.flac sub/deep/d.wav",
        "notes.txt": "notes.txt",
        "*": "a.MP4 b.wav",
        "*.wav": "b.wav",
        "**/*.wav": "b.wav sub/deep/d.wav",
        "sub/*": "sub/c.flac",
        "s?b/**/?.wav": "sub/deep/d.wav",
    }
    for source, expected in names.items():
        found = list_audio([f"{tmp_path}/{source}"]).files
        inside = [Path(file).relative_to(tmp_path).as_posix() for file in found]
        assert sorted(inside) == expected.split(), source
    twice = list_audio([f"{tmp_path}/b.wav", f"{tmp_path}/*.wav"]).files
    assert len(twice) == 1


def test_a_file_that_is_given_in_several_spellings_is_listed_once(in_tmp):
    (in_tmp / "a.wav").touch()
    assert list_audio(["a.wav", ".", "./a.wav", str(in_tmp / "a.wav")]).files == ["a.wav"]


def test_a_pattern_may_be_a_uri():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe({"/clips/x/1.wav": b"", "/clips/x/2.mp3": b"", "/clips/y/3.wav": b""})
    assert list_audio(["memory://clips/*/*.wav"]).files == [
        "memory://clips/x/1.wav",
        "memory://clips/y/3.wav",
    ]


@pytest.mark.parametrize("source", ["nowhere.wav", "*.ogg", "empty", "no/such/**"])
def test_a_source_without_recordings_is_an_error_that_names_it(source, in_tmp):
    (in_tmp / "empty").mkdir()
    with pytest.raises(CorpusError, match=source.replace("*", r"\*")):
        list_audio([source])


def test_an_empty_name_is_not_the_current_folder(in_tmp):
    """It is what a shell makes of a variable that is not set."""
    for sources in ([], [""], ["clip.wav", ""]):
        with pytest.raises(CorpusError, match="no files given"):
            list_audio(sources)


def test_recordings_of_every_device_are_listed_and_other_files_are_counted(tmp_path):
    theirs = [
        ".oga",
        ".3gp",
        ".aif",
        ".caf",
        ".mka",
        ".m4b",
        ".m4v",
        ".mp2",
        ".mpga",
        ".mpeg",
        ".spx",
        ".AMR",
        ".flv",
        ".wv",
    ]
    for suffix in (*theirs, ".txt", ".TXT", ".zip", ""):
        (tmp_path / f"x{len(list(tmp_path.iterdir()))}{suffix}").touch()
    found = list_audio([str(tmp_path)])
    assert {Path(file).suffix for file in found.files} == set(theirs)
    assert {suffix.lower() for suffix in theirs} <= AUDIO_SUFFIXES
    assert describe_left_out(found.left_out) == (
        "left out because of their suffixes: 2 .txt, 1 .zip, 1 without suffix; "
        "unpack archives to use the files in them"
    )
    (tmp_path / "only" / "texts").mkdir(parents=True)
    (tmp_path / "only" / "texts" / "a.txt").touch()
    with pytest.raises(CorpusError, match=r"no audio or video file .*1 \.txt"):
        list_audio([str(tmp_path / "only")])


def test_files_with_a_shared_suffix_are_recognised_by_their_content(tmp_path):
    packets = b"".join(b"G" + bytes(187) for _ in range(4))
    (tmp_path / "film.ts").write_bytes(packets)
    (tmp_path / "camera.MTS").write_bytes(b"".join(bytes(4) + b"G" + bytes(187) for _ in range(4)))
    (tmp_path / "page.ts").write_text("Greeting = 'hello'\n" * 20)
    (tmp_path / "empty.ts").touch()
    for source in (tmp_path, tmp_path / "*", tmp_path / "*.[tTmM]*"):
        found = list_audio([str(source)])
        assert [Path(file).name for file in found.files] == ["camera.MTS", "film.ts"], source
        assert found.left_out == {".ts": 2}


def test_a_name_that_is_not_utf8_is_reported(tmp_path):
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/bad-\xff.wav")
    Path(bad).touch()
    shown = f"{tmp_path}/bad-\\xff.wav"
    for source in (bad, str(tmp_path), f"{tmp_path}/*.wav"):
        found = list_audio([source])
        assert found.files == [shown]
        assert found.problems == {shown: "the path is not UTF-8; rename the file or folder"}
    with pytest.raises(ConfigError, match="not UTF-8"):
        list_audio([bad.replace("bad", "gone")])


def test_names_are_found_in_either_form_of_unicode(tmp_path):
    stored = unicodedata.normalize("NFD", f"{tmp_path}/café 100%#1\n.wav")
    Path(stored).touch()
    for form in ("NFC", "NFD"):
        for name in ("café 100%#1\n.wav", "café*.wav"):
            source = unicodedata.normalize(form, f"{tmp_path}/{name}")
            assert list_audio([source]).files == [stored]
