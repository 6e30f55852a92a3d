"""Chooses how a worker gets its training clips, and reads ahead of a training that streams them.

Clips are resident in memory, or streamed. A stream is read ahead in windows of several steps. If
the training runs in this process, threads read the windows. Otherwise tasks of Ray Data read them
on any node. Ray Data keeps the windows in order, reads ahead as far as memory allows, and reads a
window again if its node was lost.

Ray Data's functions to split and to shuffle a dataset are not used. `get_dataset_shard` gives a
worker the block that is ready first, so an epoch can neither be repeated nor resumed in its middle.
It also drops rows to give all workers the same number. A local shuffle yields short batches in
mid-stream, and then data-parallel workers wait for each other forever (ray issue 66085).

In a measurement on two busy cores, the first window of Ray Data arrived after 15 s. Therefore the
tasks are started once for a training, not once for an epoch, and the next epoch is read during
validation.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ser_ray.distributed.run_config import Ingest
from ser_ray.shards.read import ShardSet
from ser_ray.training.checkpoint import read_card
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.streaming import resident_bytes
from ser_ray.training.world import World

READERS = 2
"""Number of windows that are read at the same time for one worker."""
RESIDENT_SHARE = 0.5
"""Share of a worker's memory that resident clips may fill. The network needs the rest, and so do
the raw features while they are read."""


def streams(
    ingest: Ingest,
    config: TrainConfig,
    shards: ShardSet,
    memory: Callable[[], int],
    device: torch.device,
    resume: Path | None,
) -> bool:
    """Return whether the training clips are streamed.

    All workers make the same choice. With `auto`, a resumed training reads its clips as before. A
    new training streams if resident clips need more than RESIDENT_SHARE of the memory of any
    worker.

    Args:
        memory: returns the bytes of memory for this worker; called only if it trains on a CPU.
    """
    if ingest == "auto" and resume is not None:
        ingest = read_card(resume).ingest
    if ingest == "auto":
        is_gpu = device.type == "cuda"
        limit = torch.cuda.get_device_properties(device).total_memory if is_gpu else memory()
        too_large = resident_bytes(shards, config) > RESIDENT_SHARE * limit
        votes = World.current().all_reduce_sum(torch.tensor(int(too_large), device=device))
        ingest = "stream" if int(votes) else "resident"
    return ingest == "stream"


def fetch_by_threads(
    read: Callable[[Any], np.ndarray], items: Sequence[Any]
) -> Generator[np.ndarray]:
    """Read the items in threads of this process (a `ser_ray.training.streaming.Fetch`)."""
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="stream") as readers:
        try:
            for item in items:
                pending.append(readers.submit(read, item))
                if len(pending) > READERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)


def fetch_by_ray(read: Callable[[Any], np.ndarray], items: Sequence[Any]) -> Iterator[np.ndarray]:
    """Read the items with Ray Data on any node (a `ser_ray.training.streaming.Fetch`)."""
    import ray.data

    def read_item(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"values": read(items[int(batch["item"][0])])}

    numbers = ray.data.from_items(list(range(len(items))), override_num_blocks=len(items))
    # The context of a dataset is a copy, so this changes no other dataset of the process.
    numbers.context.enable_progress_bars = False
    numbers.context.execution_options.preserve_order = True
    # The tasks reserve no CPU, because the workers may hold all of them.
    windows = numbers.map_batches(
        read_item, batch_size=None, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READERS)
    )
    for batch in windows.iter_batches(batch_size=None, prefetch_batches=1):
        yield batch["values"].copy()  # Ray's array is a view of its object store
