"""Ray Train around the loop: workers, storage, failures, and the run's record.

The loop runs in Ray's workers. After every epoch Ray's controller, which lives on the driver's
machine, appends a line to a journal file there; the driver reads it, shows the epoch and delivers
it to MLflow. So neither the tracker nor the terminal sees workers come and go, and what a tracking
server missed is still in the journal.

The same command goes on where an interrupted one stopped: a run's name follows from its recipe and
shards, and its folder on the storage holds the checkpoints and which MLflow run it belongs to.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import ray.train
import torch
from pyarrow import fs
from ray.train import Checkpoint, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from ser_ray.cluster import cluster, cpus_per_worker, has_gpus, require_workers
from ser_ray.errors import CheckpointError, SerRayError
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage import absolute, filesystem_of
from ser_ray.tracking import Tracker, now_ms, provenance, resolve_uri
from ser_ray.training.checkpoint import CARD, MODEL, CheckpointCard, read_card, read_state
from ser_ray.training.config import RunConfig, TrainConfig
from ser_ray.training.data import describe, select_rows
from ser_ray.training.loop import EpochReport, Save, fit
from ser_ray.training.model import Pretrained, read_pretrained

RECORD = "run.json"
"""Beside the checkpoints: which MLflow run they belong to, and whether the training is done."""
BEST = "best"
"""Beside them, once the training is done: the chosen checkpoint."""
POLL_SECONDS = 0.2

EpochLine = Callable[[dict[str, float]], None]
"""Shows an epoch's row."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training."""

    name: str
    checkpoint: str
    """Location of the chosen checkpoint."""
    card: CheckpointCard
    run_id: str
    tracking_uri: str
    history: list[dict[str, float]]
    """A row for every epoch."""
    best: dict[str, float]
    """The row of the chosen epoch: the best validation UA, then loss."""


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
    split = select_rows(shards.clips(), config)
    pretrained = read_pretrained(config.weights, len(shards.card.labels))
    name = run.name or run_name(config, shards)
    folder = RunFolder(run.storage, name)
    with cluster(address):
        scaling = _scaling(run)
        tracker = _start_tracker(config, run, folder, shards, describe(split))
        journal = folder.journal()
        follower = Follower(journal, tracker, on_epoch)
        try:
            if not folder.record().get("finished"):
                _fit(config, run, shards, pretrained, folder, scaling, journal, follower)
            result = _conclude(folder, tracker)
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
    return result


def run_name(config: TrainConfig, shards: ShardSet) -> str:
    """Name that says what a run is, equal for equal recipes on equal shards."""
    identity = f"{config.fingerprint}{shards.card.fingerprint}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{config.feature}-{config.protocol}-fold{config.fold}-seed{config.seed}-{digest}"


class RunFolder:
    """A run's folder on the storage."""

    def __init__(self, storage: str, name: str) -> None:
        self.storage, self.name = storage, name
        self.filesystem, root = filesystem_of(storage)
        self.root = root
        self.path = f"{root.rstrip('/')}/{name}"

    @property
    def location(self) -> str:
        """Where it is, as a user would type it."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    def record(self) -> dict[str, Any]:
        """The run's record; empty before its first start."""
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{RECORD}") as stream:
                record: dict[str, Any] = json.loads(stream.read())
        except FileNotFoundError:
            return {}
        return record

    def update_record(self, **values: Any) -> None:
        """Change entries of the record."""
        content = json.dumps(self.record() | values, indent=2).encode()
        self.filesystem.create_dir(self.path, recursive=True)
        with self.filesystem.open_output_stream(f"{self.path}/{RECORD}.tmp") as stream:
            stream.write(content)
        self.filesystem.move(f"{self.path}/{RECORD}.tmp", f"{self.path}/{RECORD}")

    def journal(self) -> Path:
        """The driver's own file of epoch lines: beside a local run, else in the output folder."""
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        folder = Path(self.path) if local else Path("ser-ray-out/journals", self.name)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "epochs.jsonl").absolute()


