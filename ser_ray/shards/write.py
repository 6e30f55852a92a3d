"""Writes one shard. Its rows of the manifest become two Parquet files, the clips and the outcomes.

The files have the same bytes on machines with the same libraries and the same kind of CPU. The
clips are written first and the outcomes last, so a shard with outcomes is complete. Nothing here
imports Ray.

Ray Data's `write_parquet` with its checkpoints was tried, but it does not meet these requirements:

- Every listed file gets an outcome in the same pass, even if it cannot be decoded.
- A writer that is killed leaves no broken file among the clips.
- If a recording is removed or changed, so is its clip. A checkpoint only says which rows to skip.
- Interruptions do not change the names and the order of the shards, on which a training depends.
"""

import atexit
import functools
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.corpus.manifest import SAME_NAME
from ser_ray.features.config import KINDS
from ser_ray.features.decode import MAX_RECORDING_SECONDS
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import Sound, cut
from ser_ray.features.sandbox import Sandbox
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.digest import file_digest, same_bytes, sample_digest
from ser_ray.shards.layout import DIGEST, OK, clips_name, feature_column, outcomes_name, write_table
from ser_ray.shards.plan import shard_key, shard_metadata

Outcomes = list[tuple[str | None, str | None]]
"""The status and the reason of each row; the status is None until the file is decoded."""
DECODED_COLUMNS = pa.schema(
    {
        "content": pa.string(),  # 16 hex digits of the SHA-256 of the decoded samples
        "duration": pa.float64(),  # seconds of the complete clip before trimming
        "sample_rate": pa.int32(),  # hertz of the file
        "window": pa.int32(),  # 0; a long clip also has rows with 1, 2, ...
        "num_frames": pa.int32(),  # valid frames; the rest of the fixed shape is zero
    }
)
"""Columns of a clip that follow from decoding it, in addition to those of the manifest."""


def write_shard(
    shards: str, number: int, rows: pa.Table, extractor: FeatureExtractor
) -> dict[str, int]:
    """Decode the files of a shard, write its clips and outcomes, and count the files by status.

    If a file could not be read but may be readable later, the shard gets no `shard_key`, so that
    the next run writes it again.

    Args:
        shards: folder or URI of the shard set.
        number: number of the shard.
        rows: the shard's rows of the manifest. Rows that already have a status become no clips;
            copies of a file are decoded only if they must be compared with it.
        extractor: computes the features.

    Raises:
        OSError: the storage does not answer, or the shard cannot be written. Its outcomes are then
            not written, so it is not committed.
    """
    outcomes: Outcomes = list(
        zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True)
    )
    undecided = [row for row, (status, _) in enumerate(outcomes) if status is None]
    clips, is_final = _make_clips(rows, undecided, outcomes, extractor)
    _compare_copies(rows, outcomes)
    key = shard_key(rows, extractor.config) if is_final else ""
    table = _outcomes_table(rows, outcomes, undecided)
    table = table.replace_schema_metadata(shard_metadata(key, extractor.config))
    write_table(shards, clips_name(number), clips)
    write_table(shards, outcomes_name(number), table)
    return dict(Counter(table["status"].to_pylist()))


@functools.cache
def sandbox() -> Sandbox:
    """Return the sandbox of this process.

    A clip that kills its process must not kill a Ray worker, because Ray would retry the shard
    forever.
    """
    result = Sandbox()
    atexit.register(result.__exit__)
    return result


def _decode(path: str) -> Sound:
    """Decode a file in the sandbox.

    Raises:
        ClipError: the file cannot be decoded.
        OSError: the storage failed. This is not an outcome, because the file may be undamaged.
    """
    try:
        return sandbox().decode(path, max_seconds=MAX_RECORDING_SECONDS)
    except ClipError as error:
        if error.failed == "storage":
            raise OSError(f"{path}: {error.reason}") from error
        raise


