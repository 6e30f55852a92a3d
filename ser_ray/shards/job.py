"""Runs Ray Data jobs with one task for each shard.

A task returns a `shard_result`, and the driver reads the results in `run_job`. `prepare` and
`encode` start the jobs.
"""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from ser_ray.errors import ShardsError, last_line
from ser_ray.progress import Report, count_files
from ser_ray.storage.lock import FolderLock

if TYPE_CHECKING:
    from ray.data import Dataset

AGAIN = "; finished shards are kept. Remove the cause, then give the same command again"


def set_up_ray_data() -> None:
    """Turn off the progress messages of Ray Data, and let its tasks use all CPUs from the start."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # By default, only one task runs until the first result arrives and its size is known. This
    # takes seconds, because each worker process first imports Ray Data.
    context.op_resource_reservation_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # Ray Data's log files keep all messages
            handler.setLevel(logging.ERROR)


def shard_result(path: str, write: Callable[[], Mapping[str, int]]) -> pa.Table:
    """Write a file of a shard in a worker, and return counts or the reason of a failure.

    Args:
        path: path of the written file inside the shard set, for error messages.
        write: writes the file, and returns the number of the shard's files by status.

    Returns:
        The columns `path`, `failure`, `status` and `count`, with one row for each status. `failure`
        is empty, or the reason why the file was not written; then there is one row without counts.
    """
    try:
        counts, failure = write(), ""
    except OSError as error:
        counts, failure = {"": 0}, error.strerror or str(error)
    columns = {"path": [path] * len(counts), "failure": [failure] * len(counts)}
    return pa.table(columns | {"status": list(counts), "count": list(counts.values())})


def run_job(
    results: "Dataset",
    shards: str,
    lock: FolderLock,
    num_files: int,
    before: int,
    given: Report | None,
) -> None:
    """Run a job, and show its progress. Stop if another run took over the lock.

    Args:
        results: yields the `shard_result`s, which Ray Data computes while they are read.
        shards: folder or URI of the shard set.
        lock: held on the shard set.
        num_files: number of files in the shard set; for an encoder, number of clips.
        before: number of these that earlier runs finished.
        given: called after every shard; if None, `show_progress` shows a bar or log lines.

    Raises:
        ShardsError: a shard could not be written, or the job failed.
        LockLostError: another process has taken over the shard set.
    """
    import ray

    try:
        with count_files(num_files, before, given) as add:
            for result in results.iter_batches(batch_size=None, batch_format="pyarrow"):
                path, failure, statuses, counts = result.to_pydict().values()
                if failure[0]:
                    raise ShardsError(f"{shards}/{path[0]}: {failure[0]}{AGAIN}")
                lock.require_held()
                add(dict(zip(statuses, counts, strict=True)))
    except ray.exceptions.RayError as error:
        raise ShardsError(f"{shards}: the job failed ({last_line(str(error))}){AGAIN}") from error
