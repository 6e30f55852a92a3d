"""How many trials run at the same time, and with how many CPUs and GPUs each."""

import logging
import math

from ser_ray.cluster.resources import max_nodes, trains_on_gpus
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import ConfigError, ResourcesError
from ser_ray.search.config import SlotConfig

logger = logging.getLogger(__name__)


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
    nodes = max_nodes()
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
