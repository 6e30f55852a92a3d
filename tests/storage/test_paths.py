"""Files are written, listed and read back under their locations on every kind of filesystem."""

import os
import re
import shutil
import tempfile
import uuid
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, urlsplit

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from ser_ray.errors import ConfigError, LocationError
from ser_ray.shards.layout import write_table
from ser_ray.storage.atomic import write_file
from ser_ray.storage.listing import list_files, stat_file
from ser_ray.storage.paths import (
    NOT_UTF8,
    NULL_CHARACTER,
    absolute,
    filesystem_of,
    folder_of,
    location_inside,
    require_temporary_space,
)
from tests.s3_server import s3_bucket

# Characters that percent-encoding, query strings and fragments trip over.
NAMES = ["a.wav", "deep/er/b b.wav", "100%20 #1?&=+.wav", "Ünï/ç.wav"]


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket("clips") as uri:
        yield uri


@pytest.fixture(params=["local", "relative", "file", "memory", "s3"])
def folder(request, tmp_path, monkeypatch):
    """A folder in every kind of place, as the user would type it."""
    monkeypatch.chdir(tmp_path)
    unique = uuid.uuid4().hex
    return {
        "local": str(tmp_path / "corpus"),
        "relative": "corpus/",
        "file": (tmp_path / "corpus").as_uri(),
        "memory": f"memory://{unique}/corpus",
        "s3": request.getfixturevalue("bucket").format(f"{unique}/corpus"),
    }[request.param]


def write(location, content):
    filesystem, path = filesystem_of(location)
    filesystem.create_dir(path.rpartition("/")[0])
    with filesystem.open_output_stream(path) as file:
        file.write(content)


def read(location):
    filesystem, path = filesystem_of(location)
    with filesystem.open_input_file(path) as file:
        return file.read()


def test_files_are_listed_with_their_sizes_and_opened_by_their_location(folder, monkeypatch):
    for size, name in enumerate(NAMES):
        write(location_inside(folder, name), b"x" * size)
    listed = {file.inside: file for file in list_files(folder)}
    assert sorted(listed) == sorted(NAMES)
    monkeypatch.chdir("/")  # a worker runs in another folder
    for size, name in enumerate(NAMES):
        assert (listed[name].size, listed[name].problem) == (size, None)
        assert read(listed[name].location) == b"x" * size


def test_hidden_files_and_system_folders_are_not_listed(folder):
    for name in ["a.wav", ".DS_Store", "._a.wav", "__MACOSX/a.wav", ".cache/a.wav"]:
        write(location_inside(folder, name), b"")
    assert [file.inside for file in list_files(folder)] == ["a.wav"]


def test_a_corpus_inside_a_hidden_folder_is_listed(tmp_path):
    (tmp_path / ".data" / "corpus").mkdir(parents=True)
    (tmp_path / ".data" / "corpus" / "a.wav").touch()
    assert [file.inside for file in list_files(str(tmp_path / ".data"))] == ["corpus/a.wav"]


def test_paths_relative_to_a_table_lead_to_its_clips(folder):
    table = location_inside(folder, "table.csv")
    write(location_inside(folder, "sub/a b.wav"), b"clip")
    assert read(location_inside(folder_of(table), "sub/a b.wav")) == b"clip"
    beside = location_inside(folder, "tables/table.csv")
    assert read(location_inside(folder_of(beside), "../sub/a b.wav")) == b"clip"


def test_a_hash_is_part_of_the_key_in_a_bucket():
    assert filesystem_of("s3://bucket/clips#2/a%20b?region=eu-west-1")[1] == "bucket/clips#2/a b"


def test_local_entries_that_are_not_files_are_listed_with_a_problem(tmp_path):
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "plain").mkdir()
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    (tmp_path / "itself.wav").symlink_to("itself.wav")
    os.mkfifo(tmp_path / "pipe.wav")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/latin-\xe9.wav")).touch()
    problems = {file.inside: file.problem for file in list_files(str(tmp_path))}
    assert problems == {
        "folder.wav": "a folder, not a file",
        "dangling.wav": "a link to nothing",
        "itself.wav": "Too many levels of symbolic links",
        "pipe.wav": "a device or pipe, not a file",
        "latin-\\xe9.wav": "the path is not UTF-8; rename the file or folder",
    }


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.wav").write_bytes(b"abc")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "one").symlink_to(elsewhere)
    (corpus / "two").symlink_to(elsewhere)
    (corpus / "b.wav").symlink_to(elsewhere / "a.wav")
    (elsewhere / "back").symlink_to(corpus)
    listed = {file.inside: file.size for file in list_files(str(corpus))}
    assert listed == {"one/a.wav": 3, "two/a.wav": 3, "b.wav": 3}


def test_one_client_serves_all_objects_of_a_bucket(bucket):
    first, _ = filesystem_of(bucket.format("a"))
    second, path = filesystem_of(bucket.format("b/c%20d"))
    assert first is second
    assert path == "clips/b/c d"


