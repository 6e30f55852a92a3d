"""Trains one fold: from shards and a recipe to a checkpoint, a report and an MLflow run.

A single worker trains in this process, except in the cases that `ser_ray.cluster.connect.needs_ray`
lists. Several workers use Ray Train. The tracker runs in the driver, so lost workers affect neither
MLflow nor the terminal. If the driver is lost, the same command resumes the training, because it
gives the same run folder, and this folder holds everything that is needed to resume.
"""

import logging
from collections.abc import Callable
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
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import (
    SELECTED,
    Epoch,
    OnEpoch,
    RunFolder,
    StoredCheckpoint,
    TrainingTask,
)
from ser_ray.errors import CheckpointError, TrackingError
from ser_ray.evaluation.rendering import notebook_cell
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import absolute, location_inside, require_temporary_space, short_digest
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
"""Shows the row of an epoch that has ended."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished training."""

    name: str
    checkpoint: str
    """Path or URI of the selected checkpoint."""
    card: CheckpointCard
    run_id: str
    tracking_uri: str
    history: list[dict[str, float]]
    """One row per epoch."""
    selected: dict[str, float]
    """The row of the selected epoch, whose weights are in the checkpoint."""
    report: str
    """Path or URI of the run's page."""
    undelivered: str = ""
    """Why MLflow lacks a part of the run; empty if no part is missing. The same call delivers the
    rest."""

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

    def _repr_html_(self) -> str:
        return notebook_cell(repr(self), self.report)


def train(
    shards_location: ShardLocations,
    recipe: TrainConfig,
    run: RunConfig,
    *,
    on_epoch: ShowEpoch,
    address: str = "",
) -> TrainResult:
    """Train one fold of a shard set, or resume that training.

    Args:
        shards_location: folder or URI of the shard set, or of several that are read as one.
        on_epoch: called with the row of every new epoch; without Ray, in another thread.
        address: Ray cluster to join (`ser_ray.cluster.connect.needs_ray`).

    Raises:
        ShardsError, ConfigError, CheckpointError, ResourcesError, TrackingError: a setting or an
            input is wrong. Most of these errors are raised before any worker starts.
        SerRayError: the training failed; the message gives the reason.
    """
    shards = open_corpora(shards_location, recipe.label_map)
    parts = select_rows(shards.clips(), recipe)
    require_workers_fit(recipe, len(parts.train), run.worker_range[1])
    folder = RunFolder(absolute(run.storage), run.name or run_name(recipe, shards))
    require_server(run.tracking_uri)
    require_temporary_space()
    with folder.lock():
        folder.require_same(identity_of(recipe, shards))
        if not folder.record().get("delivered"):
            pretrained = read_initial_weights(recipe, shards, run.tracking_uri)
            on_ray = needs_ray(address, run.worker_range[1])
            with cluster(address) if on_ray else nullcontext():
                require_shared(*shards.locations, run.storage)
                task = TrainingTask(folder, recipe, shards, pretrained, run)
                run_training = _training_function(task)
                with _start_tracker(task, parts.label) as tracker:
                    _train_and_log(task, run_training, tracker, on_epoch)
                    _complete(task, tracker)
        elif has_run(uri := resolve_uri(run.tracking_uri), folder.record()["run_id"]):
            folder.update_record(tracking_uri=uri)  # the store was moved together with the folder
        return _result(folder)


def run_name(recipe: TrainConfig, shards: ShardSet) -> str:
    """Return the name of a run; the same recipe on the same shards gives the same name."""
    identity = f"{recipe.fingerprint}{shards.card.fingerprint_of(recipe.feature)}"
    fold = f"{recipe.protocol}-fold{recipe.fold}-seed{recipe.seed}"
    return f"{recipe.feature}-{fold}-{short_digest(identity)}"


def identity_of(recipe: TrainConfig, shards: ShardSet) -> dict[str, Any]:
    """Return the settings that must not change when a run resumes."""
    return {
        "labels": list(shards.card.labels),
        "shards_fingerprint": shards.card.fingerprint_of(recipe.feature),
        "config": recipe.to_dict(),
    }