class JournalCallback(UserCallback):
    """Runs in Ray's controller, on the driver's machine: writes each epoch's report down."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Append rank 0's report, which is every rank's, as one line."""
        line = json.dumps(metrics[0] | {"timestamp_ms": now_ms()})
        with self.journal.open("a") as file:
            file.write(line + "\n")


class Follower:
    """Reads the journal in the driver while training runs: shows epochs and delivers them."""

    def __init__(self, journal: Path, tracker: Tracker, on_epoch: EpochLine) -> None:
        self.journal, self.tracker, self.on_epoch = journal, tracker, on_epoch
        self._seen: set[int] = set()
        self._offset = 0
        self._stop = Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self.read(show=False)  # what an earlier start of the run left

    def start(self) -> None:
        """Follow in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Read what is left and stop."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.read()

    def read(self, *, show: bool = True) -> None:
        """Take up the lines written since the last call."""
        if not self.journal.exists():
            return
        with self.journal.open() as file:
            file.seek(self._offset)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break  # half a line: the controller is writing it
                self._offset += len(line.encode())
                self._take(json.loads(line), show=show)
        self.tracker.flush()

    def _take(self, report: dict[str, Any], *, show: bool) -> None:
        row, epoch = report["row"], int(report["row"]["epoch"])
        if epoch in self._seen:
            return  # an epoch done again after a lost worker: the same numbers
        self._seen.add(epoch)
        when, rates = report["timestamp_ms"], report["lr"]
        self.tracker.log_metrics({k: v for k, v in row.items() if k != "epoch"}, epoch, when)
        first = (epoch - 1) * len(rates)
        for step, rate in enumerate(rates, start=first):
            self.tracker.log_metrics({"lr_step": rate}, step, when)
        if show:
            self.on_epoch(row)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.read()


def _scaling(run: RunConfig) -> ray.train.ScalingConfig:
    gpu = run.device == "gpu" or (run.device == "auto" and has_gpus())
    if gpu:
        require_workers(run.workers, cpus=1, gpus=1)
        return ray.train.ScalingConfig(num_workers=run.workers, use_gpu=True)
    require_workers(run.workers, cpus=1, gpus=0)
    cpus = cpus_per_worker(run.workers)
    return ray.train.ScalingConfig(
        num_workers=run.workers, resources_per_worker={"CPU": float(cpus)}
    )


def _start_tracker(
    config: TrainConfig,
    run: RunConfig,
    folder: RunFolder,
    shards: ShardSet,
    split: dict[str, Any],
) -> Tracker:
    import ray as core

    card = shards.card
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
    params = config.to_dict() | {"features": asdict(card.features), "workers": run.workers}
    uri = resolve_uri(run.tracking_uri)
    tracker = Tracker.start(
        uri,
        run.experiment,
        name=folder.name,
        params=params,
        tags=tags,
        run_id=folder.record().get("run_id", ""),
    )
    folder.update_record(run_id=tracker.run_id)
    return tracker


def _fit(
    config: TrainConfig,
    run: RunConfig,
    shards: ShardSet,
    pretrained: Pretrained,
    folder: RunFolder,
    scaling: ray.train.ScalingConfig,
    journal: Path,
    follower: Follower,
) -> None:
    import ray as core

    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config,
            "shards": shards,
            "pretrained": core.put(pretrained),
        },
        scaling_config=scaling,
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=folder.name,
            storage_path=folder.root,
            storage_filesystem=folder.filesystem,
            failure_config=ray.train.FailureConfig(max_failures=run.max_failures),
            # The best and, always, the latest; `score` rises with every new best epoch.
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="score"
            ),
            callbacks=[JournalCallback(journal)],
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    follower.start()
    try:
        problem = trainer.fit().return_value
    except TrainingFailedError as error:
        trace = journal.with_name("error.txt")
        trace.write_text(str(error))
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise SerRayError(
            f"the training failed: {lines[-1] if lines else 'no reason given'} (the whole trace is "
            f"in {trace}); the same command goes on from the last epoch"
        ) from error
    finally:
        follower.stop()
    if isinstance(problem, SerRayError):
        raise problem


def _worker(arguments: dict[str, Any]) -> SerRayError | None:
    """Run the loop as one of Ray Train's workers.

    What is the user's to mend is returned, not raised: a new worker would meet it again.
    """
    import ray as core

    context = ray.train.get_context()

    def report(epoch: EpochReport, save: Save) -> None:
        metrics = {
            "row": epoch.row,
            "lr": epoch.lr,
            "confusion": epoch.confusion,
            "score": epoch.row["epoch"] if epoch.is_best else 0,
        }
        if context.get_world_rank() > 0:
            ray.train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as directory:
            save(Path(directory))
            ray.train.report(metrics, checkpoint=Checkpoint.from_directory(directory))

    def run(resume: Path | None) -> None:
        fit(
            arguments["config"],
            arguments["shards"],
            core.get(arguments["pretrained"]),
            report,
            resume=resume,
            device=get_device(),
        )

    if device_threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(device_threads))
    checkpoint = ray.train.get_checkpoint()
    try:
        if checkpoint is None:
            run(None)
        else:
            with checkpoint.as_directory() as directory:
                run(Path(directory))
    except SerRayError as problem:
        return problem
    return None


def _conclude(folder: RunFolder, tracker: Tracker) -> TrainResult:
    """Keep the chosen checkpoint under a fixed name, and complete the record of the run."""
    result = ray.train.Result.from_path(folder.path, storage_filesystem=folder.filesystem)
    if result.checkpoint is None or not result.best_checkpoints:
        raise CheckpointError(f"{folder.location}: the training left no checkpoint")
    best, metrics = max(result.best_checkpoints, key=lambda pair: pair[1]["score"])
    with result.checkpoint.as_directory() as directory:
        history = read_state(Path(directory))["history"]
    with best.as_directory() as directory, tempfile.TemporaryDirectory() as chosen:
        for name in (CARD, MODEL):  # what going on needs is not needed any more
            shutil.copy(Path(directory, name), chosen)
        origin = {"run_id": tracker.run_id, "tracking_uri": tracker.uri}
        Path(chosen, RECORD).write_text(json.dumps(origin))
        target = f"{folder.path}/{BEST}"
        folder.filesystem.create_dir(target, recursive=True)
        fs.copy_files(chosen, target, destination_filesystem=folder.filesystem)
        card = read_card(Path(chosen))
        _log_outcome(tracker, Path(chosen), card, history, metrics)
    folder.update_record(finished=True)
    tracker.finish("FINISHED")
    return TrainResult(
        name=folder.name,
        checkpoint=f"{folder.location}/{BEST}",
        card=card,
        run_id=tracker.run_id,
        tracking_uri=tracker.uri,
        history=history,
        best=metrics["row"],
    )


def _log_outcome(
    tracker: Tracker,
    checkpoint: Path,
    card: CheckpointCard,
    history: list[dict[str, float]],
    best: dict[str, Any],
) -> None:
    import numpy as np

    from ser_ray.report import confusion_figure, curves_figure

    tracker.log_metrics({f"best_{key}": value for key, value in best["row"].items()}, 0, now_ms())
    tracker.flush()
    title = f"validation, {card.split['label']}, {card.trained_on}"
    confusion = np.asarray(best["confusion"])
    tracker.set_tags({"initial_weights": card.initial_weights})
    tracker.log_files(
        {
            "plots/validation_confusion.png": confusion_figure(confusion, card.labels, title),
            "plots/curves.png": curves_figure(history, title),
            "tables/history.json": history,
            "config.json": card.config.to_dict(),
        }
    )
    tracker.log_model(checkpoint, card.labels)
