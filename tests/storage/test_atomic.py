"""A file is complete or does not exist, whatever interrupts the writing."""

from pathlib import Path

import pytest
from pyarrow import fs

from ser_ray.storage.atomic import atomic_write, write_file
from ser_ray.storage.paths import filesystem_of


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_file_is_replaced_and_nothing_else_is_left(place, tmp_path):
    location = str(tmp_path / "folder") if place == "local" else f"memory://{tmp_path.name}"
    filesystem, folder = filesystem_of(location)
    filesystem.create_dir(folder)
    for content in (b"first", b"second"):
        write_file(filesystem, f"{folder}/card.json", content)
        with filesystem.open_input_file(f"{folder}/card.json") as file:
            assert file.read() == content
    listed = filesystem.get_file_info(fs.FileSelector(folder))
    assert [entry.base_name for entry in listed] == ["card.json"]


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt(), ValueError()])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(interruption, tmp_path):
    path = tmp_path / "card.json"
    path.write_text("old")

    def write() -> None:
        with atomic_write(fs.LocalFileSystem(), str(path)) as target:
            Path(target).write_text("half")
            raise interruption

    with pytest.raises(type(interruption)):
        write()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["card.json"]
