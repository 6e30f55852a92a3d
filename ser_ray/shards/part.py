"""One part: a slice of the manifest becomes two Parquet files, the same bytes whoever writes them.

`part-00012.parquet` holds the decoded clips with their features, `part-00012.outcomes.parquet` one
row for every listed file. The second is written last and carries the part's key: where it is found,
the part is whole. Knows nothing of Ray.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from ser_ray.features.config import KINDS, Kind
from ser_ray.features.errors import ClipError
from ser_ray.features.sandbox import Sandbox, time_limited
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.layout import (
    KEY,
    OK,
    mark_name,
    outcomes_name,
    part_key,
    part_name,
    to_binary,
    write_table,
)

DECODE_FACTOR = 10
"""A clip may be this many times as long as the features' room, if most of it is silence."""
FACTS = pa.schema(
    {
        "content": pa.string(),  # 16 hex digits of the SHA-256 of the decoded samples
        "duration": pa.float64(),  # of the whole clip, in seconds
        "sample_rate": pa.int32(),  # of the clip, in hertz
        "num_frames": pa.int32(),  # valid ones; the rest of the fixed shape is zero
    }
)
"""What a part says of a clip beyond the manifest and its features."""


@dataclass(frozen=True)
class PartResult:
    """What became of a part."""

    part: int
    """The part's number."""
    counts: dict[str, int]
    """Files by status."""


def rows_to_bytes(rows: pa.Table) -> bytes:
    """Serialise a slice of the manifest as an Arrow stream."""
    sink = pa.BufferOutputStream()
    rows = rows.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows)
    return sink.getvalue().to_pybytes()


def rows_from_bytes(data: bytes) -> pa.Table:
    """Undo `rows_to_bytes`."""
    return pa.ipc.open_stream(data).read_all()


def write_part(
    filesystem: fs.FileSystem, folder: str, part: int, rows: pa.Table, extractor: FeatureExtractor
) -> PartResult:
    """Decode the files of a part and commit its clips and outcomes.

    Where a file could not be read, which may be mended, they get no key: the next run does the part
    again.

    Args:
        filesystem: where the shards are.
        folder: their path on it.
        part: the part's number.
        rows: the manifest's rows of the part; those with a status are not opened.
        extractor: makes the features.

    Raises:
        OSError: its files could not be fetched or it could not be written; nothing of it is
            committed.
    """
    with _reader(filesystem, f"{folder}/{mark_name(part)}") as read:
        clips, outcomes, is_final = _make_tables(rows, extractor, read)
    key = {KEY: part_key(rows, extractor.config).encode()} if is_final else None
    write_table(filesystem, f"{folder}/{part_name(part)}", clips)
    write_table(
        filesystem, f"{folder}/{outcomes_name(part)}", outcomes.replace_schema_metadata(key)
    )
    return PartResult(part, dict(Counter(outcomes["status"].to_pylist())))


@contextlib.contextmanager
def _reader(filesystem: fs.FileSystem, mark: str) -> Iterator[Callable[..., Any]]:
    """Yield what decodes clips: a sandbox's `decode` where an attempt before this one died.

    A mark is left only by a process that was killed. The engine gives its part to another one, as
    often as it takes; a clip that kills whoever decodes it would keep the job from ever ending.
    """
    try:
        if filesystem.get_file_info(mark).is_file:
            with Sandbox() as sandbox:
                yield sandbox.decode
        else:
            with filesystem.open_output_stream(mark):
                pass
            with time_limited() as read:
                yield read
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(mark)


def _make_tables(
    rows: pa.Table, extractor: FeatureExtractor, read: Callable[..., tuple[np.ndarray, int]]
) -> tuple[pa.Table, pa.Table, bool]:
    """Return the decoded clips, the outcomes of all rows, and whether another try would add none.

    `read` is as `decode`.
    """
    config = extractor.config
    longest = DECODE_FACTOR * config.max_seconds
    outcomes = list(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    waiting = [row for row, (status, _) in enumerate(outcomes) if status is None]
    shape = {kind: (len(waiting), config.num_bins(kind), config.num_frames) for kind in KINDS}
    features = {kind: np.zeros(shape[kind], np.float16) for kind in KINDS}
    facts: list[dict[str, Any]] = []
    is_final = True
    for row in waiting:
        path = rows["path"][row].as_py()
        try:
            samples, sample_rate = read(path, max_seconds=longest)
            waveform = extractor.waveform(samples, sample_rate)
        except ClipError as error:
            if error.failed == "storage":  # not to be committed as if it were the clip
                raise OSError(f"{path}: {error.reason}") from error
            outcomes[row] = error.status, error.reason
            is_final &= error.failed == "clip"
            continue
        for kind, feature in extractor.features(waveform).items():
            features[kind][len(facts), :, : feature.shape[1]] = feature
        facts.append(
            {
                "row": row,
                "content": hashlib.sha256(samples.data).hexdigest()[:16],
                "duration": len(samples) / sample_rate,
                "sample_rate": sample_rate,
                "num_frames": config.frames_of(len(waveform)),
            }
        )
        outcomes[row] = OK, None
    listed = rows.drop_columns(["status", "reason"])
    columns = {kind: to_binary(features[kind][: len(facts)]) for kind in KINDS}
    return _clips_of(listed, facts, columns), _outcomes_of(listed, outcomes), is_final


def _clips_of(
    listed: pa.Table, facts: list[dict[str, Any]], features: dict[Kind, pa.Array]
) -> pa.Table:
    """Put what the manifest, decoding and the features say of each decoded clip side by side."""
    clips = listed.take(pa.array([fact["row"] for fact in facts], pa.int64()))
    for name, values in zip(FACTS.names, pa.Table.from_pylist(facts, FACTS), strict=True):
        clips = clips.append_column(name, values)
    for kind, values in features.items():
        clips = clips.append_column(kind, values)
    return clips


def _outcomes_of(listed: pa.Table, outcomes: list[tuple[str, str | None]]) -> pa.Table:
    """Put the final status and reason of each file beside what the manifest says of it."""
    for name, values in zip(("status", "reason"), zip(*outcomes, strict=True), strict=True):
        listed = listed.append_column(name, pa.array(values, pa.string()))
    return listed
