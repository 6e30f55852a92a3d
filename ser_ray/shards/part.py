"""Writes one part: some rows of the manifest become two Parquet files, equal on any machine.

The clips are written first and the outcomes last, so a part with outcomes is complete. Nothing here
imports Ray.

Ray Data's `write_parquet` with its checkpoints was tried for the clips, but cannot keep four
promises. A file that fails gets a row in the outcomes of the same pass. A killed writer leaves no
broken file among the clips. If a file is removed or changed, so is its clip, while a checkpoint
only knows which rows to leave out. Names and order of the parts do not depend on interruptions, so
training on the shards does not either.
"""

import contextlib
import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from ser_ray.corpus.manifest import SAME_NAME
from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.features.decode import MAX_RECORDING_SECONDS
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import Sound, cut
from ser_ray.features.sandbox import Sandbox, time_limited
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.digest import file_digest, same_bytes, sample_digest
from ser_ray.shards.layout import (
    DIGEST,
    OK,
    feature_column,
    mark_name,
    outcomes_name,
    part_name,
    write_table,
)
from ser_ray.shards.plan import part_key, part_metadata

FACTS = pa.schema(
    {
        "content": pa.string(),  # 16 hex digits of the SHA-256 of the decoded samples
        "duration": pa.float64(),  # of the complete clip before trimming, in seconds
        "sample_rate": pa.int32(),  # of the file, in hertz
        "window": pa.int32(),  # 0, and for a long clip also 1, 2, ...: each has a row of its own
        "num_frames": pa.int32(),  # valid frames; the rest of the fixed shape is zero
    }
)
"""The columns of a decoded clip besides those of the manifest and the features."""


def write_part(
    filesystem: fs.FileSystem, folder: str, part: int, rows: pa.Table, extractor: FeatureExtractor
) -> dict[str, int]:
    """Decode the files of a part, commit its clips and outcomes, and count the files by status.

    If reading a file failed for a reason that may be temporary, the part is committed without a
    key, so that the next run writes it again.

    Args:
        filesystem: where the shard set is.
        folder: path of the shard set on it.
        part: the part's number.
        rows: the manifest's rows of the part; files with a status are not opened.
        extractor: computes the features.

    Raises:
        OSError: the clips cannot be fetched or the part cannot be written. Nothing is committed.
    """
    with _decoder(filesystem, f"{folder}/{mark_name(part)}") as decode:
        clips, outcomes, is_final = _make_tables(rows, extractor, decode)
    key = part_key(rows, extractor.config) if is_final else ""
    outcomes = outcomes.replace_schema_metadata(part_metadata(key, extractor.config))
    write_table(filesystem, f"{folder}/{part_name(part)}", clips)
    write_table(filesystem, f"{folder}/{outcomes_name(part)}", outcomes)
    return dict(Counter(outcomes["status"].to_pylist()))


@contextlib.contextmanager
def _decoder(filesystem: fs.FileSystem, mark: str) -> Iterator[Callable[..., Any]]:
    """Yield the function that decodes clips, in a sandbox if an earlier attempt was killed.

    Only a killed process leaves its mark. Ray gives the part to one process after another, so
    without a sandbox a single clip could keep the job from ever ending.
    """
    try:
        if filesystem.get_file_info(mark).is_file:
            with Sandbox() as sandbox:
                yield sandbox.decode
        else:
            with filesystem.open_output_stream(mark):
                pass
            with time_limited() as decode:
                yield decode
    finally:
        with contextlib.suppress(FileNotFoundError):
            filesystem.delete_file(mark)


