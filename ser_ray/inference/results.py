"""Predictions of many files on their way to a table: a journal while it lasts, then one file.

The journal is a local file of JSON lines: answers come in any order, whatever was delivered
before an interruption stays, and half a line at its end is dropped. When every file is answered,
the lines are written in the order of the files as Parquet, CSV or JSON lines, by the output's
suffix. The journal of a table with files whose storage did not answer stays: given again, the same
command asks for those alone. Memory holds one number a file, not the answers.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, fs

from ser_ray.errors import ConfigError, SerRayError
from ser_ray.inference.predictor import Prediction
from ser_ray.inference.recordings import UNREACHABLE
from ser_ray.storage.paths import absolute, filesystem_of

SUFFIXES = (".parquet", ".csv", ".jsonl")
ROWS_AT_ONCE = 4096
REMOTE_JOURNALS = Path("~/.cache/ser-ray/journals")
"""Where the journal of an output in a bucket, which cannot be appended to, is kept: not in the
folder of a job, which is another one for every submission."""


def output_suffix(output: str) -> str:
    """The suffix of an output, which says its format.

    Raises:
        ConfigError: it is none of `SUFFIXES`.
    """
    suffix = Path(filesystem_of(output)[1]).suffix.lower()
    if suffix not in SUFFIXES:
        raise ConfigError(f"output is {output}: it must end in one of {', '.join(SUFFIXES)}")
    return suffix


class Journal:
    """The answers so far, while its context lasts.

    Args:
        output: where the table will go.
        model: what the answers are from; those of another model are dropped.
    """

    def __init__(self, output: str, model: str) -> None:
        filesystem, path = filesystem_of(output)
        if isinstance(filesystem, fs.LocalFileSystem):
            self.path = Path(f"{path}.partial")
        else:
            digest = hashlib.sha256(output.encode()).hexdigest()[:8]
            self.path = REMOTE_JOURNALS.expanduser() / f"{digest}-{Path(path).name}.partial"
        self.output = output
        self._header = json.dumps({"model": model}).encode() + b"\n"
        self._places: dict[str, int] = {}  # of each answered path's line

    def __enter__(self) -> Self:
        """Take up what an interrupted run left.

        Raises:
            ConfigError: another run is writing there, or nobody can.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise ConfigError(
                f"{self.output}: another run is writing it; wait for that, or choose another "
                "--output"
            ) from error
        self._require_writable()
        self._file.seek(0)
        whole = len(self._header) if self._file.readline() == self._header else 0
        while whole and (line := self._file.readline()).endswith(b"\n"):
            answer = json.loads(line)
            if answer["status"] != UNREACHABLE:
                self._places[answer["path"]] = whole
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self._file.write(self._header)
        return self

    def _require_writable(self) -> None:
        """Find out now, and not when all is scored; where it is local, the journal has."""
        filesystem, path = filesystem_of(absolute(self.output))
        if isinstance(filesystem, fs.LocalFileSystem):
            return
        try:
            with filesystem.open_output_stream(f"{path}.tmp"):
                pass
            filesystem.delete_file(f"{path}.tmp")
        except OSError as error:
            self._file.close()
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(f"{self.output}: cannot be written ({error}); choose another --output")

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def is_done(self, path: str) -> bool:
        """Whether a file is answered."""
        return path in self._places

    def append(self, answers: Iterable[dict[str, Any]]) -> None:
        """Keep the answers of some files, whatever happens next."""
        self._file.seek(0, 2)
        for answer in answers:
            self._places[answer["path"]] = self._file.tell()
            self._file.write(json.dumps(answer).encode() + b"\n")
        self._file.flush()

    def answers(self, files: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The answers of these files, in their order."""
        for path in files:
            self._file.seek(self._places[path])
            yield json.loads(self._file.readline())

    def conclude(self, files: Sequence[str], labels: Sequence[str]) -> None:
        """Write the table of these files, under a temporary name first, and drop the journal
        unless files are to be asked for again.

        Raises:
            SerRayError: it could not be written; the journal stays.
        """
        filesystem, path = filesystem_of(absolute(self.output))
        suffix, schema = output_suffix(self.output), table_schema(labels)
        try:
            with filesystem.open_output_stream(f"{path}.tmp") as stream:
                _write(suffix, stream, schema, _tables(self.answers(files), schema))
            filesystem.move(f"{path}.tmp", path)
        except OSError as error:
            raise SerRayError(
                f"{self.output}: could not be written ({error}); the answers are kept, and the "
                "same command writes them"
            ) from error
        if all(answer["status"] != UNREACHABLE for answer in self.answers(files)):
            self.path.unlink()


def prediction_row(found: Prediction) -> dict[str, Any]:
    """A prediction as a row of the table: probabilities become p_<label>, None without one."""
    shares = {f"p_{label}": share for label, share in (found.probabilities or {}).items()}
    timeline = [
        {"start": segment.start, "end": segment.end, "emotion": segment.emotion}
        | {f"p_{label}": share for label, share in segment.probabilities.items()}
        for segment in found.timeline
    ]
    return {
        "path": found.path,
        "status": found.status,
        "reason": found.reason,
        "emotion": found.emotion,
        "duration": found.duration,
        **shares,
        "timeline": timeline,
    }


def table_schema(labels: Sequence[str]) -> pa.Schema:
    """Columns of the table, one row a file."""
    shares = [(f"p_{label}", pa.float64()) for label in labels]
    segment = [("start", pa.float64()), ("end", pa.float64()), ("emotion", pa.string()), *shares]
    texts = [(name, pa.string()) for name in ("path", "status", "reason", "emotion")]
    timeline = ("timeline", pa.list_(pa.struct(segment)))
    return pa.schema([*texts, ("duration", pa.float64()), *shares, timeline])


def _tables(rows: Iterator[dict[str, Any]], schema: pa.Schema) -> Iterator[pa.Table]:
    while block := list(islice(rows, ROWS_AT_ONCE)):
        yield pa.Table.from_pylist(block, schema)


def _write(suffix: str, stream: Any, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    if suffix == ".parquet":
        with pq.ParquetWriter(stream, schema) as parquet:
            for table in tables:
                parquet.write_table(table)
    elif suffix == ".csv":
        # A cell holds no table: the timeline is JSON there.
        place = schema.get_field_index("timeline")
        flat = schema.set(place, pa.field("timeline", pa.string()))
        with csv.CSVWriter(stream, flat) as lines:
            for table in tables:
                texts = [json.dumps(value) for value in table["timeline"].to_pylist()]
                lines.write_table(table.set_column(place, flat.field(place), pa.array(texts)))
    else:
        for table in tables:
            for row in table.to_pylist():
                stream.write(json.dumps(row).encode() + b"\n")
