"""Ray Train around the loop: workers, storage, failures, and the run's record.

The loop runs in Ray's workers. Once an epoch's checkpoint is stored, Ray's controller, which lives
on the driver's machine, appends a line to a journal file there; the driver reads it, shows the
epoch and delivers it to MLflow. So neither the tracker nor the terminal sees workers come and go.

A worker or its node may be lost: Ray starts others, which go on from the newest checkpoint. Where
Ray's controller is lost the driver starts another, and where the driver is lost the same command
does: a run's name follows from its recipe and shards, and its folder holds all it needs.
"""

import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray as core
import ray.train
from ray.train import ControllerError, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchTrainer

from ser_ray.cluster import (
    cluster,
    cpus_per_worker,
    has_gpus,
    placement_groups,
    remove_placement_groups,
    require_kept,
    require_shared,
    require_workers,
)
from ser_ray.distributed.callbacks import EpochLine, JournalReader, JournalWriter
from ser_ray.distributed.config import RunConfig
from ser_ray.distributed.process_group import torch_config
from ser_ray.distributed.run_folder import SELECTED, RunFolder, Stored
from ser_ray.distributed.worker import run_worker
from ser_ray.errors import CheckpointError, SerRayError, TrackingError
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage.paths import absolute, location_inside
from ser_ray.tracking.provenance import provenance
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker, now_ms
from ser_ray.training.checkpoint import CheckpointCard
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import describe_split, select_rows
from ser_ray.training.metrics import selected_metrics
from ser_ray.training.model import Pretrained, read_pretrained
from ser_ray.training.streaming import require_streamable, resident_bytes
from ser_ray.training.trainer import require_workers_fit

POLL_SECONDS = 0.2
RESIZE_SECONDS = 30.0
"""Between two looks whether an elastic training has room for more workers."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training."""

    name: str
    checkpoint: str
    """Location of the selected checkpoint."""
    card: CheckpointCard
    run_id: str
    tracking_uri: str
    history: list[dict[str, float]]
    """A row for every epoch."""
    selected: dict[str, float]
    """The row of the epoch whose weights are kept."""


def train(
    shards_location: str,
    config: TrainConfig,
    run: RunConfig,
    *,
    on_epoch: EpochLine,
    address: str = "",
) -> TrainResult:
    """Train one fold of a shard set on a cluster, or go on with it.

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: before any worker
            starts where that can be known.
        SerRayError: the training failed; says why.
    """
    shards = open_shards(absolute(shards_location))
    parts = select_rows(shards.clips(), config)
    require_workers_fit(config, len(parts.train), run.worker_range[1])
    if run.ingest == "stream":
        require_streamable(config)
    split = describe_split(parts)
    folder = RunFolder(absolute(run.storage), run.name or run_name(config, shards))
    with folder.lock() as lock:
        folder.require_same(identity_of(config, shards))
        if folder.record().get("delivered"):
            return _finished(folder)
        pretrained = read_pretrained(config.weights, len(shards.card.labels))
        with cluster(address):
            scaling = _scaling(run)
            require_shared(shards.uri, folder.storage)
            tracker = _start_tracker(config, run, folder, shards, split)
            try:
                journal = JournalReader(folder.journal(), tracker, on_epoch)
                if not folder.record().get("finished"):
                    _Job(config, run, shards, pretrained, folder, scaling).run(journal)
                lock.check()
                _conclude(folder, journal, shards.uri, audio=run.audio)
            except BaseException as error:
                tracker.abandon(error)
                raise
        return _finished(folder)


def run_name(config: TrainConfig, shards: ShardSet) -> str:
    """Name that says what a run is, equal for equal recipes on equal shards."""
    identity = f"{config.fingerprint}{shards.card.fingerprint}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{config.feature}-{config.protocol}-fold{config.fold}-seed{config.seed}-{digest}"


def identity_of(config: TrainConfig, shards: ShardSet) -> dict[str, Any]:
    """What must not change under a run's name."""
    return {
        "labels": list(shards.card.labels),
        "shards_fingerprint": shards.card.fingerprint,
        "config": config.to_dict(),
    }


