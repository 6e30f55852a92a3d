"""The MLflow run of a training, a search or a cross-validation."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ser_ray.cluster.connect import is_connected
from ser_ray.cluster.resources import resources_within_reach
from ser_ray.cluster.shared_files import require_kept
from ser_ray.command import next_command
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.shards.read import ShardSet
from ser_ray.tracking.about import data_line, dataset_of, provenance
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker, run_to_resume


def start_run(
    run: RunConfig,
    name: str,
    shards: ShardSet,
    tags: dict[str, str],
    params: dict[str, Any],
    about: str,
    run_id: str = "",
) -> Tracker:
    """Start an MLflow run, or resume the run that has the id `run_id`.

    Args:
        run: names the tracking store and the experiment.
        name: name of a new run.
        shards: the training's shards.
        tags: tags of the run (`ser_ray.tracking.about.run_tags`).
        params: parameters of a new run.
        about: a sentence that describes the run.

    Raises:
        ResourcesError: the tracking store is in a folder that Ray deletes after the job.
        TrackingError: the tracking store cannot be reached.
    """
    uri = resolve_uri(run.tracking_uri)
    require_kept(uri)
    tracker = Tracker.start(
        uri,
        run.experiment,
        name=name,
        params=params,
        tags=tags,
        dataset=dataset_of(shards),
        run_id=run_id,
    )
    tracker.describe(Run=about, Data=data_line(shards), Again=f"`{tags['command']}`")
    tracker.log_files({"environment.json": environment()})
    return tracker


def start_or_resume_run(
    folder: RunFolder,
    run: RunConfig,
    shards: ShardSet,
    tags: dict[str, str],
    params: dict[str, Any],
    identity: dict[str, Any],
    about: str,
) -> Tracker:
    """Start or resume the MLflow run of a folder, and write its id into the folder's record.

    Args:
        folder: the folder of the training, search or cross-validation.
        identity: the settings that must be the same whenever the folder is used again.
        run, shards, tags, params, about: as for `start_run`.

    Raises:
        MismatchError: the folder belongs to another training, search or cross-validation.
        ResourcesError, TrackingError: as `start_run`.
    """
    folder.require_same(identity)
    run_id = run_to_resume(resolve_uri(run.tracking_uri), folder.record())
    tracker = start_run(run, folder.name, shards, tags, params, about, run_id)
    folder.update_record(run_id=tracker.run_id, tracking_uri=tracker.uri, identity=identity)
    return tracker


def command_like(run_id: str, locations: Sequence[str], run: RunConfig) -> str:
    """Return the command that trains the recipe of an MLflow run again, without the run's name."""
    settings = replace(run, name="")
    return next_command("train", like=run_id, shards=tuple(locations), run_config=settings)


def environment() -> dict[str, Any]:
    """Describe the program, this machine and the cluster."""
    reach = resources_within_reach()
    described = provenance() | {
        "hardware.cluster": {key: reach.get(key, 0) for key in ("CPU", "GPU")}
    }
    if is_connected():
        import ray

        described["ray.job_id"] = ray.get_runtime_context().get_job_id()
    return described
