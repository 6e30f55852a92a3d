"""Writes files that appear only when they are complete."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from tempfile import TemporaryDirectory
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs


@contextmanager
def atomic_write(filesystem: fs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    """Yield a stream; its content appears at `path` when the block ends without an error.

    If the block raises an error, `path` keeps its old content, or does not exist. The stream writes
    to a temporary file beside `path`, which is renamed at the end.

    For a bucket, the temporary file is in this machine's temporary folder, and is uploaded at the
    end. An object can be renamed only by copying it. A stream that writes to a bucket cannot be
    discarded, because closing it stores the incomplete object.
    """
    if filesystem.type_name in ("s3", "gcs"):
        with TemporaryDirectory() as folder:
            local = f"{folder}/object"
            with fs.LocalFileSystem().open_output_stream(local) as stream:
                yield stream
            fs.copy_files(local, path, destination_filesystem=filesystem, use_threads=False)
        return
    temporary = f"{path}.{uuid4().hex[:8]}.tmp"
    try:
        with filesystem.open_output_stream(temporary) as stream:
            yield stream
        filesystem.move(temporary, path)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(temporary)
        raise


def write_file(filesystem: fs.FileSystem, path: str, content: bytes) -> None:
    """Write a small file with `atomic_write`."""
    with atomic_write(filesystem, path) as stream:
        stream.write(content)