def _training_function(task: TrainingTask) -> Callable[[OnEpoch], None]:
    """Return the function that runs the training on the connected cluster, or in this process.

    Raises:
        ResourcesError: the workers need more CPUs or GPUs than there are.
    """
    min_workers, max_workers = task.run.worker_range
    gpu = trains_on_gpus(task.run.device)
    require_workers(min_workers, cpus=1, gpus=1 if gpu else 0)
    cpus = cpus_per_worker(max_workers)
    size = "one GPU" if gpu else f"{cpus} CPUs"
    where = "each" if is_connected() else "in this process"
    logger.info("%-12s %s, with %s %s", "workers", task.run.workers, size, where)
    if not is_connected():
        return partial(train_in_process, task, gpu=gpu)
    from ser_ray.distributed.worker_group import WorkerGroup  # slow: Ray Train

    return WorkerGroup(task, min_workers, max_workers, cpus=0 if gpu else cpus).run


def _start_tracker(task: TrainingTask, label: str) -> Tracker:
    folder, recipe, shards, run = task.folder, task.recipe, task.shards, task.run
    params = recipe.to_dict() | {"features": asdict(shards.card.features)}
    params |= {"workers": run.workers, "ingest": run.ingest}
    if encoder := shards.card.encoder_of(recipe.feature):
        params |= {"encoder": {"weights": encoder.weights, "licence": encoder.licence}}
    tags = run_tags("training", label, shards)
    about = f"one training; its checkpoints are in `{folder.location}`"
    identity, files = identity_of(recipe, shards), {"config.json": recipe.to_dict()}
    return start_run(folder, run, shards, tags, params, about, identity, files)


def _train_and_log(
    task: TrainingTask,
    run_training: Callable[[OnEpoch], None],
    tracker: Tracker,
    on_epoch: ShowEpoch,
) -> None:
    """Run the training unless it has finished, and log every epoch once."""

    def log(epoch: Epoch) -> None:
        is_new = tracker.log_epoch(
            epoch.row, epoch.learning_rates, epoch.timestamp_ms, epoch.system_metrics
        )
        tracker.flush()
        if is_new and not epoch.is_restored:
            on_epoch(epoch.row)

    if not task.folder.record().get("finished"):
        run_training(log)
    elif newest := task.folder.newest():  # MLflow may lack epochs of the finished training
        for epoch in newest.epochs():
            log(epoch)


def _complete(task: TrainingTask, tracker: Tracker) -> None:
    """Copy the selected checkpoint to `selected`, write the page, and complete the MLflow run.

    If the tracking store does not answer, the folder's record gives the reason, and the same
    command delivers the rest.
    """
    folder, newest = task.folder, task.folder.newest()
    if newest is None:
        raise CheckpointError(f"{folder.location}: the training left no checkpoint")
    with TemporaryDirectory() as directory:
        selected = Path(directory)
        origin = {
            "run_id": tracker.run_id,
            "tracking_uri": tracker.uri,
            "report": folder.report,
            "shards": task.shards.locations,
        }
        folder.keep_selected(newest, origin, selected, encoder=task.run.keep_encoder)
        folder.update_record(finished=True)
        try:
            _record(task, newest, selected, tracker)
        except TrackingError as error:
            folder.update_record(undelivered=str(error))
            tracker.abandon(error)
        else:
            folder.update_record(delivered=True, undelivered="")
    folder.tidy(newest)


def _record(task: TrainingTask, newest: StoredCheckpoint, selected: Path, tracker: Tracker) -> None:
    """Write the page of a finished training, and record its scores, model and page in MLflow."""
    from ser_ray.evaluation.evaluate import evaluate  # slow, like `pages`: matplotlib
    from ser_ray.evaluation.pages import run_page
    from ser_ray.evaluation.rendering import store_page
    from ser_ray.evaluation.to_mlflow import record_training

    folder, card, evaluation = task.folder, read_card(selected), None
    if card.split["validation_speakers"]:
        evaluation = evaluate(
            selected,
            task.shards.locations,
            part="validation",
            # The workers computed them, because the driver may not have enough memory.
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


def _result(folder: RunFolder) -> TrainResult:
    """Return the result of a finished run, from the files in its folder."""
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
