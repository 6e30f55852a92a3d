"""Many trainings at once, on Ray Tune.

A trial is what `ser-ray train` runs: one worker calls the loop inside Tune's own actor, which the
next trial takes over with its imports and CUDA context; several workers are a Ray Train group that
the trial's actor drives. Tune writes down what its trials do, line by line, in a journal on the
driver's machine (`trial_journal`); `ser_ray.search.study` reads it.

An interrupted study is restored by Ray Tune: finished trials are kept, running ones go on from
their checkpoints, which are at most `CHECKPOINT_SECONDS` old. The searcher's memory is part of
Tune's snapshots; ASHA's is not, and is read from the trials themselves. Where every trial is
needed, as in a cross-validation, failed ones are trained again as well.
"""

import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow import fs
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import ConcurrencyLimiter, SearchAlgorithm, Searcher
from ray.tune.search.basic_variant import BasicVariantGenerator

from ser_ray.cluster import has_gpus, nodes_within_reach, require_kept
from ser_ray.distributed.config import RunConfig
from ser_ray.distributed.run_folder import SELECTED, RunFolder
from ser_ray.errors import ConfigError, ResourcesError
from ser_ray.search.group_trial import GroupTrial
from ser_ray.search.space import SlotConfig, recipe_of
from ser_ray.search.study import Show, Study
from ser_ray.search.study_journal import StudyJournal
from ser_ray.search.trial import (
    OBJECTIVE,
    PROBLEMS,
    Slots,
    TrialSetup,
    problem_metrics,
    trial_metrics,
)
from ser_ray.search.trial_journal import JournalCallback
from ser_ray.tracking.provenance import provenance
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.checkpoint import PROGRESS, STATE, Snapshot, read_progress
from ser_ray.training.config import TrainConfig
from ser_ray.training.model import Pretrained
from ser_ray.training.trainer import EpochReport, MakeSnapshot, fit

CHECKPOINT_SECONDS = 30.0
SNAPSHOT_SECONDS = 2
"""Between two snapshots of the study's state; a driver that is killed forgets at most this much."""


