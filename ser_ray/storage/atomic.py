"""Writes files that appear only when they are complete."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import uuid4

from pyarrow import fs


@contextmanager
def atomic_write(filesystem: fs.FileSystem, path: str) -> Iterator[str]:
    """Yield the path to write to; the file appears at `path` when the block ends without an error.

    On a disk, the yielded path is that of a temporary file beside `path`, which is renamed at the
    end. In a bucket, it is `path` itself, because an object appears only when its stream is closed,
    and can be renamed only by copying it.
    """
    if filesystem.type_name in ("s3", "gcs"):
        yield path
        return
    temporary = f"{path}.{uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        filesystem.move(temporary, path)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def write_file(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a small file with `atomic_write`."""
    with (
        atomic_write(filesystem, path) as target,
        filesystem.open_output_stream(target) as stream,
    ):
        stream.write(content)