def _make_tables(
    rows: pa.Table, extractor: FeatureExtractor, decode: Callable[..., Sound]
) -> tuple[pa.Table, pa.Table, bool]:
    """Return the decoded clips, the outcomes of all rows, and whether the outcomes are final.

    Outcomes are not final if reading a file failed for a reason that may be temporary.
    """
    config = extractor.config
    decode = _remember_last(decode)
    outcomes = list(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    undecided = [row for row, (status, _) in enumerate(outcomes) if status is None]
    features: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    decoded: list[int] = []  # rows of the clips
    facts: list[dict[str, Any]] = []
    is_final = True
    for row in undecided:
        path, start, end = (rows[name][row].as_py() for name in ("path", "start", "end"))
        try:
            sound, loss = cut(decode(path, max_seconds=MAX_RECORDING_SECONDS), start, end)
            samples, sample_rate, _ = sound
            waveforms = extractor.windows(samples, sample_rate)
        except ClipError as error:
            if error.failed == "storage":  # not the fault of the clip, so not an outcome
                raise OSError(f"{path}: {error.reason}") from error
            outcomes[row] = error.status, error.reason
            is_final &= error.failed == "clip"
            continue
        content = sample_digest(samples)
        for window, waveform in enumerate(waveforms):
            for kind, feature in extractor.features(waveform).items():
                padded = np.zeros((config.num_bins(kind), config.num_frames), np.float16)
                padded[:, : feature.shape[1]] = feature
                features[kind].append(padded)
            decoded.append(row)
            facts.append(
                {
                    "content": content,
                    "duration": len(samples) / sample_rate,
                    "sample_rate": sample_rate,
                    "window": window,
                    "num_frames": config.frames_of(len(waveform)),
                }
            )
        outcomes[row] = OK, loss
    clips = rows.drop_columns(["modified", "status", "reason"]).take(pa.array(decoded, pa.int64()))
    clips = _append(clips, pa.Table.from_pylist(facts, FACTS))
    clips = _append(clips, _feature_columns(features, config))
    _compare_copies(rows, outcomes, decode)
    return clips, _outcomes_table(rows, outcomes, undecided), is_final


def _remember_last(decode: Callable[..., Sound]) -> Callable[..., Sound]:
    """Return a `decode` that decodes a file once for all its segments, which are consecutive."""

    @functools.lru_cache(maxsize=1)
    def attempt(path: str, max_seconds: float) -> Sound | ClipError:
        try:
            return decode(path, max_seconds=max_seconds)
        except ClipError as error:
            return error

    def read(path: str, *, max_seconds: float) -> Sound:
        sound = attempt(path, max_seconds)
        if isinstance(sound, ClipError):
            raise sound
        return sound

    return read


def _outcomes_table(
    rows: pa.Table, outcomes: list[tuple[str | None, str | None]], opened: list[int]
) -> pa.Table:
    """Return the rows with their outcomes, and with the digests of the files that were opened."""
    paths = rows["path"].to_pylist()
    digest_of = {path: file_digest(path) for path in dict.fromkeys(paths[row] for row in opened)}
    digests = [digest_of.get(path) for path in paths]
    statuses, reasons = ([pair[place] for pair in outcomes] for place in (0, 1))
    columns = {DIGEST: digests, "status": statuses, "reason": reasons}
    schema = pa.schema(dict.fromkeys(columns, pa.string()))
    return _append(rows.drop_columns(["status", "reason"]), pa.table(columns, schema))


def _compare_copies(
    rows: pa.Table,
    outcomes: list[tuple[str | None, str | None]],
    decode: Callable[..., Sound],
) -> None:
    """Give files with the name of another file but different sound the status `conflict`."""
    for row, (status, reason) in enumerate(outcomes):
        if status != "duplicate" or not (reason or "").startswith(SAME_NAME):
            continue
        path, other = rows["path"][row].as_py(), str(reason).removeprefix(SAME_NAME)
        if not has_same_sound(path, other, decode):
            outcomes[row] = (
                "conflict",
                f"differs in sound from {other}, which has the same file name and was taken",
            )


def has_same_sound(one: str, other: str, decode: Callable[..., Sound]) -> bool:
    """Return whether two files have the same bytes or the same samples.

    A file that cannot be decoded differs from one that can.
    """
    if same_bytes(one, other):
        return True
    sounds: list[tuple[str, int]] = []
    for path in (one, other):
        try:
            samples, sample_rate, _ = decode(path, max_seconds=MAX_RECORDING_SECONDS)
        except ClipError as error:
            if error.failed == "storage":
                raise OSError(f"{path}: {error.reason}") from error
            sounds.append((error.status, 0))
        else:
            sounds.append((hashlib.sha256(samples.data).hexdigest(), sample_rate))
    return sounds[0] == sounds[1]


def _feature_columns(features: dict[str, list[np.ndarray]], config: FeatureConfig) -> pa.Table:
    """Turn lists of arrays `[bins, frames]` into columns with one fixed-size binary value each."""
    columns = {}
    for kind, arrays in features.items():
        none = np.empty((0, config.num_bins(kind), config.num_frames), np.float16)
        columns[kind] = feature_column(np.stack(arrays) if arrays else none)
    return pa.table(columns)


def _append(table: pa.Table, columns: pa.Table) -> pa.Table:
    """Append the columns of another table of the same length."""
    for name in columns.column_names:
        table = table.append_column(name, columns[name])
    return table