def _make_clips(
    rows: pa.Table, undecided: list[int], outcomes: Outcomes, extractor: FeatureExtractor
) -> tuple[pa.Table, bool]:
    """Decode the undecided rows, and set their outcomes.

    Returns:
        The decoded clips, and whether the outcomes are final. They are not final if a file could
        not be read but may be readable later.
    """
    config = extractor.config
    features: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    clip_rows: list[int] = []  # the row of the manifest of each window
    decoded: list[dict[str, Any]] = []  # the DECODED_COLUMNS of each window
    is_final = True
    paths, starts, ends = (rows[name].to_pylist() for name in ("path", "start", "end"))
    for path, segments in itertools.groupby(undecided, key=paths.__getitem__):
        recording: Sound | ClipError
        try:
            recording = _decode(path)
        except ClipError as error:
            recording = error
        for row in segments:
            try:
                if isinstance(recording, ClipError):
                    raise recording
                (samples, sample_rate, _), loss = cut(recording, starts[row], ends[row])
                waveforms = extractor.windows(samples, sample_rate)
            except ClipError as error:
                outcomes[row] = error.status, error.reason
                is_final &= error.failed == "clip"
                continue
            outcomes[row] = OK, loss
            content = sample_digest(samples)
            for window, waveform in enumerate(waveforms):
                for kind, feature in extractor.features(waveform).items():
                    padded = np.zeros((config.num_bins(kind), config.num_frames), np.float16)
                    padded[:, : feature.shape[1]] = feature
                    features[kind].append(padded)
                clip_rows.append(row)
                decoded.append(
                    {
                        "content": content,
                        "duration": len(samples) / sample_rate,
                        "sample_rate": sample_rate,
                        "window": window,
                        "num_frames": config.frames_of(len(waveform)),
                    }
                )
    clips = rows.drop_columns(["modified", "status", "reason"]).take(
        pa.array(clip_rows, pa.int64())
    )
    clips = _append(clips, pa.Table.from_pylist(decoded, DECODED_COLUMNS))
    for kind, arrays in features.items():
        shape = len(arrays), config.num_bins(kind), config.num_frames
        values = np.array(arrays, np.float16).reshape(shape)  # [0, bins, num_frames] without clips
        clips = clips.append_column(kind, feature_column(values))
    return clips, is_final


def _outcomes_table(rows: pa.Table, outcomes: Outcomes, opened: list[int]) -> pa.Table:
    """Return the rows with their outcomes, and the digests of the local files in `opened` rows."""
    paths = rows["path"].to_pylist()
    digest_of = {path: file_digest(path) for path in dict.fromkeys(paths[row] for row in opened)}
    columns = {
        DIGEST: [digest_of.get(path) for path in paths],
        "status": [status for status, _ in outcomes],
        "reason": [reason for _, reason in outcomes],
    }
    schema = pa.schema(dict.fromkeys(columns, pa.string()))
    return _append(rows.drop_columns(["status", "reason"]), pa.table(columns, schema))


def _compare_copies(rows: pa.Table, outcomes: Outcomes) -> None:
    """Set the status `conflict` for files that have the name of a used file but other sound.

    Raises:
        OSError: the storage failed.
    """
    for row, (status, reason) in enumerate(outcomes):
        if status == "duplicate" and (reason or "").startswith(SAME_NAME):
            path, other = rows["path"][row].as_py(), str(reason).removeprefix(SAME_NAME)
            try:
                is_same = same_bytes(path, other) or _content(path) == _content(other)
            except OSError as error:
                if "://" in path:
                    raise  # the storage may answer later
                reason = f"cannot be compared with {other}: {error.strerror or error}"
                outcomes[row] = "unreadable", reason
                continue
            if not is_same:
                outcomes[row] = (
                    "conflict",
                    f"differs in sound from {other}, which has the same file name and is used",
                )


def _content(path: str) -> tuple[str, int]:
    """Return the digest and rate of a file's samples; its status and 0 if it cannot be decoded."""
    try:
        samples, sample_rate, _ = _decode(path)
    except ClipError as error:
        return error.status, 0
    return sample_digest(samples), sample_rate


def _append(table: pa.Table, columns: pa.Table) -> pa.Table:
    """Return a table with the columns of another table of the same length appended."""
    for name in columns.column_names:
        table = table.append_column(name, columns[name])
    return table
