"""Starts or resumes a study: joins the cluster, locks the folder, and opens the MLflow run."""

from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, Literal

from ser_ray.cluster.connect import cluster
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search.actor import TrialSetup
from ser_ray.search.config import SlotConfig
from ser_ray.search.slots import find_slots
from ser_ray.search.study import Show, Study
from ser_ray.tracking.run_metadata import run_tags
from ser_ray.tracking.store import require_server
from ser_ray.tracking.tracker import flatten


@contextmanager
def open_study(
    kind: Literal["search", "cross-validation"],
    label: str,
    folder: RunFolder,
    run: RunConfig,
    slot_config: SlotConfig,
    setup: TrialSetup,
    *,
    settings: dict[str, Any],
    varied_fields: Set[str],
    show: Show,
    address: str = "",
    has_actor_pool: bool = False,
) -> Iterator[Study]:
    """Yield a new or resumed study.

    During the `with` block, this process is connected to the cluster and holds the folder's lock.

    Args:
        kind: search or cross-validation.
        label: the protocol and its fold or folds, and whether it is speaker-dependent.
        folder: the study's folder.
        run: the device of all trials, the name of the study, and where it is recorded.
        slot_config: CPUs and GPUs of a trial.
        setup: recipe, data and weights of all trials.
        settings: settings of the study that must be the same when it resumes.
        varied_fields: fields of the recipe that differ between trials. They are left out of the
            parameters of the study's MLflow run.
        show: shows the trials.
        address, has_actor_pool: as `ser_ray.cluster.connect.cluster`.

    Raises:
        CheckpointError: the folder is in use, cannot be written, belongs to another study, or has a
            damaged record.
        ResourcesError: the cluster cannot be used, has no room for a trial, or does not share the
            shards and the folder.
        TrackingError: the tracking store cannot be used.
    """
    require_server(run.tracking_uri)
    recipe, shards = setup.recipe, setup.shards
    with cluster(address, has_actor_pool=has_actor_pool), folder.lock():
        require_shared(*shards.locations, folder.location)
        slots = find_slots(run, slot_config)
        identity = {
            "recipe": recipe.to_dict(),
            kind: settings,
            "shards": shards.card.fingerprint_of(recipe.feature),
        }
        folder.require_same(identity)
        flat = flatten(recipe.to_dict())
        params = {key: flat[key] for key in flat if key.rpartition(".")[2] not in varied_fields}
        params[kind] = settings | {"slots": {"count": slots.max_concurrent, **slots.resources}}
        tags = run_tags(kind, label, shards)
        about = f"a {kind}, whose trials are the nested runs. Its files are in `{folder.location}`"
        parent = start_run(folder, run, shards, tags, params, about, identity)
        with parent:  # closes the run if the study cannot be opened
            study = Study(parent, folder, setup, slots, run, tags, show)
        with study:
            yield study
