"""What runs in each of Ray Train's workers: the loop, and its reports on their way to Ray."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from threading import Semaphore
from typing import Any

import ray as core
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.torch import get_device

from ser_ray.distributed.ingest import choose_ingest
from ser_ray.distributed.node_metrics import NodeMetrics
from ser_ray.training.trainer import EpochReport, MakeSnapshot, fit


def run_worker(arguments: dict[str, Any]) -> None:
    """Run the loop as one of Ray Train's workers.

    Every error is raised, so that Ray ends the group at once: a worker that returned would leave
    the others waiting for it in their next collective operation.
    """
    if device_threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(device_threads))
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None and arguments.get("start"):
        storage = ray.train.get_context().get_storage()
        checkpoint = Checkpoint(arguments["start"], storage.storage_filesystem)
    device = get_device()
    with checkpoint.as_directory() if checkpoint else nullcontext() as directory:
        resume = Path(directory) if directory else None
        fit(
            arguments["config"],
            arguments["shards"],
            core.get(arguments["pretrained"]),
            Reporter(),
            resume=resume,
            device=device,
            preemption_check=preemption_notice(),
            stream=choose_ingest(arguments["ingest"], arguments["resident_bytes"], device, resume),
        )


class Reporter:
    """Hands the loop's reports to Ray Train and writes their checkpoints beside the loop."""

    def __init__(self) -> None:
        self._writer = Semaphore()
        """Free when no copy of the training waits to be written: memory holds one at most."""
        is_first_of_node = ray.train.get_context().get_local_rank() == 0
        self._node = NodeMetrics() if is_first_of_node else None

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Report an epoch, or a checkpoint in mid-epoch."""
        metrics: dict[str, Any] = {"score": 0}
        if epoch is not None:
            metrics = asdict(epoch) | {"score": epoch.row["epoch"] if epoch.is_selected else 0}
            if self._node is not None:
                metrics["node"] = {core.util.get_node_ip_address(): self._node.take()}
        context = ray.train.get_context()
        if context.get_world_rank() > 0:
            ray.train.report(metrics, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        self._writer.acquire()
        snapshot = make_snapshot()
        storage = context.get_storage()
        target = f"{storage.experiment_fs_path}/{snapshot.name}"

        def store(checkpoint: Checkpoint, _: str) -> Checkpoint:
            try:
                snapshot.store(checkpoint.filesystem, checkpoint.path)
            finally:
                self._writer.release()
            return checkpoint

        ray.train.report(
            metrics,
            checkpoint=Checkpoint(target, storage.storage_filesystem),
            checkpoint_dir_name=snapshot.name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=store,
            delete_local_checkpoint_after_upload=False,
        )


def preemption_notice() -> Callable[[], bool]:
    """Make a question: is there news of a node about to be taken away?"""
    heard = None

    def ask() -> bool:
        nonlocal heard
        before, heard = heard, ray.train.get_preemption_info()
        return heard is not None and heard != before

    return ask
