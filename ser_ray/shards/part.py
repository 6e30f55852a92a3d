"""Writes a part: rows of the manifest become two Parquet files, which are equal on any machine.

The clips are written first and the outcomes last, so a part with outcomes is complete. Nothing here
imports Ray.

Ray Data's `write_parquet` with its checkpoints was tried for the clips, but it cannot keep four
promises. Every file gets an outcome in the same pass, even if it fails. A killed writer leaves no
broken file among the clips. If a file is removed or changed, its clip is too; a checkpoint only
says which rows to skip. Interruptions change neither names nor order of the parts, so they do not
change a training on the shards.
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
        "duration": pa.float64(),  # seconds of the complete clip before trimming
        "sample_rate": pa.int32(),  # hertz of the file
        "window": pa.int32(),  # 0; a long clip also has rows with 1, 2, ...
        "num_frames": pa.int32(),  # valid frames; the rest of the fixed shape is zero
    }
)
"""Further columns of a decoded clip, besides the columns of the manifest and the features."""


def write_part(
    filesystem: fs.FileSystem, folder: str, part: int, rows: pa.Table, extractor: FeatureExtractor
) -> dict[str, int]:
    """Decode the files of a part, commit its clips and outcomes, and count the files by status.

    If reading a file failed and may work later, the part is committed without a key, so that the
    next run writes it again.

    Args:
        filesystem: the filesystem of the shard set.
        folder: the path of the shard set on it.
        part: number of the part.
        rows: the part's rows of the manifest; files with a status are not opened.
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
    """Yield the function that decodes clips. It uses a sandbox if an earlier process was killed.

    Only a killed process leaves its mark. Ray retries the part in new processes, so without a
    sandbox one bad clip can kill all of them.
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

    Outcomes are not final if reading a file failed and may work later.
    """
    config = extractor.config
    decode = _remember_last(decode)
    outcomes = list(zip(rows["status"].to_pylist(), rows["reason"].to_pylist(), strict=True))
    undecided = [row for row, (status, _) in enumerate(outcomes) if status is None]
    features: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    decoded: list[int] = []  # the row of each clip or window
    facts: list[dict[str, Any]] = []
    is_final = True
    for row in undecided:
        path, start, end = (rows[name][row].as_py() for name in ("path", "start", "end"))
        try:
            sound, loss = cut(decode(path, max_seconds=MAX_RECORDING_SECONDS), start, end)
            samples, sample_rate, _ = sound
            waveforms = extractor.windows(samples, sample_rate)
        except ClipError as error:
            if error.failed == "storage":  # the clip is not at fault, so this is no outcome
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
    """Return a `decode` that remembers the last file, because its segments are consecutive."""

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
    """Return the rows with their outcomes, and the digests of the opened files."""
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
    """Set the status `conflict` for files with the name of another file but different sound."""
    for row, (status, reason) in enumerate(outcomes):
        if status != "duplicate" or not (reason or "").startswith(SAME_NAME):
            continue
        path, other = rows["path"][row].as_py(), str(reason).removeprefix(SAME_NAME)
        if not has_same_sound(path, other, decode):
            outcomes[row] = (
                "conflict",
                f"differs in sound from {other}, which has the same file name and is used",
            )


def has_same_sound(one: str, other: str, decode: Callable[..., Sound]) -> bool:
    """Return whether two files have the same bytes or the same samples.

    If only one of them can be decoded, they differ.
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
    """Turn lists of arrays `[bins, frames]` into columns of fixed-size binary values."""
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
