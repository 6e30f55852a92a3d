"""Starts or resumes the MLflow run of a training, range test, search or cross-validation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ser_ray.cluster.resources import max_resources
from ser_ray.cluster.shared_files import require_kept
from ser_ray.command import next_command
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.shards.read import ShardSet
from ser_ray.tracking.run_metadata import data_line, dataset_of, provenance
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker, run_to_resume


def start_run(
    folder: RunFolder,
    run: RunConfig,
    shards: ShardSet,
    tags: dict[str, str],
    params: dict[str, Any],
    about: str,
    identity: dict[str, Any],
    files: Mapping[str, Any] = {},
) -> Tracker:
    """Start an MLflow run, or resume the one that the record in the run folder names.

    Args:
        folder: the run folder; its name is also the name of the MLflow run.
        run: names the tracking store and the experiment.
        shards: the shards to train on.
        tags: tags of the run (`ser_ray.tracking.run_metadata.run_tags`).
        params: parameters of a new run.
        about: what the run is; a line of the run's description.
        identity: settings that must not change while the folder exists. They and the id of the
            MLflow run are written into the folder's record.
        files: further artifacts (`Tracker.log_files`).

    Raises:
        ResourcesError: the tracking store is in a folder that Ray deletes after the job.
        TrackingError: the tracking store cannot be used.
    """
    uri = resolve_uri(run.tracking_uri)
    require_kept(uri)
    tracker = Tracker.start(
        uri,
        run.experiment,
        name=folder.name,
        params=params,
        tags=tags,
        dataset=dataset_of(shards),
        run_id=run_to_resume(uri, folder.record()),
    )
    with tracker:  # closes the run if one of these calls fails
        folder.update_record(run_id=tracker.run_id, tracking_uri=uri, identity=identity)
        again = tags.get("command", "")
        if tags["kind"] == "training":
            again = command_like(tracker.run_id, shards.locations, run)
        tracker.describe(Run=about, Data=data_line(shards), Again=f"`{again}`" if again else "")
        environment = provenance() | {"hardware.cluster": max_resources()}
        tracker.log_files({"environment.json": environment, **files})
    return tracker


def command_like(run_id: str, locations: Sequence[str], run: RunConfig, address: str = "") -> str:
    """Return the command that trains the recipe of an MLflow run again, under another name."""
    settings = replace(run, name="")
    return next_command(
        "train", like=run_id, shards=tuple(locations), run_config=settings, address=address
    )
