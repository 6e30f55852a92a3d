"""One training: its shards, its folder, its worker or workers and its MLflow run.

A single worker trains in this process, unless the user names a cluster. Several workers use Ray
Train. The tracker runs in the driver, so lost workers affect neither MLflow nor the terminal. If
the driver is lost, the same command resumes: the name of a run follows from its recipe and shards,
and its folder holds everything that is needed.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ser_ray.cluster.connect import cluster, is_connected, needs_ray
from ser_ray.cluster.resources import cpus_per_worker, require_workers, trains_on_gpus
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.in_process import train_in_process
from ser_ray.distributed.mlflow_run import command_like, start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import SELECTED, Epoch, RunFolder, TrainingTask
from ser_ray.errors import CheckpointError, TrackingError
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import absolute, location_inside, short_digest
from ser_ray.tracking.registry import read_initial_weights
from ser_ray.tracking.run_metadata import run_tags
from ser_ray.tracking.store import require_server, resolve_uri
from ser_ray.tracking.tracker import Tracker, has_run
from ser_ray.training.checkpoint import read_card, read_layer_weights
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.loop import require_workers_fit
from ser_ray.training.metrics import validation_rank
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig

ShowEpoch = Callable[[dict[str, float]], None]
"""Shows the row of an epoch that has just ended."""
OnEpoch = Callable[[Epoch], None]

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
    """One row per epoch."""
    selected: dict[str, float]
    """The row of the epoch whose weights are kept."""
    report: str
    """Location of the run's page."""
    undelivered: str = ""
    """Why MLflow lacks a part of the run; the same call delivers the rest."""

    def __repr__(self) -> str:
        selected, card = self.selected, self.card
        lines = [f"trained on   {card.trained_on}, {card.split['label']}"]
        if "val/ua" in selected:
            best = max(self.history, key=validation_rank)
            text = (
                f"validation   UA {selected['val/ua']:.1%}, WA {selected['val/wa']:.1%} in epoch "
                f"{selected['epoch']:.0f}, the {card.config.keep} of {len(self.history)}"
            )
            if best["epoch"] != selected["epoch"]:
                text += f"; the best UA was {best['val/ua']:.1%} in epoch {best['epoch']:.0f}"
            lines.append(text)
        lines += [f"checkpoint   {self.checkpoint}", f"report       {self.report}"]
        return "\n".join(lines)


def train(
    shards_location: str | Sequence[str],
    config: TrainConfig,
    run: RunConfig,
    *,
    on_epoch: ShowEpoch,
    address: str = "",
) -> TrainResult:
    """Train one fold of a shard set, or resume that training.

    Args:
        shards_location: folder or URI of the set, or of several that are read as one.
        on_epoch: called with the row of every new epoch; without Ray, in another thread.
        address: Ray cluster to join (`ser_ray.cluster.connect.needs_ray`).

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: before any worker
            starts, if possible.
        SerRayError: the training failed; the message gives the reason.
    """
    shards = open_corpora(shards_location, config.label_map)
    parts = select_rows(shards.clips(), config)
    require_workers_fit(config, len(parts.train), run.worker_range[1])
    folder = RunFolder(absolute(run.storage), run.name or run_name(config, shards))
    require_server(run.tracking_uri)
    with folder.lock():
        folder.require_same(identity_of(config, shards))
        if not folder.record().get("delivered"):
            pretrained = read_initial_weights(config, shards, run.tracking_uri)
            on_ray = needs_ray(address, run.worker_range[1])
            with cluster(address) if on_ray else nullcontext():
                require_shared(*shards.locations, run.storage)
                task = TrainingTask(folder, config, shards, pretrained, run)
                run_task = _place(task)
                with _start_tracker(task, parts.label) as tracker:
                    _follow(task, run_task, tracker, on_epoch)
                    _conclude(task, tracker)
        elif has_run(uri := resolve_uri(run.tracking_uri), folder.record()["run_id"]):
            folder.update_record(tracking_uri=uri)  # the store was moved together with the folder
        return _result(folder)


def run_name(config: TrainConfig, shards: ShardSet) -> str:
    """Name of a run; the same recipe on the same shards gives the same name."""
    identity = f"{config.fingerprint}{shards.card.fingerprint_of(config.feature)}"
    fold = f"{config.protocol}-fold{config.fold}-seed{config.seed}"
    return f"{config.feature}-{fold}-{short_digest(identity)}"


def identity_of(config: TrainConfig, shards: ShardSet) -> dict[str, Any]:
    """What must be the same whenever a run of this name resumes."""
    return {
        "labels": list(shards.card.labels),
        "shards_fingerprint": shards.card.fingerprint_of(config.feature),
        "config": config.to_dict(),
    }


