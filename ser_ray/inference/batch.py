"""Predicts the emotion in many files by a pass of Ray Data with a pool of model actors.

`predict_many` writes a table. `predict_under` scores files under simulated recording conditions.

Ray Data processes the files in small blocks, so memory holds the paths of all files, but the sound
and features of only a few. `predict_many` stores the answers of finished blocks, so the same
command can resume with the remaining files. On CPUs, every actor decodes and scores. With GPUs,
some actors decode on the CPUs and others score on the GPUs.

A file that cannot be scored gets a row too, even if it kills the process that decodes it. For this,
an actor decodes in a child process, a `Sandbox`, which costs half a millisecond per file. Without
a sandbox, Ray would send the block of such a file to one actor after another, without end.
"""

import logging
import math
import pickle
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ser_ray.cluster.resources import has_gpus, max_resources
from ser_ray.cluster.shared_files import one_of_each_folder, require_kept, require_shared
from ser_ray.errors import SerRayError, first_line
from ser_ray.features.conditions import simulate
from ser_ray.features.samples import Sound, cut
from ser_ray.features.sandbox import Sandbox
from ser_ray.grouping import in_groups
from ser_ray.inference.prediction import Prediction, prediction_row, table_schema
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import Decode, RecordingFeatures, RecordingReader
from ser_ray.inference.results import open_results, output_suffix
from ser_ray.progress import Report, count_files
from ser_ray.storage.paths import absolute

FILES_PER_BLOCK = 32
"""Number of files in a block. The answers of unfinished blocks are lost in an interrupted pass."""
WINDOWS_AT_ONCE = 256
"""A group of recordings that are scored together ends when it has this many windows. A recording is
never divided; one of an hour has 2,300 windows. The decoders send each group to the GPUs as a batch
of its own."""
SECONDS_PER_FILE = 600.0
"""Time limit for decoding a file; a slower file is `unreadable`. A video of one hour in a bucket
takes minutes."""

ID_COLUMNS = ("condition", "clip")
"""Columns that identify the condition and the clip of an answer."""

Batch = dict[str, np.ndarray]
Clip = tuple[str, float | None, float | None]
"""Path or URI of a file, and start and end of a segment in seconds. If the start is None, the
clip is the complete file. If the end is None, the segment ends with the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """The result of a batch pass."""

    output: str
    """Path or URI of the table."""
    counts: dict[str, int]
    """Number of files by status."""
    emotions: dict[str, int]
    """Number of files by predicted emotion."""
    files_before: int
    """Number of files that earlier, interrupted passes answered."""
    seconds: float
    """Wall time of this run."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items())
        emotions = ", ".join(f"{count} {emotion}" for emotion, count in self.emotions.items())
        before = f" ({self.files_before} files were done before)" if self.files_before else ""
        lines = [
            f"{sum(self.counts.values())} files: {counts}",
            emotions,
            f"in {self.seconds:.1f} s{before}: {self.output}",
        ]
        return "\n".join(line for line in lines if line)


def predict_many(
    files: Sequence[str],
    predictor: Predictor,
    output: str,
    *,
    problems: Mapping[str, str] | None = None,
    progress: Report | None = None,
) -> BatchSummary:
    """Predict the emotion in files on the connected cluster, or resume an interrupted pass.

    Args:
        files: paths or URIs without repetition.
        predictor: the model.
        output: table to write, with one of the suffixes of `results.SUFFIXES`.
        problems: {path: reason} of the files that cannot be opened.
        progress: called after every block; by default a bar or log lines on standard error.

    Raises:
        ConfigError: the output has an unknown suffix, another process writes it, or it cannot be
            written.
        ResourcesError: a node of the cluster cannot open the files, or Ray deletes the folder of
            the output after the job.
        SerRayError: the pass ended early, or the answers cannot be written.
    """
    output_suffix(output)
    require_kept(output)
    started = time.monotonic()
    files = [absolute(path) for path in files]  # a worker has another working directory
    with open_results(output, predictor.fingerprint, predictor.labels) as results:
        unreadable = {absolute(path): reason for path, reason in (problems or {}).items()}
        if unreadable:
            rows = [
                prediction_row(Prediction(path=path, status="unreadable", reason=reason))
                for path, reason in unreadable.items()
            ]
            results.append(pa.Table.from_pylist(rows, table_schema(predictor.labels)))
        remaining = [p for p in files if p not in unreadable and not results.is_answered(p)]
        require_shared(*one_of_each_folder(remaining))
        with count_files(len(files), len(files) - len(remaining), progress) as add:
            for answers in _predict([(path, None, None) for path in remaining], [""], predictor):
                results.append(answers.drop_columns(list(ID_COLUMNS)))
                add(Counter(answers["status"].to_pylist()))
        statuses, emotions = results.finish(files)
    return BatchSummary(
        output=output,
        counts=dict(statuses.most_common()),
        emotions=dict(emotions.most_common()),
        files_before=len(files) - len(remaining) - len(unreadable),
        seconds=time.monotonic() - started,
    )


