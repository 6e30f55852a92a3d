"""Downloads from a local server that imitates the record and its failures."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ser_ray.cli.main import main
from ser_ray.cluster.connect import JOB_CONFIG
from ser_ray.corpus.ravdess import download as downloading
from ser_ray.corpus.ravdess import fetch, unpack
from ser_ray.corpus.ravdess.download import DownloadConfig, download
from ser_ray.errors import ConfigError, CorpusError

SPEECH = "Audio_Speech_Actors_01-24.zip"
SONG = "Audio_Song_Actors_01-24.zip"
CLIP = bytes(range(256)) * 400  # 102,400 bytes


def zip_of(members: dict[str, bytes], **infos: Any) -> bytes:
    """A zip file; `infos` are set on every member's header."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as opened:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            for key, value in infos.items():
                setattr(info, key, value)
            opened.writestr(info, content)
    return buffer.getvalue()


def corpus_zip(channel: int) -> bytes:
    return zip_of({f"Actor_{a:02d}/03-{channel:02d}-01-01-01-01-{a:02d}.wav": CLIP for a in (1, 2)})


class Record(http.server.ThreadingHTTPServer):
    """A Zenodo record: `files` by name, and for each a list of faults, one for each request.

    Faults: "404", "503" and the like; "cut:N" closes the connection after N bytes of the body;
    "ignore range" sends the complete file whatever the request; "other" sends other bytes of the
    same length; "longer" sends more than listed. Without a fault the server behaves.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {SPEECH: corpus_zip(1), SONG: corpus_zip(2)}
        self.acts: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.listing: bytes | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listed(self) -> bytes:
        files = [
            {
                "key": name,
                "size": len(content),
                "checksum": "md5:" + hashlib.md5(content).hexdigest(),
                "links": {"self": f"{self.url}/files/{name}/content"},
            }
            for name, content in self.files.items()
        ]
        return self.listing or json.dumps({"id": 1188976, "files": files}).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    server: Record
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = "record" if self.path == "/api/records/1188976" else self.path.split("/")[2]
        asked = self.headers.get("Range")
        self.server.asked.append((name, asked))
        acts = self.server.acts.get(name, [])
        act = acts.pop(0) if acts else ""
        if act.isdecimal():
            self.send_response(int(act))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = self.server.listed() if name == "record" else self.server.files[name]
        if act == "other":
            content = bytes(len(content))
        if act == "longer":
            content += bytes(10 * fetch.CHUNK_BYTES)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        if asked and act != "ignore range":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if act.startswith("cut:"):
            self.wfile.write(content[: int(act.removeprefix("cut:"))])
            self.close_connection = True
        else:
            try:
                self.wfile.write(content)
            except ConnectionError:  # the client closed the connection
                self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetch, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 1000)
    with Record() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def config_for(record: Record, tmp_path: Path) -> functools.partial[DownloadConfig]:
    return functools.partial(
        DownloadConfig,
        target=str(tmp_path / "ravdess"),
        record_url=f"{record.url}/api/records/1188976",
    )


Configure = functools.partial[DownloadConfig]


def quiet(*_: object) -> None:
    """No progress."""


def content_of(folder: Path) -> dict[str, bytes]:
    """All files in a folder, except the hidden files of ser_ray."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def wanted_content(record: Record, *names: str) -> dict[str, bytes]:
    """Return what Python's zipfile unpacks from the archives."""
    content = {}
    for name in names:
        with zipfile.ZipFile(io.BytesIO(record.files[name])) as opened:
            for member in opened.namelist():
                content[f"{Path(name).stem}/{member}"] = opened.read(member)
    return content


def ranges(record: Record, name: str) -> list[str | None]:
    return [asked for file, asked in record.asked if file == name]


# What is requested


@pytest.mark.parametrize(
    ("parts", "actors", "names"),
    [
        (("speech",), (1,), [SPEECH]),
        (("speech", "song", "speech"), (1,), [SPEECH, SONG]),
        (
            ("video-speech",),
            (2, 18),
            ["Video_Speech_Actor_02.zip", "Video_Speech_Actor_18.zip"],
        ),
        (("video-song",), (17, 18), ["Video_Song_Actor_17.zip"]),
    ],
)
def test_parts_become_the_names_in_the_record(
    parts: Any, actors: tuple[int, ...], names: list[str]
) -> None:
    assert DownloadConfig(parts=parts, actors=actors).archive_names == tuple(names)


