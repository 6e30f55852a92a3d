"""A file is complete or does not exist, whatever interrupts the writing."""

import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from ser_ray.storage.atomic import atomic_write, write_file
from ser_ray.storage.paths import filesystem_of
from tests.s3_server import s3_bucket


@pytest.fixture(scope="module")
def bucket():
    with s3_bucket("files") as uri:
        yield uri


@pytest.fixture(params=["local", "memory", "s3"])
def place(request, tmp_path):
    """The filesystem and the path of an empty folder, on every kind of storage."""
    name = uuid.uuid4().hex
    location = {
        "local": str(tmp_path / "folder"),
        "memory": f"memory://{name}",
        "s3": request.getfixturevalue("bucket").format(name),
    }[request.param]
    filesystem, folder = filesystem_of(location)
    filesystem.create_dir(folder)
    return filesystem, folder


def contents(filesystem: fs.FileSystem, folder: str) -> dict[str, bytes]:
    """Return {file name: content} of all files in a folder, temporary ones included."""
    files = {}
    for entry in filesystem.get_file_info(fs.FileSelector(folder)):
        if entry.is_file:
            with filesystem.open_input_file(entry.path) as file:
                files[entry.base_name] = file.read()
    return files


def test_a_file_is_replaced_and_nothing_else_is_left(place):
    filesystem, folder = place
    for content in (b"first", b"second"):
        write_file(filesystem, f"{folder}/card.json", content)
        assert contents(filesystem, folder) == {"card.json": content}


@pytest.mark.parametrize("old", [{}, {"card.json": b"old"}], ids=["new", "replaced"])
@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt(), ValueError()])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(interruption, old, place):
    filesystem, folder = place
    for name, content in old.items():
        write_file(filesystem, f"{folder}/{name}", content)

    def write() -> None:
        with atomic_write(filesystem, f"{folder}/card.json") as stream:
            stream.write(b"half" * 250)
            raise interruption

    with pytest.raises(type(interruption)):
        write()
    assert contents(filesystem, folder) == old


def test_an_interrupted_table_leaves_no_file_with_its_first_rows(place):
    """The writer completes the file on the way out of an error, so the file itself looks valid."""
    filesystem, folder = place
    table = pa.table({"number": range(9)})

    def write() -> None:
        with (
            atomic_write(filesystem, f"{folder}/table.parquet") as stream,
            pq.ParquetWriter(stream, table.schema) as writer,
        ):
            writer.write_table(table)
            raise OSError("the next rows cannot be read")

    with pytest.raises(OSError, match="next rows"):
        write()
    assert contents(filesystem, folder) == {}
