"""Trains with workers of Ray Train, and passes each epoch to the driver when the epoch ends.

    worker -> ray.train.report -> Ray's controller -> queue -> `WorkerGroup.run` in the driver

Ray replaces a lost worker, and `WorkerGroup` replaces a lost controller. In both cases, the
training resumes from the newest checkpoint. A checkpoint holds the metrics of all epochs before it,
so epochs whose reports were lost with the queue are read from the checkpoint.
"""

import logging
import os
from collections import ChainMap
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import Checkpoint, ScalingConfig, TrainingFailedError, UserCallback, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ser_ray.cluster.resources import format_resources
from ser_ray.distributed.placement import (
    START_ATTEMPTS,
    START_SECONDS,
    PlacementWatch,
    placement_groups,
    remove_placement_groups,
)
from ser_ray.distributed.process_group import BoundConfig
from ser_ray.distributed.run_folder import Epoch, OnEpoch, StoredCheckpoint, TrainingTask
from ser_ray.distributed.worker import run_worker
from ser_ray.errors import first_line, is_permanent, wrapped_error

POLL_SECONDS = 0.2
"""Time between two polls of the workers by the controller, and of the queue by the driver."""
RESIZE_SECONDS = 30.0
"""Time between two checks whether there is room for more workers, in an elastic training."""
STOP_SECONDS = 60.0
"""How long stopped workers may take to finish their current epoch."""

logger = logging.getLogger(__name__)


class WorkerGroup:
    """The workers of Ray Train that run one training.

    Args:
        task: the training.
        min_workers: the training waits until the cluster has room for this number of workers.
        max_workers: the training uses up to this number of workers, as the cluster has room.
        cpus: CPUs of each worker; 0 gives each worker one GPU instead.
    """

    def __init__(
        self, task: TrainingTask, min_workers: int, max_workers: int, *, cpus: int
    ) -> None:
        self.task = task
        resources = {"CPU": float(cpus)} if cpus else {"GPU": 1.0}
        self.scaling = ScalingConfig(
            num_workers=(min_workers if min_workers == max_workers else (min_workers, max_workers)),
            use_gpu=not cpus,
            resources_per_worker=resources if cpus else None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        )
        self.need = f"{min_workers} workers with {format_resources(resources)} each"
        self.pretrained = ray.put(task.pretrained)
        self.other_groups = placement_groups()
        """Ids of the placement groups that this job held before the training."""

    def run(self, on_epoch: OnEpoch) -> None:
        """Train until all epochs have ended.

        Args:
            on_epoch: called with every epoch, first with those of earlier starts. After the loss of
                a worker or controller, it may be called again with the same epoch. If it raises an
                error, the workers stop.

        Raises:
            LockLostError: another process has taken over the folder.
            ResourcesError: there was no room for the workers.
            SerRayError: the training failed.
        """
        folder, max_failures = self.task.folder, self.task.run.max_failures
        failures = 0
        while True:
            start = folder.restore(on_epoch)
            try:
                with closing(self._run_controller(start)) as running:
                    for epoch in running:
                        on_epoch(epoch)
            except (RayActorError, TrainingFailedError) as error:
                has_progressed = folder.newest() != start
                failures = 0 if has_progressed else failures + 1
                # Ray raises a WorkerGroupError after it has made all its attempts. `DriverCallback`
                # ends a training after a permanent error.
                is_final = isinstance(error, WorkerGroupError) or is_permanent(
                    getattr(error, "controller_failure", error)
                )
                can_retry = isinstance(error, RayActorError) or (has_progressed and not is_final)
                if not can_retry or (failures > max_failures and max_failures != -1):
                    raise wrapped_error(error) or folder.failure(str(error)) from error
                logger.warning("Ray's training controller was lost: starting another")
                # Ray's own cleanup needs the dashboard, which local clusters do not have.
                remove_placement_groups(placement_groups() - self.other_groups)
            else:
                return

    def _run_controller(self, start: StoredCheckpoint | None) -> Generator[Epoch]:
        """Start a controller of Ray Train, and yield its epochs until it ends."""
        here = ray.get_runtime_context().get_node_id()
        affinity = NodeAffinitySchedulingStrategy(here, soft=False)
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": affinity})
        # In the main thread, Ray's `fit` would handle Ctrl-C itself.
        executor = ThreadPoolExecutor(1, thread_name_prefix="ray-train")
        training = executor.submit(self._trainer(start, queue).fit)
        executor.shutdown(wait=False)
        watch = PlacementWatch(self.other_groups, self.need)
        try:
            while True:
                is_done = training.done()
                self.task.folder.check_lock()
                try:
                    report = queue.get(block=not is_done, timeout=POLL_SECONDS)
                except Empty:
                    if is_done:
                        break
                    watch.check()
                    continue
                if "lost" in report:
                    logger.warning(
                        "a worker was lost (%s): Ray replaces it up to --max-failures times, "
                        "and the training resumes from its newest checkpoint",
                        report["lost"],
                    )
                else:
                    yield Epoch(**report)
            training.result()
        except BaseException as error:
            queue.shutdown(force=True)  # the workers end when they report their next epoch
            if not isinstance(error, KeyboardInterrupt):
                wait([training], timeout=STOP_SECONDS)
            raise

    def _trainer(self, start: StoredCheckpoint | None, queue: Queue) -> TorchTrainer:
        task, folder = self.task, self.task.folder
        path = f"{folder.path}/{start.name}" if start is not None else ""
        train = partial(
            run_worker, task.recipe, task.shards, self.pretrained, task.run.ingest, path
        )
        # Ray reads these two settings only from the environment.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
        return TorchTrainer(
            train,
            scaling_config=self.scaling,
            torch_config=BoundConfig(backend="nccl" if self.scaling.use_gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root,
                storage_filesystem=folder.filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=task.run.max_failures, controller_failure_limit=START_ATTEMPTS
                ),
                # Ray keeps the newest checkpoint, and the two with the highest `score`, which are
                # the two that were selected last. Two are needed if the newest is incomplete.
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="score"
                ),
                callbacks=[DriverCallback(queue)],
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )


class DriverCallback(UserCallback):
    """Passes reports and losses of workers from Ray's controller to the driver.

    If a method raises an error, Ray ends the training and does not retry it.

    Args:
        queue: receives the reports. To stop a training, `WorkerGroup` shuts the queue down, which
            makes `put` raise.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Pass on an epoch: the report of rank 0, and the system metrics of every node."""
        if "row" not in metrics[0]:
            return  # a checkpoint in mid-epoch
        nodes = dict(ChainMap(*(report.get("system_metrics", {}) for report in metrics)))
        names = ("row", "learning_rates", "timestamp_ms")
        self.queue.put({name: metrics[0][name] for name in names} | {"system_metrics": nodes})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the training if an error is permanent; otherwise pass on why workers were lost."""
        for error in worker_exceptions.values():
            if is_permanent(error):
                raise error
        reasons = {f"rank {rank}: {first_line(e)}" for rank, e in worker_exceptions.items()}
        self.queue.put({"lost": "; ".join(sorted(reasons))})
