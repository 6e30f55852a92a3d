"""Starts a study: its cluster, its number of concurrent trials, its lock and its MLflow run."""

import logging
import math
from collections.abc import Iterator, Set
from contextlib import contextmanager
from typing import Any, Literal

from ser_ray.cluster.connect import cluster
from ser_ray.cluster.resources import nodes_within_reach, trains_on_gpus
from ser_ray.cluster.shared_files import require_shared
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import ConfigError, ResourcesError
from ser_ray.search.actor import TrialSetup
from ser_ray.search.space import SlotConfig
from ser_ray.search.study import Show, Study
from ser_ray.tracking.run_metadata import run_tags
from ser_ray.tracking.store import require_server
from ser_ray.tracking.tracker import flatten

logger = logging.getLogger(__name__)


@contextmanager
def open_study(
    kind: Literal["search", "cross-validation"],
    label: str,
    folder: RunFolder,
    run: RunConfig,
    slots: SlotConfig,
    setup: TrialSetup,
    *,
    settings: dict[str, Any],
    varied: Set[str],
    show: Show,
    address: str = "",
) -> Iterator[Study]:
    """Start a study, or resume an interrupted one, on a cluster and with a lock on its folder.

    Args:
        kind: search or cross-validation.
        label: the protocol, and whether it is speaker-dependent.
        folder: the study's folder.
        run: names the tracking store and the experiment.
        slots: CPUs and GPUs of a trial.
        setup: recipe, data and weights of all trials.
        settings: the settings of the study that must not change when it resumes.
        varied: fields of the recipe that differ between trials. The study's run does not have them
            as parameters.
        show: shows the trials.
        address: Ray cluster to join (`ser_ray.cluster.connect.cluster`).

    Raises:
        MismatchError: the folder belongs to another study.
        ResourcesError, TrackingError: the cluster, the folder or the tracking store is not usable.
    """
    require_server(run.tracking_uri)
    recipe, shards = setup.recipe, setup.shards
    with cluster(address), folder.lock():
        require_shared(*shards.locations, folder.location)
        found = find_slots(run, slots)
        identity = {
            "recipe": recipe.to_dict(),
            kind: settings,
            "shards": shards.card.fingerprint_of(recipe.feature),
        }
        folder.require_same(identity)
        flat = flatten(recipe.to_dict())
        params = {key: flat[key] for key in flat if key.rpartition(".")[2] not in varied}
        params |= {kind: settings | {"slots": {"count": found[0], **found[1]}}}
        tags = run_tags(kind, label, shards)
        about = f"a {kind}; its trials are nested in it, its files are in `{folder.location}`"
        parent = start_run(folder, run, shards, tags, params, about, identity)
        with Study(parent, folder, setup, found, run, tags, show) as study:
            yield study


def find_slots(run: RunConfig, config: SlotConfig) -> tuple[int, dict[str, float]]:
    """Count the trials that the cluster can run at the same time.

    Returns:
        The number of trials, and the resources of each, as Ray names them. Without `GPU`, trials
        run on CPUs.

    Raises:
        ResourcesError: no node is large enough for a trial.
    """
    gpu = trains_on_gpus(run.device)
    cpus, gpus = config.cpus_per_worker, config.gpus_per_worker if gpu else 0.0
    nodes = nodes_within_reach()
    count = sum(trials_on(node, cpus, gpus) for node in nodes)
    if count < 1:
        sizes = [f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes]
        raise ResourcesError(
            f"a trial with {cpus} CPUs and {gpus:g} GPUs can never start: the cluster's nodes "
            f"({'; '.join(dict.fromkeys(sizes))}) are too small; ask for less with "
            "--cpus-per-worker or --gpus-per-worker"
            + (", or train on CPUs with --device cpu" if gpu else "")
        )
    shared = f" and {gpus:g} of a GPU" if gpus else ""
    logger.info("%-12s %d at once, each with %d CPUs%s", "trials", count, cpus, shared)
    return count, {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})


def require_one_worker(run: RunConfig) -> None:
    """Refuse trials with several workers.

    Raises:
        ConfigError: `workers` is not 1.
    """
    # If Ray Tune stops a trial that uses Ray Train, the placement group of the workers remains, and
    # the next trial waits for its resources forever: github.com/ray-project/ray/issues/54305.
    if run.worker_range != (1, 1):
        raise ConfigError(
            f"workers is {run.workers}: every trial of tune and crossval has one worker; leave "
            "--workers out, and train the best recipe with ser-ray train --like RUN_ID --workers "
            f"{run.workers}"
        )


def trials_on(node: dict[str, float], cpus: int, gpus: float) -> int:
    """Number of trials that fit on a node. A share of a GPU must come from a single GPU."""
    room = int(node.get("CPU", 0) // cpus)
    if gpus >= 1:
        return min(room, int(node.get("GPU", 0) // gpus))
    if gpus:
        return min(room, int(node.get("GPU", 0)) * math.floor(1 / gpus + 1e-9))
    return room
