"""A group of Ray Train's workers around the loop, and its epochs as they end.

    loop -> ray.train.report -> Ray's controller -> queue -> `WorkerGroup.run` in the caller

Ray replaces a lost worker, and `WorkerGroup` replaces a lost controller; both resume from the
newest checkpoint. If the queue is lost with its driver, nothing is missing: a checkpoint holds the
numbers of all epochs before it, so reports that did not reach the caller are restored from there.
"""

import logging
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from time import localtime, monotonic, strftime, time

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import ControllerError, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ser_ray.cluster import (
    free_resources,
    in_words,
    placement_groups,
    remove_placement_groups,
)
from ser_ray.distributed.callbacks import DriverCallback
from ser_ray.distributed.process_group import torch_config
from ser_ray.distributed.run_config import Ingest
from ser_ray.distributed.run_folder import Epoch, RunFolder, StoredCheckpoint
from ser_ray.distributed.worker import WorkerTask, run_worker
from ser_ray.errors import ResourcesError, SerRayError
from ser_ray.shards.read import ShardSet
from ser_ray.training.config import TrainConfig
from ser_ray.training.model import Pretrained
from ser_ray.training.streaming import resident_bytes

POLL_SECONDS = 0.2
"""How often the controller and the caller look for reports of the workers."""
START_SECONDS = 30.0
"""How long Ray waits for the placement group of new workers before it counts the nodes again.

Ray's list of nodes may be 20 s old, so only the second attempt may notice that a node is gone.
Workers that have their placement group are not limited, for instance to install packages."""
START_ATTEMPTS = 60
"""Times START_SECONDS: half an hour for a cluster to start machines or to finish other work."""
RESIZE_SECONDS = 30.0
"""How often an elastic training checks whether there is room for more workers."""
TELL_SECONDS = 60.0
"""How often a training that waits for room says so."""
STOP_SECONDS = 60.0
"""How long a group that is stopped may take to finish its current epoch."""

logger = logging.getLogger(__name__)


def scaling(fewest: int, most: int, *, cpus: int) -> ScalingConfig:
    """Make the settings for a number of workers, each with so many CPUs, or with a GPU if none."""
    return ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        use_gpu=not cpus,
        resources_per_worker={"CPU": float(cpus)} if cpus else None,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


class WorkerGroup:
    """The workers that train in one run's folder, by Ray Train.

    Args:
        folder: holds the checkpoints; the training resumes from the newest one.
        scaling: number and size of the workers.
        ingest: how a worker gets its training clips (`ser_ray.distributed.ingest`).
        max_failures: how often lost workers are replaced, and how often in a row a controller that
            was lost before it stored a checkpoint; -1 sets no limit.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        shards: ShardSet,
        pretrained: Pretrained,
        scaling: ScalingConfig,
        *,
        ingest: Ingest = "resident",
        max_failures: int = 0,
    ) -> None:
        self.folder, self.scaling, self.max_failures = folder, scaling, max_failures
        self.task = WorkerTask(
            config=config,
            shards=shards,
            pretrained=ray.put(pretrained),
            ingest=ingest,
            resident_bytes=resident_bytes(shards, config) if ingest == "auto" else 0,
        )
        self.other_groups = placement_groups()
        """Ids of the placement groups that this job held before."""
        self.losses = 0
        """How often workers were lost."""

    def run(self, on_epoch: Callable[[Epoch], None]) -> None:
        """Train to the end.

        Args:
            on_epoch: called with every epoch, first with those of earlier starts. After a loss it
                may get an epoch again, with the same numbers. An error that it raises
                stops the group.

        Raises:
            CheckpointError: another process has taken over the folder.
            ResourcesError: there was no room for the workers.
            SerRayError: the training failed.
        """
        failures = 0
        while True:
            start = self.folder.newest()
            self.folder.tidy(start)
            for epoch in start.epochs() if start is not None else ():
                on_epoch(epoch)
            try:
                with closing(self._run_controller(start)) as running:
                    for epoch in running:
                        on_epoch(epoch)
            except (RayActorError, TrainingFailedError) as error:
                has_progressed = _name(self.folder.newest()) != _name(start)
                failures = 0 if has_progressed else failures + 1
                is_replaceable = has_progressed or isinstance(error, RayActorError)
                is_over = isinstance(error, WorkerGroupError) or not is_replaceable
                if is_over or failures > self.max_failures != -1:
                    raise self._failure(error) from error
                logger.warning("Ray's training controller was lost: starting another")
                # Ray's own cleanup needs the dashboard, which local clusters do not have.
                remove_placement_groups(placement_groups() - self.other_groups)
            else:
                return

    def _run_controller(self, start: StoredCheckpoint | None) -> Generator[Epoch]:
        """Yield the epochs of one of Ray's controllers until it ends."""
        here = ray.get_runtime_context().get_node_id()
        affinity = NodeAffinitySchedulingStrategy(here, soft=False)
        queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": affinity})
        # In the main thread, Ray's fit would handle Ctrl-C itself.
        executor = ThreadPoolExecutor(1, thread_name_prefix="ray-train")
        training = executor.submit(self._trainer(start, queue).fit)
        executor.shutdown(wait=False)
        watch = PlaceWatch(self.other_groups, _need(self.scaling))
        try:
            while True:
                is_done = training.done()
                self.folder.check_lock()
                try:
                    report = queue.get(block=not is_done, timeout=POLL_SECONDS)
                except Empty:
                    if is_done:
                        break
                    watch.require_places()
                else:
                    if "lost" in report:
                        self._tell_loss(report["lost"])
                    else:
                        yield Epoch(**report)
            training.result()
        except BaseException as error:
            queue.shutdown(force=True)  # the next epoch's report fails, and that ends the group
            if not isinstance(error, KeyboardInterrupt):
                wait([training], timeout=STOP_SECONDS)
            raise

    def _trainer(self, start: StoredCheckpoint | None, queue: Queue) -> TorchTrainer:
        folder = self.folder
        path = f"{folder.path}/{start.name}" if start is not None else ""
        # Ray has no other settings for these two than environment variables.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(START_SECONDS))
        return TorchTrainer(
            partial(run_worker, replace(self.task, start=path)),
            scaling_config=self.scaling,
            torch_config=torch_config(gpu=self.scaling.use_gpu),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root,
                storage_filesystem=folder.filesystem,
                failure_config=ray.train.FailureConfig(
                    max_failures=self.max_failures, controller_failure_limit=START_ATTEMPTS
                ),
                # Ray always keeps the latest. Of the selected ones it keeps the last two, because
                # the last may be incomplete: `score` rises with every newly selected epoch.
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="score"
                ),
                callbacks=[DriverCallback(queue)],
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )

    def _tell_loss(self, reason: str) -> None:
        """Say in a line that a worker is replaced; a loss that ends the training raises instead."""
        self.losses += 1
        if self.max_failures == -1 or self.losses <= self.max_failures:
            logger.warning(
                "a worker was lost (%s): Ray replaces it, and the training resumes from its newest "
                "checkpoint",
                reason,
            )

    def _failure(self, error: Exception) -> SerRayError:
        """The error for the user: the SerRayError that caused it, or else Ray's message."""
        causes: list[Exception] = []
        if isinstance(error, ControllerError):
            causes = [error.controller_failure]
        elif isinstance(error, WorkerGroupError):
            causes = list(error.worker_failures.values())
        for cause in causes:
            if isinstance(cause, SerRayError):
                return cause
        return self.folder.failure(str(error))


