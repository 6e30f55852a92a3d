"""Decides whether training clips stay in memory or are streamed, and reads streams in advance.

A stream is read in windows, each with the clips of several steps. Without Ray, threads of the
training's process read the windows. On Ray, tasks of Ray Data read them on any node. Ray Data keeps
the windows in order, reads ahead as far as memory allows, and reads a window again if its node was
lost.

Ray Data is not used to split or shuffle the clips. `get_dataset_shard` gives a worker the block
that is ready first, so an epoch could neither be repeated nor resumed in its middle. It also drops
rows to give all workers the same number. A local shuffle yields short batches in mid-stream, which
makes data-parallel workers wait for each other forever (ray issue 66085).

On two busy cores, Ray Data took 15 s to deliver its first window. Therefore Ray Data starts once
per training, not once per epoch, and the next epoch is read during validation. `fetch_by_threads`
and `fetch_by_ray` are both a `ser_ray.training.streaming.Fetch`.
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
"""Largest share of a worker's memory that resident clips may use. The rest is for the network and
for the raw features while they are read."""


def should_stream(
    ingest: Ingest,
    recipe: TrainConfig,
    shards: ShardSet,
    memory: Callable[[], int],
    device: torch.device,
    resume: Path | None,
) -> bool:
    """Return whether to stream the training clips; all workers get the same answer.

    With `auto`, a resumed training keeps the choice that its checkpoint records. A new training
    streams if resident clips would use more than RESIDENT_SHARE of the memory of any worker or of
    its GPU.

    Args:
        memory: returns the bytes of the machine's memory for this worker.
        resume: directory of the checkpoint to resume from, or None.
    """
    if ingest == "auto" and resume is not None:
        ingest = read_card(resume).ingest
    if ingest == "auto":
        limit = memory()  # on a GPU too, because features are read into this memory first
        if device.type == "cuda":
            limit = min(limit, torch.cuda.get_device_properties(device).total_memory)
        too_large = resident_bytes(shards, recipe) > RESIDENT_SHARE * limit
        votes = World.current().all_reduce_sum(torch.tensor(int(too_large), device=device))
        ingest = "stream" if int(votes) else "resident"
    return ingest == "stream"


def fetch_by_threads(
    read: Callable[[Any], np.ndarray], items: Sequence[Any]
) -> Generator[np.ndarray]:
    """Read each item in threads of this process, and yield the results in order (a `Fetch`)."""
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
    """Read each item with Ray Data on any node, and yield the results in order (a `Fetch`)."""
    import ray.data

    def read_item(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"values": read(items[int(batch["item"][0])])}

    numbers = ray.data.from_items(list(range(len(items))), override_num_blocks=len(items))
    # Each dataset has its own copy of the context, so other datasets do not change.
    numbers.context.enable_progress_bars = False
    numbers.context.execution_options.preserve_order = True
    # The tasks reserve no CPU, because the workers may have reserved all CPUs.
    windows = numbers.map_batches(
        read_item, batch_size=None, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READERS)
    )
    for batch in windows.iter_batches(batch_size=None, prefetch_batches=1):
        yield batch["values"].copy()  # Ray's array is a view of its object store