def test_all_parts_are_the_49_archives_of_the_record() -> None:
    everything = DownloadConfig(parts=("speech", "song", "video-speech", "video-song"))
    assert len(everything.archive_names) == 1 + 1 + 24 + 23


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("speach",)}, "'speach': it must be one of speech, song"),
        ({"parts": ()}, "no archive matches"),
        ({"parts": ("video-song",), "actors": (18,)}, "actor 18 has no song"),
        ({"actors": (0,)}, "actors 1 to 24"),
        ({"target": "s3://bucket/ravdess"}, "folder on this machine"),
        ({"record_url": "file:///etc/passwd"}, "http"),
    ],
)
def test_invalid_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DownloadConfig(**settings)


def test_a_job_cannot_download_into_the_copy_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB_CONFIG, '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}')
    assert main(["download", "--record-url", "http://127.0.0.1:1"]) == 2
    assert "which Ray deletes after the job" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_importing_the_configuration_imports_nothing_heavy() -> None:
    code = (
        "import sys, ser_ray.corpus.ravdess.download;"
        "sys.exit(any(name in sys.modules for name in ('requests', 'rich', 'numpy', 'zipfile')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A server that behaves


def test_archives_are_fetched_checked_and_unpacked(record: Record, config_for: Configure) -> None:
    config = config_for(parts=("song", "speech"))
    seen: list[tuple[str, float, float]] = []
    folders = download(config, lambda *step: seen.append(step))
    target = Path(config.target)
    assert folders == (target / Path(SONG).stem, target / Path(SPEECH).stem)
    assert content_of(target) == wanted_content(record, SONG, SPEECH)
    for name in (SONG, SPEECH):
        size = len(record.files[name])
        steps = [now[1:] for now in seen if now[0].startswith(name)]
        assert steps[-1] == (size / 1e6, size / 1e6)
        assert sorted(steps) == steps


def test_a_second_download_requests_only_what_is_missing(
    record: Record, config_for: Configure
) -> None:
    first = download(config_for(), quiet)
    record.asked.clear()
    assert download(config_for(), quiet) == first
    assert record.asked == []
    download(config_for(parts=("speech", "song")), quiet)
    assert [name for name, _ in record.asked] == ["record", SONG]


def test_kept_archives_are_identical_to_those_on_the_server(
    record: Record, config_for: Configure
) -> None:
    config = config_for(keep_archives=True)
    (folder,) = download(config, quiet)
    kept = Path(config.target, SPEECH)
    assert kept.read_bytes() == record.files[SPEECH]
    shutil.rmtree(folder)
    record.asked.clear()
    download(config, quiet)
    assert [name for name, _ in record.asked] == ["record"], "the kept archive is used"
    assert content_of(folder).keys() == {"Actor_01/03-01-01-01-01-01-01.wav",
                                         "Actor_02/03-01-01-01-01-01-02.wav"}  # fmt: skip


def test_progress_is_shown_on_standard_error(
    config_for: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    download(config_for(parts=("speech", "song")))
    shown = capsys.readouterr().err.splitlines()
    for name in (SPEECH, SONG):
        assert any(line.startswith(f"{name}: 0.2 of 0.2 MB") for line in shown)


# A server that misbehaves


def test_a_cut_connection_resumes_from_the_last_byte(record: Record, config_for: Configure) -> None:
    record.acts[SPEECH] = ["cut:1000", "cut:5000"]
    (folder,) = download(config_for(), quiet)
    assert ranges(record, SPEECH) == [None, "bytes=1000-", "bytes=6000-"]
    assert content_of(folder.parent) == wanted_content(record, SPEECH)


def test_a_partial_file_of_an_earlier_run_is_resumed(record: Record, config_for: Configure) -> None:
    record.acts[SPEECH] = ["cut:7000"] + ["503"] * fetch.ATTEMPTS
    with pytest.raises(CorpusError, match="the same command resumes where it stopped"):
        download(config_for(), quiet)
    record.asked.clear()
    record.acts.clear()
    download(config_for(), quiet)
    assert ranges(record, SPEECH) == ["bytes=7000-"]


def test_a_server_that_ignores_the_range_sends_all_of_it_again(
    record: Record, config_for: Configure
) -> None:
    record.acts[SPEECH] = ["cut:1000", "ignore range"]
    (folder,) = download(config_for(), quiet)
    assert ranges(record, SPEECH) == [None, "bytes=1000-"]
    assert content_of(folder.parent) == wanted_content(record, SPEECH)


@pytest.mark.parametrize("status", ["429", "500", "502", "503", "504"])
def test_a_request_to_a_busy_server_is_repeated(
    record: Record, config_for: Configure, status: str
) -> None:
    record.acts = {"record": [status], SPEECH: [status, status]}
    (folder,) = download(config_for(), quiet)
    assert content_of(folder.parent) == wanted_content(record, SPEECH)
    assert len(record.asked) == 2 + 3


def test_the_number_of_attempts_is_limited(record: Record, config_for: Configure) -> None:
    record.acts["record"] = ["503"] * 100
    with pytest.raises(CorpusError, match=f"failed {fetch.ATTEMPTS} times.*503"):
        download(config_for(), quiet)
    assert len(record.asked) == fetch.ATTEMPTS


def test_pauses_double_unless_the_server_requests_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    busy = requests.Response()
    assert [fetch._pause(attempt, None) for attempt in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    for wish, seconds in (("7", 7), ("86400", 60), ("Wed, 21 Oct 2015 07:28:00 GMT", 4)):
        busy.headers["Retry-After"] = wish
        assert fetch._pause(3, busy) == seconds


def test_an_unreachable_server_is_named(config_for: Configure) -> None:
    config = config_for(record_url="http://127.0.0.1:9/api/records/1188976")
    with pytest.raises(CorpusError, match=r"1188976: .* \(Failed [^()]*refused\); downloaded"):
        download(config, quiet)


def test_a_missing_file_is_an_immediate_error_that_names_it(
    record: Record, config_for: Configure
) -> None:
    record.acts[SPEECH] = ["404"]
    with pytest.raises(CorpusError, match=rf"^{SPEECH}: {record.url}.* returned 404"):
        download(config_for(), quiet)
    assert len(ranges(record, SPEECH)) == 1


@pytest.mark.parametrize("act", ["other", "longer"])
def test_a_wrong_checksum_starts_the_download_over_once(
    record: Record, config_for: Configure, act: str
) -> None:
    record.acts[SPEECH] = [act]
    (folder,) = download(config_for(), quiet)
    assert ranges(record, SPEECH) == [None, None]
    assert content_of(folder.parent) == wanted_content(record, SPEECH)


def test_a_second_wrong_checksum_is_an_error_and_leaves_nothing(
    record: Record, config_for: Configure
) -> None:
    record.acts[SPEECH] = ["other", "other"]
    config = config_for()
    with pytest.raises(CorpusError, match=f"{SPEECH}.*its checksum was not that of the record"):
        download(config, quiet)
    assert content_of(Path(config.target)) == {}
    assert len(ranges(record, SPEECH)) == 2


def test_a_broken_partial_file_is_deleted(record: Record, config_for: Configure) -> None:
    config = config_for()
    part = Path(config.target, f"{SPEECH}.part")
    part.parent.mkdir()
    part.write_bytes(bytes(5000))
    download(config, quiet)
    assert ranges(record, SPEECH) == ["bytes=5000-", None]
    assert content_of(part.parent) == wanted_content(record, SPEECH)


@pytest.mark.parametrize(
    ("listing", "message"),
    [
        (b"<html>log in</html>", "is not the listing"),
        (b'{"files": [{"key": "x"}]}', "is not the listing"),
        (b"[]", "is not the listing"),
        (b'{"files": []}', f"does not list {SPEECH}"),
    ],
)
def test_a_response_that_is_not_a_listing_is_an_error(
    record: Record, config_for: Configure, listing: bytes, message: str
) -> None:
    record.listing = listing
    with pytest.raises(CorpusError, match=message):
        download(config_for(), quiet)


# The target


def test_a_folder_that_the_download_did_not_make_is_left_alone(
    record: Record, config_for: Configure
) -> None:
    config = config_for()
    mine = Path(config.target, "Audio_Speech_Actors_01-24", "mine.wav")
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    with pytest.raises(CorpusError, match="not unpacked by ser-ray"):
        download(config, quiet)
    assert mine.read_text() == "precious"
    assert record.asked == []


def test_another_file_with_the_name_of_an_archive_is_left_alone(config_for: Configure) -> None:
    config = config_for()
    mine = Path(config.target, SPEECH)
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(CorpusError, match="not the file that the record lists"):
        download(config, quiet)
    assert mine.read_text() == "precious"


def test_a_small_disk_is_noticed_before_anything_is_fetched(
    record: Record, config_for: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(record.files[SPEECH])
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(free=3 * size))
    monkeypatch.setattr(downloading, "shutil", full)
    with pytest.raises(CorpusError, match="are free; free some space"):
        download(config_for(), quiet)
    assert [name for name, _ in record.asked] == ["record"]


def test_a_second_process_cannot_download_into_the_same_target(
    record: Record, config_for: Configure
) -> None:
    config = config_for()

    def meanwhile(*_: object) -> None:
        with pytest.raises(
            CorpusError, match=f"process {os.getpid()} on .* is downloading into this folder"
        ):
            download(config, quiet)

    download(config, meanwhile)
    assert len(ranges(record, SPEECH)) == 1


def test_a_target_that_cannot_be_written_is_one_error(
    config_for: Configure, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="cannot be written"):
        download(config_for(target=str(tmp_path / "file" / "below")), quiet)


# Hostile archives


def damaged(content: bytes) -> bytes:
    """A zip with a byte changed in the middle of a member."""
    middle = content.index(CLIP) + 1000
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def lying(content: bytes) -> bytes:
    """A zip whose headers say that a member is 100 bytes, not 102,400."""
    return content.replace(len(CLIP).to_bytes(4, "little"), (100).to_bytes(4, "little"))


def linking(target: str) -> bytes:
    return zip_of({"Actor_01": target.encode()}, external_attr=(stat.S_IFLNK | 0o777) << 16)


def duplicated() -> bytes:
    names = ("Actor_01/first.wav", "Actor_01/other.wav")
    return zip_of(dict.fromkeys(names, CLIP)).replace(b"other", b"first")


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("Actor_01/zeros.wav", bytes(10**7))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (zip_of({"../escaped.wav": CLIP}), "points outside"),
        (zip_of({"Actor_01/../../escaped.wav": CLIP}), "points outside"),
        (zip_of({"/tmp/escaped.wav": CLIP}), "points outside"),
        (zip_of({"..\\escaped.wav": CLIP}), "points outside"),
        (zip_of({"C:/escaped.wav": CLIP}), "points outside"),
        (zip_of({".": CLIP}), "points outside"),
        (linking("/etc"), "link or a device"),
        (zip_of({"pipe": b""}, external_attr=stat.S_IFIFO << 16), "link or a device"),
        (bomb(), "but at most 0 MB are plausible"),
        (damaged(corpus_zip(1)), "cannot be unpacked"),
        (lying(corpus_zip(1)), "cannot be unpacked"),
        (duplicated(), "cannot be unpacked"),
        (zip_of({"a": b"1", "a/b": b"2"}), "cannot be unpacked"),
        (zip_of({"x" * 300: b"1"}), "cannot be unpacked"),
        (corpus_zip(1)[:-30], "cannot be unpacked"),
        (b"no zip at all", "cannot be unpacked"),
        (zip_of({}), "has 0 files"),
    ],
)
def test_a_hostile_archive_is_refused_and_leaves_nothing(
    record: Record, config_for: Configure, tmp_path: Path, content: bytes, message: str
) -> None:
    record.files[SPEECH] = content
    config = config_for()
    with pytest.raises(CorpusError, match=message):
        download(config, quiet)
    inside = {path.name for path in Path(config.target).iterdir()}
    assert inside == {SPEECH}, "only the archive itself, for inspection"
    assert [path.name for path in tmp_path.iterdir()] == ["ravdess"]
    assert not Path("/tmp/escaped.wav").exists()


def test_an_archive_of_too_many_files_is_refused(
    record: Record, config_for: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpack, "MAX_MEMBERS", 1)
    with pytest.raises(CorpusError, match="has 2 files"):
        download(config_for(), quiet)


def test_an_interrupted_unpacking_is_repeated(
    record: Record, config_for: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    config = config_for()
    with monkeypatch.context() as patch:
        patch.setattr(unpack, "shutil", SimpleNamespace(rmtree=shutil.rmtree, copyfileobj=killed))
        with pytest.raises(KeyboardInterrupt):
            download(config, quiet)
    leftover = Path(config.target, ".Audio_Speech_Actors_01-24.unpacking", "half.wav")
    leftover.parent.mkdir()  # as SIGKILL leaves it
    leftover.write_text("half")
    record.asked.clear()
    (folder,) = download(config, quiet)
    assert ranges(record, SPEECH) == [], "the archive was there already"
    assert content_of(folder.parent) == wanted_content(record, SPEECH)