def find_slots(run: RunConfig, config: SlotConfig) -> Slots:
    """Count the trials that the cluster has room for at once.

    Raises:
        ResourcesError: not even one.
    """
    gpu = run.device == "gpu" or (run.device == "auto" and has_gpus())
    cpus, gpus = config.cpus_per_worker, config.gpus_per_worker if gpu else 0.0
    nodes = nodes_within_reach()
    room = sum(_room(node, cpus, gpus) for node in nodes)
    workers = fixed_workers(run)
    if room < workers:
        sizes = [f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes]
        kinds = "; ".join(dict.fromkeys(sizes))
        raise ResourcesError(
            f"a trial of {workers} workers with {cpus} CPUs and {gpus:g} GPUs each can never "
            f"start: the cluster's nodes ({kinds}) have room for {room}; ask for less with "
            "--workers, --cpus-per-worker or --gpus-per-worker"
            + (", or train on CPUs with --device cpu" if gpu else "")
        )
    return Slots(count=room // workers, workers=workers, cpus=cpus, gpus=gpus)


def fixed_workers(run: RunConfig) -> int:
    """Workers of every trial.

    Raises:
        ConfigError: a range, which would give trials of different size.
    """
    fewest, most = run.worker_range
    if fewest != most:
        raise ConfigError(f"workers is {run.workers}: trials take a number, not a range")
    return fewest


def _room(node: dict[str, float], cpus: int, gpus: float) -> int:
    """Workers that fit on a node; a share of a GPU lies on one GPU."""
    room = int(node.get("CPU", 0) // cpus)
    if gpus >= 1:
        return min(room, int(node.get("GPU", 0) // gpus))
    if gpus:
        return min(room, int(node.get("GPU", 0)) * math.floor(1 / gpus + 1e-9))
    return room


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which trials there are to be and how they are selected."""

    space: dict[str, Any]
    """Name -> value, Tune's domain or grid."""
    algorithm: Searcher | SearchAlgorithm
    num_samples: int
    scheduler: TrialScheduler | None = None


class _OwnSlots:
    """As many trials at once as there are slots now, not as when the snapshot was taken."""

    max_concurrent: int

    def set_state(self, state: dict[str, Any]) -> None:
        """Take up a snapshot's memory, without its slots."""
        super().set_state(state | {"max_concurrent": self.max_concurrent})  # type: ignore[misc]


class SlotLimiter(_OwnSlots, ConcurrencyLimiter):
    """Asks a searcher for no more trials than there are slots."""


class SlotVariants(_OwnSlots, BasicVariantGenerator):
    """A grid or random draws, no more at once than there are slots."""


def grid_plan(grid: dict[str, list[Any]], slots: Slots) -> Plan:
    """Every combination of some values once, the last name changing fastest."""
    return Plan(
        space={name: tune.grid_search(values) for name, values in grid.items()},
        algorithm=SlotVariants(max_concurrent=slots.count),
        num_samples=1,
        scheduler=RetryFailed(),
    )


def open_study(
    setup: TrialSetup,
    folder: RunFolder,
    run: RunConfig,
    label: str,
    identity: dict[str, Any],
    show: Show,
) -> Study:
    """Open a study's run in MLflow, or go on with it.

    Args:
        label: protocol, and whether it is speaker-dependent.
        identity: what the study is, apart from its shards and where it runs.

    Raises:
        CheckpointError: the folder is another study's.
        ResourcesError: the store is in what Ray will delete after the job.
        TrackingError: the store cannot be reached.
    """
    card = setup.shards.card
    # Ray Tune restores no trial of one worker as one of several.
    identity = identity | {"shards": card.fingerprint, "workers": setup.slots.workers}
    folder.require_same(identity)
    tags = provenance() | {
        "protocol": label,
        "corpus": card.corpus,
        "shards.fingerprint": card.fingerprint,
        "shards.location": setup.shards.uri,
        "ray.job_id": ray.get_runtime_context().get_job_id(),
        "storage": folder.location,
    }
    uri, record = resolve_uri(run.tracking_uri), folder.record()
    require_kept(uri)
    tracker = Tracker.start(
        uri,
        run.experiment,
        name=folder.name,
        params=identity | {"slots": asdict(setup.slots)},
        tags=tags,
        run_id=record.get("run_id", "") if record.get("tracking_uri") == uri else "",
    )
    folder.update_record(run_id=tracker.run_id, tracking_uri=uri, identity=identity)
    return Study(
        StudyJournal(folder),
        setup.recipe,
        tracker,
        name=folder.name,
        experiment=run.experiment,
        labels=card.labels,
        tags=tags,
        show=show,
    )


def run_trials(
    setup: TrialSetup,
    pretrained: dict[str, Pretrained],
    plan: Plan,
    folder: RunFolder,
    journal: StudyJournal,
    max_failures: int,
) -> None:
    """Run the trials of a study, or those that an interrupted one has left.

    Args:
        pretrained: the start of every value of `TrainConfig.weights` that may occur.
        journal: every event of a trial is appended to it.
        max_failures: times that a trial goes on after its process was lost.
    """
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", str(SNAPSHOT_SECONDS))
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # prints whatever `verbose` says
    slots = setup.slots
    # A trial of several workers only drives them, and Ray Train reserves their places; but a
    # placement group must ask for something: one byte.
    alone = slots.workers == 1
    own = slots.bundle() if alone else {"memory": 1}
    trainable = tune.with_resources(
        tune.with_parameters(
            run_trial if alone else GroupTrial, setup=setup, pretrained=pretrained
        ),
        tune.PlacementGroupFactory([own]),
    )
    errored = tune.ResumeConfig.ResumeType.RESUME
    # Not by `Tuner`, which restores searcher and callbacks with the first start's slots and paths.
    with _interruptible():
        tune.run(
            trainable,
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            resume_config=tune.ResumeConfig(errored=errored) if _is_begun(folder) else None,
            metric=OBJECTIVE,
            mode="max",
            config=plan.space,
            num_samples=plan.num_samples,
            search_alg=plan.algorithm,
            scheduler=plan.scheduler,
            callbacks=[JournalCallback(journal)],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_at_end=False),
            max_failures=max_failures,
            reuse_actors=alone,
            trial_dirname_creator=_trial_folder,
            raise_on_failed_trial=False,
            verbose=0,
        )


def run_trial(values: dict[str, Any], setup: TrialSetup, pretrained: dict[str, Pretrained]) -> None:
    """Train one trial of one worker, in Tune's own actor, and report every epoch."""
    recipe = recipe_of(setup.recipe, values)
    with tempfile.TemporaryDirectory() as scratch:
        reporter = _Reporter(recipe, Path(scratch), keep_selected=setup.finish is not None)
        try:
            _train(recipe, setup, pretrained[recipe.weights], reporter)
            if setup.finish is not None:
                setup.finish(reporter.selected, setup.shards, recipe)
        except PROBLEMS as problem:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tune.report(problem_metrics(problem, reporter.objective))


def _train(
    recipe: TrainConfig, setup: TrialSetup, pretrained: Pretrained, reporter: "_Reporter"
) -> None:
    """Train in this process, or go on from the trial's checkpoint."""
    torch.set_num_threads(setup.slots.cpus)
    device = torch.device("cuda" if setup.slots.gpus else "cpu")
    checkpoint = tune.get_checkpoint()
    # A trial that had ended has none any more, and a snapshot may not know of its end.
    if checkpoint is None or read_progress(checkpoint.filesystem, checkpoint.path) is None:
        fit(recipe, setup.shards, pretrained, reporter, device=device)
        return
    with checkpoint.as_directory() as directory:
        reporter.go_on(Path(directory))
        resume = Path(directory)
        fit(recipe, setup.shards, pretrained, reporter, resume=resume, device=device)


class _Reporter:
    """Hands the loop's epochs to Tune, with a checkpoint now and then.

    Args:
        recipe: the trial's.
        scratch: an empty directory.
        keep_selected: keep the checkpoint of the selected epoch as well, in `selected`.
    """

    def __init__(self, recipe: TrainConfig, scratch: Path, *, keep_selected: bool) -> None:
        self.recipe = recipe
        self.latest, self.selected = scratch / "latest", scratch / SELECTED
        self.keep_selected = keep_selected
        self.objective: list[float] = []
        """What the search raises, by epoch."""
        self._saved = time.monotonic()

    def __call__(self, epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        """Report one epoch."""
        assert epoch is not None, "nothing asks for a report in mid-epoch"
        # Where the last is kept, each is the selected one so far, and only the end is worth a file.
        worth_it = self.recipe.keep == "best" or epoch.row["epoch"] == self.recipe.epochs
        if self.keep_selected and epoch.is_selected and worth_it:
            _write(make_snapshot(), self.selected)
        metrics = trial_metrics(
            self.recipe, epoch.row, epoch.learning_rates, epoch.confusion, self.objective
        )
        if time.monotonic() - self._saved < CHECKPOINT_SECONDS:
            tune.report(metrics)
            return
        _write(make_snapshot(), self.latest)
        if self.selected.exists():
            shutil.copytree(
                self.selected, self.latest / SELECTED, ignore=shutil.ignore_patterns(STATE)
            )
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(self.latest))
        self._saved = time.monotonic()

    def go_on(self, checkpoint: Path) -> None:
        """Take up what a checkpoint says of the epochs before it."""
        progress = json.loads((checkpoint / PROGRESS).read_text())
        for row in progress["history"]:
            trial_metrics(self.recipe, row, [], [], self.objective)
        if (checkpoint / SELECTED).exists():
            shutil.copytree(checkpoint / SELECTED, self.selected)


def _write(snapshot: Snapshot, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    snapshot.write(directory)


class ResumableAsha(ASHAScheduler):
    """ASHA (Li 2018) whose rungs follow from the trials.

    Ray Tune's snapshots leave the scheduler out; after a restore every trial is added again, with
    its last result, and what the rungs held of it is held again.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put a restored trial back on the rungs it had reached."""
        super().on_trial_add(tune_controller, trial)
        past = (trial.last_result or {}).get("objective_by_epoch", [])
        for epoch, value in enumerate(past, start=1):
            self._trial_info[trial.trial_id].on_result(trial, epoch, value)


class RetryFailed(FIFOScheduler):
    """Trials in their order, and after a restore again those that had a problem.

    To Ray Tune they have ended as any other; one whose process failed it starts again by itself.
    """

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Put a restored trial that had a problem back in the queue."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == trial.TERMINATED and "problem" in (trial.last_result or {}):
            trial.set_status(trial.PENDING)


def _trial_folder(trial: Any) -> str:
    return str(trial.trial_id)


def _is_begun(folder: RunFolder) -> bool:
    """Whether Tune has left a snapshot to go on from."""
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    names = [info.base_name for info in folder.filesystem.get_file_info(selector)]
    return any(name.startswith("experiment_state-") for name in names)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block if Ctrl-C ended it, and restore the signal's handler.

    Tune installs its own handler for SIGINT and then returns as if all trials had ended. At the
    first signal it restores the handler it found, and otherwise it leaves its own.
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