class PlaceWatch:
    """Says what workers or trials wait for, and ends a training or search that waits too long.

    Ray says nothing to a driver, and lets an elastic training or a search wait forever.

    Args:
        other_groups: ids of the placement groups that do not count.
        need: what needs room, in words.
    """

    def __init__(self, other_groups: set[str], need: str) -> None:
        self.other_groups, self.need = other_groups, need
        self.had_places = self.looked = self.told = monotonic()

    def require_places(self) -> None:
        """Check every START_SECONDS whether there is a placement group with room.

        Raises:
            ResourcesError: it has had none for START_ATTEMPTS times START_SECONDS.
        """
        if monotonic() - self.looked < START_SECONDS:
            return
        self.looked = monotonic()
        if placement_groups(with_room=True) - self.other_groups:
            self.had_places = self.told = self.looked
        elif self.looked - self.had_places >= START_SECONDS * START_ATTEMPTS:
            raise ResourcesError(
                f"the cluster had no room for {self.need} for {START_SECONDS * START_ATTEMPTS:g} "
                "seconds: give the same command again when there is room, or ask for less"
            )
        elif self.looked - self.told >= TELL_SECONDS:
            self.told = self.looked
            waited = self.looked - self.had_places
            logger.warning(
                "waiting for room for %s since %s (%.0f min); free now: %s",
                *(self.need, strftime("%H:%M:%S", localtime(time() - waited)), waited / 60),
                free_resources(),
            )


@contextmanager
def placed(bundle: dict[str, float], need: str) -> Iterator[PlacementGroup]:
    """Yield a placement group as soon as the cluster has room for it, and release it at the end.

    Args:
        bundle: its resources.
        need: what needs them, in words (`PlaceWatch`).

    Raises:
        ResourcesError: there was no room.
    """
    watch = PlaceWatch(placement_groups(), need)
    group = placement_group([bundle])
    try:
        while not group.wait(1):
            watch.require_places()
        yield group
    finally:
        remove_placement_group(group)


def _need(scaling: ScalingConfig) -> str:
    """The workers that a group needs room for, in words."""
    fewest = scaling.num_workers if isinstance(scaling.num_workers, int) else scaling.num_workers[0]
    each = {"GPU": 1.0} if scaling.use_gpu else scaling.resources_per_worker or {"CPU": 1.0}
    return f"{fewest} workers with {in_words(each)} each"


def _name(checkpoint: StoredCheckpoint | None) -> str:
    return checkpoint.name if checkpoint is not None else ""