def _scaling(run: RunConfig) -> ray.train.ScalingConfig:
    fewest, most = run.worker_range
    gpu = run.device == "gpu" or (run.device == "auto" and has_gpus())
    require_workers(fewest, cpus=1, gpus=1 if gpu else 0)
    return ray.train.ScalingConfig(
        num_workers=fewest if fewest == most else (fewest, most),
        use_gpu=gpu,
        resources_per_worker=None if gpu else {"CPU": float(cpus_per_worker(most))},
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def _start_tracker(
    config: TrainConfig,
    run: RunConfig,
    folder: RunFolder,
    shards: ShardSet,
    split: dict[str, Any],
) -> Tracker:
    card, record = shards.card, folder.record()
    tags = provenance() | {
        "protocol": split["label"],
        "corpus": card.corpus,
        "shards.fingerprint": card.fingerprint,
        "shards.location": shards.uri,
        "hardware.cluster": json.dumps(
            {key: core.cluster_resources().get(key, 0) for key in ("CPU", "GPU")}
        ),
        "ray.job_id": core.get_runtime_context().get_job_id(),
        "storage": folder.location,
    }
    params = config.to_dict() | {"features": asdict(card.features)}
    params |= {"workers": run.workers, "ingest": run.ingest}
    uri = resolve_uri(run.tracking_uri)
    require_kept(uri)
    known = record.get("run_id", "") if record.get("tracking_uri") == uri else ""
    tracker = Tracker.start(
        uri, run.experiment, name=folder.name, params=params, tags=tags, run_id=known
    )
    folder.update_record(
        run_id=tracker.run_id, tracking_uri=uri, identity=identity_of(config, shards)
    )
    return tracker


class _Job:
    """A training as Ray runs it."""

    def __init__(
        self,
        config: TrainConfig,
        run: RunConfig,
        shards: ShardSet,
        pretrained: Pretrained,
        folder: RunFolder,
        scaling: ray.train.ScalingConfig,
    ) -> None:
        self.folder, self.scaling, self.max_failures = folder, scaling, run.max_failures
        self.arguments = {
            "config": config,
            "shards": shards,
            "pretrained": core.put(pretrained),
            "ingest": run.ingest,
            "resident_bytes": resident_bytes(shards, config),
        }

    def run(self, journal: JournalReader) -> None:
        """Train to the end; a lost controller is replaced as lost workers are.

        Raises:
            SerRayError: the training failed, or the user has something to mend.
        """
        failures, before = 0, placement_groups()
        while True:
            try:
                self._run_once(journal)
            except core.exceptions.RayActorError as error:
                failures += 1
                if failures > self.max_failures != -1:
                    raise self._failed(error) from error
                logger.warning("Ray's training controller was lost: starting another")
                # Ray's own cleaner asks the dashboard who lives, and local clusters have none.
                remove_placement_groups(placement_groups() - before)
            except TrainingFailedError as error:
                raise own_error(error) or self._failed(error) from error
            else:
                return

    def _run_once(self, journal: JournalReader) -> None:
        """Start workers where the training stands, and wait until they are done."""
        newest = self.folder.newest()
        self.folder.tidy(newest)
        if newest is not None:
            journal.recover(newest.progress)
        # Ray's fit takes Ctrl-C for itself in the main thread.
        executor = ThreadPoolExecutor(1, thread_name_prefix="ray-train")
        result = executor.submit(self._trainer(newest, journal.journal).fit)
        executor.shutdown(wait=False)
        try:
            while not result.done():
                wait([result], timeout=POLL_SECONDS)
                journal.read()
        finally:
            journal.read()
        result.result()

    def _trainer(self, newest: Stored | None, journal: Path) -> TorchTrainer:
        folder = self.folder
        start = f"{folder.path}/{newest.name}" if newest is not None else ""
        # Ray asks the workers for what they report this often, and takes one report each time.
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(POLL_SECONDS))
        if self.scaling.elasticity_enabled:
            # It first counts a lost node's places as still there, and waits this long for them.
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
        return TorchTrainer(
            run_worker,
            train_loop_config=self.arguments | {"start": start},
            scaling_config=self.scaling,
            torch_config=torch_config(gpu=self.scaling.use_gpu),
            run_config=ray.train.RunConfig(
                name=folder.name,
                storage_path=folder.root,
                storage_filesystem=folder.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=self.max_failures),
                # The two selected last, for one may not be whole, and, always, the latest: `score`
                # rises with every newly selected epoch.
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2, checkpoint_score_attribute="score"
                ),
                callbacks=[JournalWriter(journal)],
                logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            ),
        )

    def _failed(self, error: Exception) -> SerRayError:
        trace = self.folder.journal().with_name("error.txt")
        lines = [line for line in str(error).splitlines() if line.strip()]
        where = ""
        with suppress(OSError):  # a full disk may be what it is about
            trace.write_text(str(error))
            where = f" (the whole trace is in {trace})"
        return SerRayError(
            f"the training failed: {lines[-1] if lines else 'no reason given'}{where}; the same "
            "command goes on from the last epoch"
        )


