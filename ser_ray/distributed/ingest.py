"""How a worker gets its training clips: resident, or as a stream that Ray Data's tasks read ahead.

Ray Data is told what to read, a task a window of steps. It keeps the order, reads ahead as far as
memory allows, and reads again what a lost node had. Its own ways of sharing out and shuffling a
dataset are not used: `get_dataset_shard` gives a worker whatever block is next, so that an epoch
could be neither repeated nor gone on with in its middle, and drops rows to give all workers as
many; a local shuffle gives short batches in mid-stream, on which data-parallel workers wait for
each other for ever (ray issue 66085). The first window took 15 s on two busy cores; so the tasks
are started once a training, not once an epoch, and the next epoch is read during validation.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray as core
import ray.train
import torch

from ser_ray.training.checkpoint import read_card
from ser_ray.training.streaming import Fetch
from ser_ray.training.world import World

READERS = 2
"""Windows that are read at once for a worker."""
RESIDENT_SHARE = 0.5
"""Of a worker's memory: the rest is for the raw features while they are read, and the network."""


def choose_ingest(
    ingest: Literal["auto", "resident", "stream"],
    resident_bytes: int,
    device: torch.device,
    resume: Path | None,
) -> Fetch | None:
    """Choose how to read a stream; None for resident clips. All workers choose the same.

    Left to itself a training goes on as it began, else streams where `resident_bytes` of clips
    would fill more than RESIDENT_SHARE of the memory of any worker.
    """
    if ingest == "auto" and resume is not None:
        ingest = read_card(resume).ingest
    if ingest == "auto":
        too_large = resident_bytes > RESIDENT_SHARE * worker_memory(device)
        votes = World.current().all_reduce_sum(torch.tensor(int(too_large), device=device))
        ingest = "stream" if int(votes) else "resident"
    return fetch if ingest == "stream" else None


def worker_memory(device: torch.device) -> int:
    """Bytes of a worker's GPU, or of its share of what Ray may use of its node's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    here = core.get_runtime_context().get_node_id()
    node = next(node for node in core.nodes() if node["NodeID"] == here)
    return int(node["Resources"]["memory"]) // ray.train.get_context().get_local_world_size()


def fetch(read: Callable[[Any], np.ndarray], items: Sequence[Any]) -> Iterator[np.ndarray]:
    """`ser_ray.training.streaming.Fetch` by Ray Data's tasks, on whatever nodes."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True

    def read_item(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"values": read(items[int(batch["item"][0])])}

    numbers = ray.data.from_items(list(range(len(items))), override_num_blocks=len(items))
    # They take no CPU of Ray's account: the workers may hold all there are.
    windows = numbers.map_batches(
        read_item, batch_size=None, num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READERS)
    )
    for batch in windows.iter_batches(batch_size=None, prefetch_batches=1):
        yield batch["values"].copy()  # what Ray gives is its store's own memory