def test_a_table_and_a_small_file_are_one_object_each_of_a_bucket_with_versions(tmp_path):
    """Such a bucket keeps, and charges for, copies and deleted objects."""
    with s3_bucket("versions") as uri:
        settings = dict(parse_qsl(urlsplit(uri).query))
        endpoint = f"http://{settings['endpoint_override']}"
        client = boto3.client("s3", endpoint_url=endpoint, region_name=settings["region"])
        client.put_bucket_versioning(
            Bucket="versions", VersioningConfiguration={"Status": "Enabled"}
        )
        filesystem, folder = filesystem_of(uri.format(""))
        table = pa.table({"number": range(9)})
        write_table(uri.format(""), "a.parquet", table)
        assert pq.read_table(f"{folder}/a.parquet", filesystem=filesystem).equals(table)
        write_file(filesystem, f"{folder}/b.txt", b"card")
        kept = client.list_object_versions(Bucket="versions")
    assert [version["Key"] for version in kept["Versions"]] == ["a.parquet", "b.txt"]
    assert "DeleteMarkers" not in kept


def test_a_local_path_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filesystem, path = filesystem_of("x/y.wav")
    assert isinstance(filesystem, fs.LocalFileSystem)
    assert path == str(tmp_path / "x/y.wav")


@pytest.mark.parametrize(
    ("location", "problem"),
    [
        ("nowhere://x", "no filesystem opens this location"),
        ("s3://[x/y", r"cannot be opened \(Invalid IPv6 URL"),
        ("s3://bucket/x?nonsense=1", r"cannot be opened \(Unexpected query parameter .*nonsense"),
    ],
)
def test_a_location_that_no_filesystem_opens_is_refused_with_the_reason(location, problem):
    with pytest.raises(LocationError, match=f"{re.escape(location)}: {problem}"):
        filesystem_of(location)


@pytest.mark.parametrize(
    "location",
    [
        "s3://key:SECRET@bucket/corpus",
        "s3://key:SEC/RET@bucket/corpus",
        "simplecache::memory://me:SECRET@host/x.wav",
        "simplecache::ftp://me:SECRET@127.0.0.1:1/x.wav",
        "ftp://me:SECRET@[host/x.wav",
        "zip://a.wav::https://me:SECRET@host/a.zip",
    ],
)
def test_a_password_in_a_location_is_refused_and_not_repeated(location):
    with pytest.raises(ConfigError, match="AWS_SECRET_ACCESS_KEY") as error:
        filesystem_of(location)
    assert "SEC" not in str(error.value).replace("AWS_SECRET_ACCESS_KEY", "")
    assert error.value.__context__ is None


@pytest.mark.parametrize(
    "location", ["memory://me@host/x.wav", "memory://host:9000/a@b.wav", "memory://a b/c:d@e.wav"]
)
def test_a_user_a_port_and_odd_names_are_not_taken_for_a_password(location):
    filesystem_of(location)


def test_an_unknown_home_folder_is_reported(monkeypatch):
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(
        LocationError, match=r"~/corpus: the home folder ~ is not known .*give the full path"
    ):
        absolute("~/corpus")


@pytest.mark.parametrize("free", [0, 99_000_000])
def test_a_temporary_folder_on_a_full_disk_is_named(free, tmp_path, monkeypatch):
    require_temporary_space()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", {str(tmp_path): SimpleNamespace(free=free)}.get)
    with pytest.raises(ConfigError, match=rf"{tmp_path}, has .* MB of free .*: set TMPDIR to"):
        require_temporary_space()


def test_a_machine_without_a_temporary_folder_is_reported(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(ConfigError, match=r"No usable temporary directory .*: set TMPDIR to"):
        require_temporary_space()


def test_a_path_that_no_file_can_have_is_described_in_our_words() -> None:
    assert stat_file("a\0.wav") == (None, NULL_CHARACTER)
    assert stat_file("\ud800.wav") == (None, NOT_UTF8)


def test_the_root_of_a_filesystem_and_chains_have_locations_inside(tmp_path):
    """fsspec opens an archive, a cache and a filesystem whose root holds the files."""
    archive, folder = f"{tmp_path}/a.zip", uuid.uuid4().hex  # other tests write into memory:// too
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("t.csv", "table")
        file.writestr(f"{folder}/1.wav", "clip")
    memory = f"memory://{uuid.uuid4().hex}"
    for name in ("t.csv", f"{folder}/1.wav"):
        write(f"{memory}/{name}", b"clip")
        write(f"memory://{name}", b"clip")
    for start, end in (
        *(("zip://", f"::{archive}"), ("zip://", f"::file://{archive}")),
        *((f"simplecache::{memory}/", ""), ("memory://", ""), ("memory:///", "")),
    ):
        table = f"{start}t.csv{end}"
        clip = f"{start}{folder}/1.wav{end}"
        assert location_inside(folder_of(table), f"{folder}/1.wav") == clip
        assert location_inside(folder_of(clip), f"../{folder}/1.wav") == clip
        assert [file.location for file in list_files(folder_of(clip))] == [clip]
        assert read(location_inside(folder_of(table), f"{folder}/1.wav")) == b"clip"