def own_error(error: TrainingFailedError) -> SerRayError | None:
    """The error whose message is written for the user, among those that a training failed for."""
    causes: list[Exception] = []
    if isinstance(error, ControllerError):
        causes = [error.controller_failure]
    elif isinstance(error, WorkerGroupError):
        causes = list(error.worker_failures.values())
    return next((cause for cause in causes if isinstance(cause, SerRayError)), None)


def _conclude(folder: RunFolder, journal: JournalReader, shards: str, *, audio: bool) -> None:
    """Keep the selected checkpoint under a fixed name, and deliver what the run has shown.

    A tracking server that is away now costs a warning: the same command delivers it later.
    """
    newest = folder.newest()
    if newest is None:
        raise CheckpointError(f"{folder.location}: the training left no checkpoint")
    tracker = journal.tracker
    journal.recover(newest.progress)  # a driver elsewhere may have shown what this one has not
    with TemporaryDirectory() as selected:
        origin = {"run_id": tracker.run_id, "tracking_uri": tracker.uri}
        card = folder.keep_selected(newest, origin, Path(selected))
        folder.update_record(finished=True)
        from ser_ray.evaluation.evaluate import evaluate  # slow, with its pages: matplotlib
        from ser_ray.evaluation.pages import run_page

        try:
            page = run_page(
                evaluate(Path(selected), shards, part="validation"),
                name=folder.name,
                history=newest.progress["history"],
                learning_rates=newest.progress["learning_rates"],
                audio=audio,
            )
            _log_outcome(tracker, Path(selected), card, newest.progress, page)
        except TrackingError as error:
            folder.update_record(undelivered=str(error))
            logger.warning("%s", error)
        else:
            folder.update_record(delivered=True, undelivered="")
    folder.tidy(newest)


def _log_outcome(
    tracker: Tracker,
    checkpoint: Path,
    card: CheckpointCard,
    progress: dict[str, Any],
    page: str,
) -> None:
    import numpy as np

    from ser_ray.plots.scores import confusion_figure
    from ser_ray.plots.training import curves_figure

    selected, history = progress["selected"], progress["history"]
    tracker.log_metrics(selected_metrics(selected), 0, now_ms())
    tracker.deliver()
    title = f"validation, {card.split['label']}, {card.trained_on}"
    confusion = np.asarray(progress["selected_confusion"])
    tracker.set_tags({"initial_weights": card.initial_weights})
    tracker.log_files(
        {
            "report.html": page,
            "plots/validation_confusion.png": confusion_figure(confusion, card.labels, title),
            "plots/curves.png": curves_figure(history, selected, title),
            "tables/history.json": history,
            "config.json": card.config.to_dict(),
        }
    )
    tracker.log_model(checkpoint, card.labels)
    tracker.finish("FINISHED")


def _finished(folder: RunFolder) -> TrainResult:
    """What a finished run's folder says of it."""
    newest, record = folder.newest(), folder.record()
    if newest is None:
        raise CheckpointError(
            f"{folder.location}: the run is finished, but its last checkpoints are gone or cut "
            "short; give another --name to train again"
        )
    return TrainResult(
        name=folder.name,
        checkpoint=location_inside(folder.location, SELECTED),
        card=folder.selected_card(),
        run_id=record["run_id"],
        tracking_uri=record["tracking_uri"],
        history=newest.progress["history"],
        selected=newest.progress["selected"],
    )
