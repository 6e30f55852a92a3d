"""Many files to a table of predictions: a Ray Data pass with a pool of model actors.

Files go through in small blocks, so memory does not grow with their number; a block's answers are
in the journal as soon as it is done, and the same command goes on with the files that are not. On
CPUs an actor decodes and scores; for actors on GPUs, others decode beside them on the CPUs. What
is wrong with a file is a row like any other. That holds for a file that kills what decodes it, too:
Ray would give its block to one actor after the other for ever, so each decodes in a sandbox, which
costs half a millisecond a file.
"""

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ser_ray.cluster import (
    has_gpus,
    one_of_each_folder,
    require_kept,
    require_shared,
    resources_within_reach,
)
from ser_ray.errors import SerRayError
from ser_ray.features.sandbox import Sandbox
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import RecordingFeatures, RecordingReader
from ser_ray.inference.results import Journal, output_suffix, prediction_row
from ser_ray.shards.progress import Progress, Watch, show
from ser_ray.storage.paths import absolute

FILES_AT_ONCE = 32
"""Files of a block: what an interruption costs each actor at most."""
WINDOWS_AT_ONCE = 256
"""Windows held as features before they are scored; an hour's recording has 2300. Before a GPU,
those of a block wait."""
SECONDS_PER_FILE = 600.0
"""A file that is not decoded by then is given up: an hour's video from a bucket takes minutes."""

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchSummary:
    """What a pass did."""

    output: str
    """Where the table is."""
    counts: dict[str, int]
    """Files by status."""
    emotions: dict[str, int]
    """Files by the emotion named."""
    files_before: int
    """Files that interrupted runs had answered."""
    seconds: float
    """Wall time of this run."""


def predict_many(
    files: Sequence[str],
    predictor: Predictor,
    output: str,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> BatchSummary:
    """Score files on the cluster that the caller is connected to, or what is missing of them.

    Args:
        files: paths or URIs, each once.
        output: table to write, with one of the suffixes of `results.SUFFIXES`.
        progress: called after every block; by default a bar or log lines on standard error.

    Raises:
        ConfigError: another suffix, or another run writes there.
        ResourcesError: a node of the cluster does not see the files, or Ray deletes the output.
        SerRayError: the pass broke off.
    """
    output_suffix(output)
    require_kept(output)
    started = time.monotonic()
    files = [absolute(path) for path in files]  # a worker's folder is another one
    with Journal(output, predictor.fingerprint) as journal:
        waiting = [path for path in files if not journal.is_done(path)]
        require_shared(*one_of_each_folder(waiting))
        watch = Watch(len(files), len(files) - len(waiting))
        with show(progress) as report:
            for rows in _score(waiting, predictor) if waiting else ():
                journal.append(rows)
                report(watch.add(Counter(row["status"] for row in rows)))
        statuses: Counter[str] = Counter()
        emotions: Counter[str] = Counter()
        for row in journal.answers(files):
            statuses[row["status"]] += 1
            emotions[row["emotion"]] += row["emotion"] is not None
        journal.conclude(files, predictor.labels)
    return BatchSummary(
        output=output,
        counts=dict(statuses.most_common()),
        emotions=dict((+emotions).most_common()),
        files_before=len(files) - len(waiting),
        seconds=time.monotonic() - started,
    )


def _score(files: Sequence[str], predictor: Predictor) -> Iterator[list[dict[str, Any]]]:
    """Run the pass and yield the rows of each block as it is done."""
    import ray
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    blocks = -(-len(files) // FILES_AT_ONCE)
    dataset = ray.data.from_items([{"path": path} for path in files], override_num_blocks=blocks)
    total, gpus = resources_within_reach(), has_gpus()
    cpu_pool, gpu_pool = (
        ray.data.ActorPoolStrategy(size=min(max(int(total.get(kind, 0)), 1), blocks))
        for kind in ("CPU", "GPU")
    )
    if gpus:
        dataset = dataset.map_batches(
            _Decoder,
            fn_constructor_args=(predictor.reader,),
            batch_size=FILES_AT_ONCE,
            compute=cpu_pool,
            num_cpus=1,
        )
    dataset = dataset.map_batches(
        _Scorer,
        fn_constructor_args=(ray.put(predictor), not gpus),
        batch_size=FILES_AT_ONCE,
        compute=gpu_pool if gpus else cpu_pool,
        num_cpus=0 if gpus else 1,  # the decoders take every CPU
        num_gpus=1 if gpus else None,
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            yield [pickle.loads(row) for row in batch["row"]]
    except ray.exceptions.RayError as error:
        raise SerRayError(
            f"the pass broke off ({str(error).splitlines()[0]}); the answers so far are kept: the "
            "same command goes on from there"
        ) from error


def window_groups(recordings: Iterable[RecordingFeatures]) -> Iterator[list[RecordingFeatures]]:
    """Yield the recordings in groups of about `WINDOWS_AT_ONCE` windows."""
    group: list[RecordingFeatures] = []
    for item in recordings:
        group.append(item)
        if sum(len(one.features) for one in group) >= WINDOWS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


class _Decoder:
    """An actor that turns files into features."""

    def __init__(self, reader: RecordingReader) -> None:
        self.reader = reader
        self.sandbox = Sandbox(SECONDS_PER_FILE)
        self.sandbox.__enter__()  # it goes when the actor does and their pipe closes

    def read(self, batch: Batch) -> Iterator[RecordingFeatures]:
        return (self.reader.read(path, self.sandbox.decode) for path in batch["path"].tolist())

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        for group in window_groups(self.read(batch)):
            yield {"recordings": np.array([pickle.dumps(item) for item in group], dtype=object)}


class _Scorer:
    """An actor that holds the model, and on CPUs decodes as well."""

    def __init__(self, predictor: Any, decodes: bool) -> None:
        import ray
        import torch

        self.predictor: Predictor = ray.get(predictor)
        self.decoder = _Decoder(self.predictor.reader) if decodes else None
        if ray.get_gpu_ids() and torch.cuda.is_available():
            self.predictor.to(torch.device("cuda"))
        else:
            torch.set_num_threads(1)  # an actor has one CPU

    def __call__(self, batch: Batch) -> Batch:
        if self.decoder:
            recordings = self.decoder.read(batch)
        else:
            recordings = (pickle.loads(item) for item in batch["recordings"])
        found = [
            item
            for group in window_groups(recordings)
            for item in self.predictor.predict_features(group)
        ]
        return {
            "row": np.array([pickle.dumps(prediction_row(item)) for item in found], dtype=object)
        }
