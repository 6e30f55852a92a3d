"""Stores the answers of a batch pass: in chunks during the pass, and as one table at its end.

The driver writes every chunk of answers into a Parquet file in a folder beside the output
(`OUTPUT.partial`, on a disk or in a bucket). The same command resumes from this folder. When every
file has an answer, the chunks are merged into one Parquet, CSV or JSON lines file in the order of
the files, and the folder is deleted. If some files were unreachable, the folder remains, and the
same command scores only these files again.

The checkpoints of Ray Data cannot replace this module: they need storage that all nodes share,
count unreachable files as answered, and leave many files instead of one table.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, fs

from ser_ray.errors import ConfigError, SerRayError
from ser_ray.grouping import in_groups
from ser_ray.inference.prediction import UNREACHABLE, table_schema
from ser_ray.storage.atomic import atomic_write
from ser_ray.storage.lock import FolderLock
from ser_ray.storage.paths import filesystem_of, folder_of, location_inside

logger = logging.getLogger(__name__)

SUFFIXES = (".parquet", ".csv", ".jsonl")
SECONDS_PER_CHUNK = 5.0
"""Time between two chunks. If the driver is killed, the answers since the last chunk are lost."""
ROWS_AT_ONCE = 4096
"""About how many rows of the table are written together, as one row group of a Parquet file."""
CACHED_CHUNKS = 4
"""Chunks that are kept in memory while the table is written. Blocks finish out of order, so the
answers of consecutive files are in several chunks."""


def output_suffix(output: str) -> str:
    """Return the suffix of an output's location, which decides the format of the table.

    Raises:
        ConfigError: the suffix is not in `SUFFIXES`.
    """
    suffix = Path(filesystem_of(output)[1]).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"output is {output}: it must end in one of {', '.join(SUFFIXES)}")
    return suffix


@contextmanager
def open_results(output: str, model: str, labels: Sequence[str]) -> Iterator["PartialResults"]:
    """Lock the results of a pass, and yield them with the answers of an interrupted pass.

    Args:
        output: table to write.
        model: fingerprint of the model; answers of other models are ignored.
        labels: the model's labels.

    Raises:
        ConfigError: another process writes this table, or the location cannot be written to.
    """
    filesystem, path = filesystem_of(output)
    folder = location_inside(folder_of(output), f"{Path(path).name}.partial")
    activity, advice = f"is writing {output}", "wait until it ends, or choose another --output"
    with FolderLock(folder, ConfigError, activity=activity, advice=advice) as lock:
        results = PartialResults(filesystem, path, lock, model, labels)
        try:
            yield results
        finally:
            with suppress(SerRayError):  # an error here must not hide the one that ended the pass
                results.write_chunk()


class PartialResults:
    """The answers of a pass so far. Of a written answer, memory holds only path, chunk and row."""

    def __init__(
        self,
        filesystem: fs.FileSystem,
        path: str,
        lock: FolderLock,
        model: str,
        labels: Sequence[str],
    ) -> None:
        self._filesystem, self._path, self._folder = filesystem, path, f"{path}.partial"
        self._lock, self._model, self._schema = lock, model, table_schema(labels)
        self._waiting: list[pa.Table] = []
        self._last_chunk = time.monotonic()
        self._read_chunk = lru_cache(CACHED_CHUNKS)(self._read)
        self._places: dict[str, tuple[str, int]] = {}  # chunk and row of each answered file
        for file in filesystem.get_file_info(fs.FileSelector(self._folder)):
            if file.base_name.startswith(model) and file.extension == "parquet":
                try:
                    answers = self._read(file.base_name, ["path", "status"]).to_pylist()
                except pa.ArrowException:
                    logger.warning(
                        "%s/%s is damaged, so its files are predicted again",
                        self._folder,
                        file.base_name,
                    )
                    continue
                for row, answer in enumerate(answers):
                    if answer["status"] != UNREACHABLE:
                        self._places[answer["path"]] = file.base_name, row

    def is_answered(self, path: str) -> bool:
        """Return whether a file has an answer, of this pass or of an interrupted one."""
        return path in self._places

    def append(self, answers: pa.Table) -> None:
        """Add answers, and write a chunk if the last chunk is older than `SECONDS_PER_CHUNK`."""
        self._waiting.append(answers)
        if time.monotonic() - self._last_chunk > SECONDS_PER_CHUNK:
            self.write_chunk()

    def write_chunk(self) -> None:
        """Write the answers that are in memory, if there are any.

        Raises:
            SerRayError: the chunk cannot be written.
        """
        self._last_chunk = time.monotonic()
        if not self._waiting:
            return
        answers = pa.concat_tables(self._waiting)
        chunk = f"{self._model}-{uuid4().hex}.parquet"
        try:
            with atomic_write(self._filesystem, f"{self._folder}/{chunk}") as stream:
                pq.write_table(answers, stream)
        except OSError as error:
            raise SerRayError(
                f"{self._folder}: answers cannot be written ({error}). Free some space, or wait "
                "until the storage responds. Then run the same command again to resume"
            ) from error
        self._waiting = []
        for row, file in enumerate(answers["path"].to_pylist()):
            self._places[file] = chunk, row

    def finish(self, files: Sequence[str]) -> tuple[Counter[str], Counter[str]]:
        """Write the table, and delete the chunks unless a file was unreachable.

        Args:
            files: the files in the order of the table.

        Returns:
            The number of files by status, and by emotion.

        Raises:
            SerRayError: the table cannot be written, or the chunks cannot be deleted.
        """
        statuses: Counter[str] = Counter()
        emotions: Counter[str] = Counter()

        def count_rows() -> Iterator[pa.Table]:
            for tables in in_groups(self._in_order(files), len, ROWS_AT_ONCE):
                table = pa.concat_tables(tables)
                statuses.update(table["status"].to_pylist())
                emotions.update(table["emotion"].drop_null().to_pylist())
                yield table

        # Buckets need the temporary name too: after an error, closing the stream still creates the
        # object.
        temporary = f"{self._path}.tmp"
        self.write_chunk()
        self._lock.require_held()
        try:
            with self._filesystem.open_output_stream(temporary) as stream:
                _write(output_suffix(self._path), stream, self._schema, count_rows())
            self._filesystem.move(temporary, self._path)
            if UNREACHABLE not in statuses:
                self._filesystem.delete_dir(self._folder)
        except OSError as error:
            raise SerRayError(
                f"{self._path}: could not be finished ({error}); the answers are kept in "
                f"{self._folder}, and the same command writes the table"
            ) from error
        return statuses, emotions

    def _in_order(self, files: Sequence[str]) -> Iterator[pa.Table]:
        """Yield the answers of these files, in their order."""
        for chunk, group in groupby(files, key=lambda path: self._places[path][0]):
            yield self._read_chunk(chunk).take([self._places[path][1] for path in group])

    def _read(self, chunk: str, columns: Sequence[str] | None = None) -> pa.Table:
        path = f"{self._folder}/{chunk}"
        return pq.read_table(path, columns=columns, filesystem=self._filesystem, partitioning=None)


def _write(suffix: str, stream: Any, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    if suffix == ".parquet":
        with pq.ParquetWriter(stream, schema) as parquet:
            for table in tables:
                parquet.write_table(table)
    elif suffix == ".csv":
        # A CSV cell cannot hold a list, so the timeline is written as JSON.
        column = schema.get_field_index("timeline")
        flat_schema = schema.set(column, pa.field("timeline", pa.string()))
        with csv.CSVWriter(stream, flat_schema) as writer:
            for table in tables:
                texts = pa.array([json.dumps(value) for value in table["timeline"].to_pylist()])
                writer.write_table(table.set_column(column, flat_schema.field(column), texts))
    else:
        for table in tables:
            for row in table.to_pylist():
                stream.write(json.dumps(row).encode() + b"\n")