def predict_under(
    clips: Sequence[Clip], conditions: Sequence[str], predictor: Predictor
) -> Iterator[pa.Table]:
    """Score clips under simulated recording conditions on the connected cluster.

    Args:
        clips: files and segments of files.
        conditions: keys of `ser_ray.features.conditions.CONDITIONS`.
        predictor: the model.

    Yields:
        Rows in any order, with the columns of `table_schema`, the name of the condition in the
        column `condition`, and the clip's index in `clips` in the column `clip`.

    Raises:
        ResourcesError: a node of the cluster cannot open the files.
        SerRayError: the pass ended early.
    """
    require_shared(*one_of_each_folder([path for path, _, _ in clips]))
    with count_files(len(clips) * len(conditions), 0, None) as add:
        for answers in _predict(clips, conditions, predictor):
            add(Counter(answers["status"].to_pylist()))
            yield answers


def _predict(
    clips: Sequence[Clip], conditions: Sequence[str], predictor: Predictor
) -> Iterator[pa.Table]:
    """Run the pass, and yield the rows of each finished block as `predict_under` does.

    The condition "" leaves the clips unchanged.
    """
    if not clips:
        return
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing ray.data sets the level
    paths, starts, ends = zip(*clips, strict=True)
    columns = {
        "clip": range(len(clips)),
        "path": paths,
        "start": pa.array(starts, pa.float64()),  # in a batch, None becomes NaN
        "end": pa.array(ends, pa.float64()),
    }
    table = pa.concat_tables(
        pa.table({"condition": [condition] * len(clips), **columns}) for condition in conditions
    )
    firsts = range(0, len(table), FILES_PER_BLOCK)
    dataset = ray.data.from_arrow([table[first : first + FILES_PER_BLOCK] for first in firsts])
    total, with_gpus = max_resources(), has_gpus()

    def pool(kind: str) -> ray.data.ActorPoolStrategy:  # an actor for every CPU or GPU
        return ray.data.ActorPoolStrategy(size=min(max(int(total.get(kind, 0)), 1), len(firsts)))

    if with_gpus:
        dataset = dataset.map_batches(
            _Decoder,
            fn_constructor_args=(predictor.reader,),
            batch_size=FILES_PER_BLOCK,
            compute=pool("CPU"),
            num_cpus=1,
        )
    dataset = dataset.map_batches(
        _Scorer,
        fn_constructor_args=(ray.put(predictor), not with_gpus),
        batch_size=FILES_PER_BLOCK,
        compute=pool("GPU" if with_gpus else "CPU"),
        num_cpus=0 if with_gpus else 1,  # the decoders use all CPUs
        num_gpus=1 if with_gpus else None,
    )
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow")
    except ray.exceptions.RayError as error:
        raise SerRayError(
            f"the pass ended early ({first_line(error)}). Run the same command again; predict "
            "then continues with the remaining files"
        ) from error


def _group_by_windows(
    recordings: Iterable[RecordingFeatures],
) -> Iterator[list[RecordingFeatures]]:
    """Yield the recordings in groups, each of which ends with `WINDOWS_AT_ONCE` windows or more."""
    return in_groups(recordings, lambda recording: len(recording.features), WINDOWS_AT_ONCE)


def _decode_clip(
    decode: Decode, condition: str, start: float, end: float, path: str, *, max_seconds: float
) -> Sound:
    """Decode a file or one of its segments, and simulate a recording condition."""
    sound, name = decode(path, max_seconds=max_seconds), Path(path).name
    if not math.isnan(start):
        sound, _ = cut(sound, start, None if math.isnan(end) else end)
        name = f"{name} from {start:g}"
    return simulate(condition, sound, name) if condition else sound


class _Decoder:
    """An actor that decodes files and computes their features."""

    def __init__(self, reader: RecordingReader) -> None:
        self.reader = reader
        self.sandbox = Sandbox(SECONDS_PER_FILE)

    def read(self, batch: Batch) -> Iterator[RecordingFeatures]:
        columns = (batch[name].tolist() for name in ("path", "condition", "start", "end"))
        for path, condition, start, end in zip(*columns, strict=True):
            decode = partial(_decode_clip, self.sandbox.decode, condition, start, end)
            yield self.reader.read(path, decode)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        first = 0
        for group in _group_by_windows(self.read(batch)):
            pickled = [pickle.dumps(recording) for recording in group]
            end = first + len(group)
            answers = {name: batch[name][first:end] for name in ID_COLUMNS}
            yield answers | {"recording": np.array(pickled, dtype=object)}
            first = end


class _Scorer:
    """An actor that holds the model. On CPUs it also decodes."""

    def __init__(self, predictor: Any, decodes: bool) -> None:
        import ray
        import torch

        self.predictor: Predictor = ray.get(predictor)
        self.decoder = _Decoder(self.predictor.reader) if decodes else None
        if ray.get_gpu_ids() and torch.cuda.is_available():
            self.predictor.to(torch.device("cuda"))
        else:
            torch.set_num_threads(1)  # an actor has one CPU

    def __call__(self, batch: Batch) -> pa.Table:
        if self.decoder:
            recordings = self.decoder.read(batch)
        else:
            recordings = (pickle.loads(pickled) for pickled in batch["recording"])
        rows = [
            prediction_row(prediction)
            for group in _group_by_windows(recordings)
            for prediction in self.predictor.predict_features(group)
        ]
        answers = pa.Table.from_pylist(rows, table_schema(self.predictor.labels))
        for name in ID_COLUMNS:
            answers = answers.append_column(name, pa.array(batch[name].tolist()))
        return answers
