"""Ray Data jobs over the shards of a shard set: what a task returns, and how the driver follows."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from ser_ray.errors import ShardsError, last_line
from ser_ray.storage.lock import FolderLock

if TYPE_CHECKING:
    from ray.data import Dataset

AGAIN = "; committed shards are kept: remove the cause, then give the same command again"


def set_up_ray_data() -> None:
    """Turn off the messages of Ray Data, and let its tasks use all CPUs from the start."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # By default a second task starts only when the first has ended, and the size of its result is
    # known. That takes seconds, because each worker process first imports Ray Data.
    context.op_resource_reservation_enabled = False
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console":  # not Ray Data's log files
            handler.setLevel(logging.ERROR)


def shard_result(path: str, write: Callable[[], Mapping[str, int]]) -> pa.Table:
    """Write the file of a shard in a worker.

    Args:
        path: the file's path inside the shard set.
        write: writes the file, and returns the shard's number of files by status.

    Returns:
        The columns `path`, `failure`, `status` and `count`, with one row for each status. `failure`
        is empty, or the reason why the file was not written.
    """
    counts: Mapping[str, int] = {"": 0}
    failure = ""
    try:
        counts = write()
    except OSError as error:
        failure = error.strerror or str(error)
    columns = {"path": [path] * len(counts), "failure": [failure] * len(counts)}
    return pa.table(columns | {"status": list(counts), "count": list(counts.values())})


def follow(
    results: "Dataset", shards: str, lock: FolderLock, add: Callable[[Mapping[str, int]], None]
) -> None:
    """Run a job of `shard_result`s, count the files, and stop if another run took over the lock.

    Raises:
        ShardsError: a shard could not be written, or the job failed.
    """
    import ray

    try:
        for result in results.iter_batches(batch_size=None, batch_format="pyarrow"):
            path, failure, statuses, counts = result.to_pydict().values()
            if failure[0]:
                raise ShardsError(f"{shards}/{path[0]}: {failure[0]}{AGAIN}")
            lock.require_held()
            add(dict(zip(statuses, counts, strict=True)))
    except ray.exceptions.RayError as error:
        raise ShardsError(f"{shards}: the job failed ({last_line(error)}){AGAIN}") from error
