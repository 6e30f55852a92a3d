"""Trains with a group of Ray Train's workers, and passes on epochs as they end.

    loop -> ray.train.report -> Ray's controller -> queue -> `WorkerGroup.run` in the caller

Ray replaces a lost worker, and `WorkerGroup` a lost controller. Both resume from the newest
checkpoint. A checkpoint holds the metrics of all epochs before it. Therefore reports that did not
reach the caller are restored from the checkpoint, and a lost queue loses no epoch.
"""

import logging
import os
from collections import ChainMap
from collections.abc import Callable, Generator
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
    RoomWatch,
    placement_groups,
    remove_placement_groups,
)
from ser_ray.distributed.process_group import BoundConfig
from ser_ray.distributed.run_folder import Epoch, StoredCheckpoint, TrainingTask
from ser_ray.distributed.worker import run_worker
from ser_ray.errors import SerRayError, first_line, is_permanent

POLL_SECONDS = 0.2
"""How often the controller and the caller look for reports of the workers."""
RESIZE_SECONDS = 30.0
"""How often an elastic training checks whether there is room for more workers."""
STOP_SECONDS = 60.0
"""How long a group that is stopped may take to finish its current epoch."""

logger = logging.getLogger(__name__)


class WorkerGroup:
    """The workers of Ray Train that train one task.

    Args:
        task: the training.
        fewest: smallest number of workers. With fewer, the training waits.
        most: largest number of workers, which the training uses when the cluster has room.
        cpus: CPUs of each worker, or 0 for a GPU each.
    """

    def __init__(self, task: TrainingTask, fewest: int, most: int, *, cpus: int) -> None:
        self.task = task
        each = {"CPU": float(cpus)} if cpus else {"GPU": 1.0}
        self.scaling = ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=not cpus,
            resources_per_worker=each if cpus else None,
            elastic_resize_monitor_interval_s=RESIZE_SECONDS,
        )
        self.need = f"{fewest} workers with {format_resources(each)} each"
        self.pretrained = ray.put(task.pretrained)
        self.other_groups = placement_groups()
        """Ids of the placement groups that this job held before the training."""

    def run(self, on_epoch: Callable[[Epoch], None]) -> None:
        """Train to the end.

        Args:
            on_epoch: called with every epoch, first with the epochs of earlier starts. After a
                loss, it may be called again with the same epoch. If it raises an error, the group
                stops.

        Raises:
            CheckpointError: another process has taken over the folder.
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
                is_replaceable = has_progressed or isinstance(error, RayActorError)
                is_over = isinstance(error, WorkerGroupError) or not is_replaceable
                if is_over or failures > max_failures != -1:
                    raise self._failure(error) from error
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
        # Not in the main thread, because there Ray's fit handles Ctrl-C.
        executor = ThreadPoolExecutor(1, thread_name_prefix="ray-train")
        training = executor.submit(self._trainer(start, queue).fit)
        executor.shutdown(wait=False)
        watch = RoomWatch(self.other_groups, self.need)
        try:
            while True:
                is_done = training.done()
                self.task.folder.check_lock()
                try:
                    report = queue.get(block=not is_done, timeout=POLL_SECONDS)
                except Empty:
                    if is_done:
                        break
                    watch.require_room()
                else:
                    if "lost" in report:
                        logger.warning(
                            "a worker was lost (%s): within --max-failures, Ray replaces it, and "
                            "the training resumes from its newest checkpoint",
                            report["lost"],
                        )
                    else:
                        yield Epoch(**report)
            training.result()
        except BaseException as error:
            queue.shutdown(force=True)  # then the report of the next epoch fails and ends the group
            if not isinstance(error, KeyboardInterrupt):
                wait([training], timeout=STOP_SECONDS)
            raise

    def _trainer(self, start: StoredCheckpoint | None, queue: Queue) -> TorchTrainer:
        task, folder = self.task, self.task.folder
        path = f"{folder.path}/{start.name}" if start is not None else ""
        work = partial(run_worker, task.config, task.shards, self.pretrained, task.run.ingest, path)
        # Ray has only environment variables for these two settings.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
        return TorchTrainer(
            work,
            scaling_config=self.scaling,
            torch_config=BoundConfig(backend="nccl" if self.scaling.use_gpu else "gloo"),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root,
                storage_filesystem=folder.filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=task.run.max_failures, controller_failure_limit=START_ATTEMPTS
                ),
                # Ray keeps the latest checkpoint, and the two with the highest `score`. These are
                # the last two selected ones, of which the last may be incomplete.
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="score"
                ),
                callbacks=[DriverCallback(queue)],
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )

    def _failure(self, error: Exception) -> SerRayError:
        """Return the SerRayError that caused an error of Ray, or an error with Ray's message."""
        causes = list(getattr(error, "worker_failures", {}).values())
        causes.append(getattr(error, "controller_failure", None))
        for cause in causes:
            if isinstance(cause, SerRayError):
                return cause
        return self.task.folder.failure(str(error))


class DriverCallback(UserCallback):
    """Runs in Ray's controller. If this callback raises an error, Ray does not retry the training.

    Args:
        queue: receives the report of every epoch. To stop a training, `WorkerGroup` shuts the queue
            down; then `put` raises.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Forward the report of rank 0 and the metrics of every node, once they are stored."""
        if "row" not in metrics[0]:
            return  # a checkpoint in mid-epoch
        nodes = dict(ChainMap(*(report.get("system_metrics", {}) for report in metrics)))
        names = ("row", "learning_rates", "timestamp_ms")
        self.queue.put({name: metrics[0][name] for name in names} | {"system_metrics": nodes})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the training if an error is permanent; otherwise report the loss."""
        for error in worker_exceptions.values():
            if is_permanent(error):
                raise error
        reasons = {f"rank {rank}: {first_line(e)}" for rank, e in worker_exceptions.items()}
        self.queue.put({"lost": "; ".join(sorted(reasons))})
