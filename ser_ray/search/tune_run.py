"""Running the trials of a study on Ray Tune.

Every trial runs in an actor, which the next trial reuses with its imports and CUDA context. Ray
Tune restores an interrupted study from its own snapshots: ended trials are kept, running ones
resume from their checkpoints, and those whose process failed too often are retried. Snapshots hold
the trials, the searcher and the callbacks; ASHA continues from the results of the trials.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from ray import tune

from ser_ray.cluster import in_words, placement_groups
from ser_ray.distributed.group import PlaceWatch
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search.actor import OBJECTIVE, TrialSetup, run_trial
from ser_ray.search.plan import Plan
from ser_ray.search.ray_internals import has_snapshot
from ser_ray.search.slots import Slots
from ser_ray.training.model import Pretrained

SNAPSHOT_SECONDS = 2
"""Time between two snapshots of a study; a driver that is killed loses at most this much."""


def run_trials(
    setup: TrialSetup,
    pretrained: dict[str, Pretrained],
    plan: Plan,
    folder: RunFolder,
    study: tune.Callback,
    max_failures: int,
) -> None:
    """Run the trials of a study, or the remaining ones of an interrupted study.

    Args:
        setup: what all trials share.
        pretrained: initial weights for every value of `TrainConfig.weights` that may be drawn.
        plan: which trials the study has and in which order they run.
        folder: the study's folder.
        study: Ray Tune calls it for everything that happens to a trial.
        max_failures: how often a trial is retried after its process failed.

    Raises:
        KeyboardInterrupt: Ctrl-C ended it; the same call resumes.
        ResourcesError: there was no room for any trial.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(SNAPSHOT_SECONDS))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints whatever `verbose` says
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, setup=setup, pretrained=pretrained),
        tune.PlacementGroupFactory([setup.slots.bundle()]),
    )
    resume = tune.ResumeConfig(errored=tune.ResumeConfig.ResumeType.RESUME)
    # `Tuner.restore` would keep the slots and paths of the first start in searcher and callbacks.
    with _interruptible():
        tune.run(
            trainable,
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            resume_config=resume if has_snapshot(folder) else None,
            metric=OBJECTIVE,
            mode="max",
            config=plan.space,
            num_samples=plan.num_samples,
            search_alg=plan.algorithm,
            scheduler=plan.scheduler,
            callbacks=[study, RoomCallback(setup.slots)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            max_failures=max_failures,
            reuse_actors=True,
            trial_dirname_creator=attrgetter("trial_id"),
            raise_on_failed_trial=False,
            verbose=0,
        )


class RoomCallback(tune.Callback):
    """Says every minute that no trial has room (`ser_ray.distributed.group.PlaceWatch`)."""

    def __init__(self, slots: Slots) -> None:
        need = f"a trial with {in_words(slots.bundle())}"
        self.watch = PlaceWatch(placement_groups(), need)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look for room after each turn of Tune's loop."""
        self.watch.require_places()


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block if Ctrl-C ended it, and restore the signal's handler.

    Tune handles SIGINT itself, and then returns as if all trials had ended. At the first signal it
    restores the handler that was there before; without a signal it leaves its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
        interrupted = signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, handler)
    if interrupted:
        raise KeyboardInterrupt