def _place(task: TrainingTask) -> Callable[[OnEpoch], None]:
    """Return the function that trains: on the connected cluster, or in this process.

    Raises:
        ResourcesError: the workers need more than the cluster has.
    """
    fewest, most = task.run.worker_range
    gpu = trains_on_gpus(task.run.device)
    require_workers(fewest, cpus=1, gpus=1 if gpu else 0)
    cpus = cpus_per_worker(most)
    size = "one GPU" if gpu else f"{cpus} CPUs"
    where = "each" if is_connected() else "in this process"
    logger.info("%-12s %s, with %s %s", "workers", task.run.workers, size, where)
    if not is_connected():
        return partial(train_in_process, task, gpu=gpu)
    from ser_ray.distributed.worker_group import WorkerGroup  # slow: Ray Train

    return WorkerGroup(task, fewest, most, cpus=0 if gpu else cpus).run


def _start_tracker(task: TrainingTask, label: str) -> Tracker:
    folder, config, shards, run = task.folder, task.config, task.shards, task.run
    params = config.to_dict() | {"features": asdict(shards.card.features)}
    params |= {"workers": run.workers, "ingest": run.ingest}
    if encoder := shards.card.encoder_of(config.feature):
        params |= {"encoder": {"weights": encoder.weights, "licence": encoder.licence}}
    tags = run_tags("training", label, shards)
    about = f"one training; its checkpoints are in `{folder.location}`"
    tracker = start_run(folder, run, shards, tags, params, about, identity_of(config, shards))
    tracker.describe(Again=f"`{command_like(tracker.run_id, shards.locations, run)}`")
    tracker.log_files({"config.json": config.to_dict()})
    return tracker


def _follow(
    task: TrainingTask, run_task: Callable[[OnEpoch], None], tracker: Tracker, on_epoch: ShowEpoch
) -> None:
    """Run the training, if it has not finished, and log every epoch once."""

    def log(epoch: Epoch) -> None:
        is_new = tracker.log_epoch(
            epoch.row, epoch.learning_rates, epoch.timestamp_ms, epoch.system_metrics
        )
        tracker.flush()
        if is_new and not epoch.is_restored:
            on_epoch(epoch.row)

    if not task.folder.record().get("finished"):
        run_task(log)
    elif newest := task.folder.newest():  # MLflow may lack epochs of the finished training
        for epoch in newest.epochs():
            log(epoch)


def _conclude(task: TrainingTask, tracker: Tracker) -> None:
    """Copy the selected checkpoint to a fixed name, and complete the MLflow run.

    If the tracking server does not answer, the folder's record says so, and the same command
    delivers the rest.
    """
    from ser_ray.evaluation.evaluate import evaluate  # slow, with its pages: matplotlib
    from ser_ray.evaluation.pages import run_page
    from ser_ray.evaluation.rendering import store_page
    from ser_ray.evaluation.to_mlflow import record_training

    folder, shards = task.folder, task.shards
    newest = folder.newest()
    if newest is None:
        raise CheckpointError(f"{folder.location}: the training left no checkpoint")
    with TemporaryDirectory() as directory:
        selected = Path(directory)
        origin = {
            "run_id": tracker.run_id,
            "tracking_uri": tracker.uri,
            "report": folder.report,
            "shards": shards.locations,
        }
        folder.keep_selected(newest, origin, selected, encoder=task.run.keep_encoder)
        folder.update_record(finished=True)
        try:
            card, evaluation = read_card(selected), None
            if card.split["validation_speakers"]:
                # The workers scored the clips, because the driver may not have enough memory.
                evaluation = evaluate(
                    selected,
                    shards.locations,
                    part="validation",
                    probabilities=folder.validation_probabilities(newest),
                )
            page = run_page(
                card,
                evaluation,
                name=folder.name,
                run_id=tracker.run_id,
                history=newest.progress["history"],
                learning_rates=newest.progress["learning_rates"],
                layer_weights=read_layer_weights(selected, card),
                audio=task.run.audio,
            )
            store_page(page, folder.report)
            record_training(tracker, selected, card, evaluation, newest.progress, page)
        except TrackingError as error:
            folder.update_record(undelivered=str(error))
            tracker.abandon(error)
        else:
            folder.update_record(delivered=True, undelivered="")
    folder.tidy(newest)


def _result(folder: RunFolder) -> TrainResult:
    """Read the result of a finished run from its folder."""
    newest, record = folder.newest(), folder.record()
    if newest is None:
        raise CheckpointError(
            f"{folder.location}: the run is finished, but its last checkpoints are missing or "
            "incomplete; give another --name to train again"
        )
    return TrainResult(
        name=folder.name,
        checkpoint=location_inside(folder.location, SELECTED),
        card=folder.selected_card(),
        run_id=record["run_id"],
        tracking_uri=record["tracking_uri"],
        history=newest.progress["history"],
        selected=newest.progress["selected"],
        report=folder.report,
        undelivered=record.get("undelivered", ""),
    )
