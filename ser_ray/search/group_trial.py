"""A trial of several workers: a Ray Train group that the trial's actor drives.

Ray Train's controller hands every epoch to the trial and waits for Tune's decision. A stopped group
is told so between two epochs and ends as a failed training does: its workers and their placement
group go at once. A controller that is merely killed leaves the group to a watcher that needs Ray's
dashboard, and without one the placement group stays and the next trial waits for it for ever.
"""

import tempfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray import tune
from ray.train import TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue
from torch import OutOfMemoryError

from ser_ray.distributed.callbacks import FailFast
from ser_ray.distributed.launch import own_error
from ser_ray.distributed.process_group import torch_config
from ser_ray.distributed.run_folder import GROUPS, RunFolder, Stored
from ser_ray.distributed.worker import run_worker
from ser_ray.search.space import recipe_of
from ser_ray.search.trial import PROBLEMS, TrialSetup, problem_metrics, trial_metrics
from ser_ray.storage.paths import location_inside
from ser_ray.training.checkpoint import learning_rates_by_epoch
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_epoch
from ser_ray.training.model import Pretrained

POLL_SECONDS = 1.0
STOP_SECONDS = 60.0
"""Time that a stopped group gets to end the epoch it is in."""


class StoppedTrialError(Exception):
    """Tune stopped the trial."""


class GroupTrial(tune.Trainable):
    """One trial; a step is an epoch.

    The group's own folder holds its checkpoints: the same trial goes on from there.
    """

    def setup(
        self, config: dict[str, Any], setup: TrialSetup, pretrained: dict[str, Pretrained]
    ) -> None:
        """Start the group."""
        self.recipe, self.study = recipe_of(setup.recipe, config), setup
        self.folder = RunFolder(location_inside(setup.storage, GROUPS), self.trial_id)
        self.reports, self.answers = (Queue(actor_options={"num_cpus": 0}) for _ in range(2))
        self.told: dict[str, Any] = {}
        """What Tune was told last."""
        self.is_asked = False
        """The group waits for Tune's decision."""
        before = self.folder.newest()
        self.folder.tidy(before)
        self.past = deque(_told_of(self.recipe, before.progress) if before is not None else ())
        """What the group did before this start: some of it Tune may not have been told."""
        trainer = self._trainer(self.recipe, pretrained[self.recipe.weights], before)
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="ray-train")
        self.training = self.executor.submit(trainer.fit)

    def step(self) -> dict[str, Any]:
        """Let the group do an epoch; the last call tells how it ended."""
        if self.past:
            self.told = self.past.popleft()
            return self.told
        if self.is_asked:
            self.answers.put(True)
            self.is_asked = False
        while True:
            try:
                self.told = self.reports.get(timeout=POLL_SECONDS)
            except Empty:
                if self.training.done():
                    return self._conclude()
            else:
                self.is_asked = True
                return self.told

    def cleanup(self) -> None:
        """Stop the group, if it is still there, and wait until it is gone."""
        self.answers.put(False)
        wait([self.training], timeout=STOP_SECONDS)
        self.executor.shutdown(wait=False)
        for queue in (self.reports, self.answers):
            queue.shutdown(force=True)

    def _conclude(self) -> dict[str, Any]:
        try:
            self.training.result()
            if self.study.finish is not None:
                newest = self.folder.newest()
                assert newest is not None, "a finished training has a checkpoint"
                with tempfile.TemporaryDirectory() as selected:
                    self.folder.keep_selected(newest, {}, Path(selected))
                    self.study.finish(Path(selected), self.study.shards, self.recipe)
        except TrainingFailedError as error:
            problem: Exception | None = own_error(error)
            if isinstance(error, WorkerGroupError):
                failures = error.worker_failures.values()
                problem = next((e for e in failures if isinstance(e, OutOfMemoryError)), problem)
            if problem is None:
                raise
            return self._problem(problem)
        except PROBLEMS as problem:
            return self._problem(problem)
        return self.told | {"complete": True, "done": True}

    def _problem(self, problem: Exception) -> dict[str, Any]:
        objective = self.told.get("objective_by_epoch", [])
        return problem_metrics(problem, objective) | {"done": True}

    def _trainer(
        self, recipe: TrainConfig, pretrained: Pretrained, before: Stored | None
    ) -> TorchTrainer:
        slots, folder = self.study.slots, self.folder
        history = before.progress["history"] if before is not None else []
        return TorchTrainer(
            run_worker,
            train_loop_config={
                "config": recipe,
                "shards": self.study.shards,
                "pretrained": ray.put(pretrained),
                "start": f"{folder.path}/{before.name}" if before is not None else "",
                "ingest": "resident",
                "resident_bytes": 0,  # nobody asks
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=slots.workers,
                use_gpu=slots.gpus > 0,
                resources_per_worker=slots.bundle(),
            ),
            torch_config=torch_config(gpu=slots.gpus > 0),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root,
                storage_filesystem=folder.filesystem,
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=1, checkpoint_score_attribute="score"
                ),
                callbacks=[_Hand(recipe, self.reports, self.answers, history)],
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )


class _Hand(FailFast):
    """Runs in Ray Train's controller: hands epochs to the trial and obeys its answer.

    Args:
        recipe: the trial's.
        history: rows of the epochs that the trial did before.
    """

    def __init__(
        self,
        recipe: TrainConfig,
        reports: Queue,
        answers: Queue,
        history: list[dict[str, float]],
    ) -> None:
        self.recipe, self.reports, self.answers = recipe, reports, answers
        self._objective: list[float] = []
        for row in history:
            trial_metrics(recipe, row, [], [], self._objective)

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Hand over rank 0's report, which is every rank's."""
        if "row" not in metrics[0]:
            return  # a node is about to go: a checkpoint in mid-epoch
        first = metrics[0]
        told = first["row"], first["learning_rates"], first["confusion"]
        self.reports.put(trial_metrics(self.recipe, *told, self._objective))
        if not self.answers.get():
            raise StoppedTrialError


def _told_of(recipe: TrainConfig, progress: dict[str, Any]) -> list[dict[str, Any]]:
    """What Tune is told of every epoch before a checkpoint.

    Of their validation counts the checkpoint has those of the kept epoch alone.
    """
    rows = progress["history"]
    kept = selected_epoch(rows, recipe.keep) if rows else 0
    objective: list[float] = []
    return [
        trial_metrics(
            recipe, row, lr, progress["selected_confusion"] if index == kept else [], objective
        )
        for index, (row, lr) in enumerate(zip(rows, learning_rates_by_epoch(progress), strict=True))
    ]
