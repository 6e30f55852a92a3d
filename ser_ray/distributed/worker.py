"""Runs the training loop in a worker of Ray Train, and reports its epochs to Ray."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Semaphore
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from ser_ray.cluster.resources import openmp_threads
from ser_ray.distributed.ingest import fetch_by_ray, should_stream
from ser_ray.distributed.node_metrics import NodeMetrics
from ser_ray.distributed.run_config import Ingest
from ser_ray.shards.read import ShardSet
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.trainer import EpochReport


def run_worker(
    recipe: TrainConfig, shards: ShardSet, pretrained: ray.ObjectRef, ingest: Ingest, start: str
) -> None:
    """Run the training loop as one of Ray Train's workers.

    Every error is raised, so that Ray ends all workers at once. If one worker returned instead, the
    others would wait for it in their next collective operation.

    Args:
        pretrained: Ray's reference to the weights to start from (`Pretrained`).
        start: path, in the run's storage, of the checkpoint from which the first workers resume; if
            empty, there is none. Ray gives later workers a newer checkpoint.
    """
    if num_threads := openmp_threads():
        torch.set_num_threads(num_threads)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and start:
        storage = ray.train.get_context().get_storage()
        checkpoint = Checkpoint(start, storage.storage_filesystem)
    device = get_device()
    with checkpoint.as_directory() if checkpoint else nullcontext() as directory:
        resume = Path(directory) if directory else None
        is_streamed = should_stream(ingest, recipe, shards, worker_memory, device, resume)
        fit(
            recipe,
            shards,
            ray.get(pretrained),
            Reporter(),
            resume=resume,
            device=device,
            preemption_check=preemption_check(),
            stream=fetch_by_ray if is_streamed else None,
        )


def worker_memory() -> int:
    """Return the bytes of memory for this worker: an equal share of Ray's memory on this node."""
    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return int(node["Resources"]["memory"]) // ray.train.get_context().get_local_world_size()


class Reporter:
    """Passes the loop's reports to Ray Train, which stores checkpoints while the loop continues."""

    def __init__(self) -> None:
        self._writing = Semaphore()
        """Held while a snapshot is written, so that only one snapshot is in memory."""
        is_first_of_node = ray.train.get_context().get_local_rank() == 0
        self._node = NodeMetrics() if is_first_of_node else None

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Report an epoch with its checkpoint, or a checkpoint in mid-epoch (`epoch` is None)."""
        metrics: dict[str, Any] = {"score": 0}
        if epoch is not None:
            metrics = asdict(epoch) | {"score": epoch.row["epoch"] if epoch.is_selected else 0}
            if self._node is not None:
                address = ray.util.get_node_ip_address()
                metrics["system_metrics"] = {address: self._node.means_since_last_call()}
        context = ray.train.get_context()
        if context.get_world_rank() > 0:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self._writing.acquire()
        snapshot = make_snapshot()
        storage = context.get_storage()
        target = f"{storage.experiment_fs_path}/{snapshot.name}"

        def store(checkpoint: Checkpoint, _: str) -> Checkpoint:
            try:
                snapshot.store(checkpoint.filesystem, checkpoint.path)
            finally:
                self._writing.release()
            return checkpoint

        ray.train.report(
            metrics,
            checkpoint=Checkpoint(target, storage.storage_filesystem),
            checkpoint_dir_name=snapshot.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=store,
            delete_local_checkpoint_after_upload=False,
        )


def preemption_check() -> Callable[[], bool]:
    """Return a function that tells whether Ray announced a preemption after the previous call."""
    latest = None

    def check() -> bool:
        nonlocal latest
        previous, latest = latest, ray.train.get_preemption_info()
        return latest is not None and latest != previous

    return check
