"""Computes how many trials run at the same time. The CPUs and GPUs of one trial are a slot.

As many trials run at once as the cluster has slots. `SlotConfig` sets the size of a slot.
"""

import logging
import math
from typing import NamedTuple

from ser_ray.cluster.resources import format_resources, max_nodes, trains_on_gpus
from ser_ray.distributed.run_config import RunConfig
from ser_ray.errors import ConfigError, ResourcesError
from ser_ray.search.config import SlotConfig

logger = logging.getLogger(__name__)


class Slots(NamedTuple):
    """The trials that can run at the same time."""

    max_concurrent: int
    resources: dict[str, float]
    """Resources of each trial, as Ray names them. Without `GPU`, trials run on CPUs."""


def find_slots(run: RunConfig, config: SlotConfig) -> Slots:
    """Count the trials that the cluster can run at the same time, with all nodes that it may add.

    Raises:
        ResourcesError: no node is large enough for a trial.
    """
    on_gpus = trains_on_gpus(run.device)
    cpus, gpus = config.cpus_per_worker, config.gpus_per_worker if on_gpus else 0.0
    resources = {"CPU": float(cpus)} | ({"GPU": gpus} if on_gpus else {})
    nodes = max_nodes()
    count = sum(trials_per_node(node, cpus, gpus) for node in nodes)
    if count < 1:
        sizes = dict.fromkeys(format_resources({"CPU": 0, "GPU": 0} | node) for node in nodes)
        raise ResourcesError(
            f"a trial with {format_resources(resources)} can never start: the cluster's nodes "
            f"({'; '.join(sizes)}) are too small; give a smaller --cpus-per-worker or "
            "--gpus-per-worker" + (", or train on CPUs with --device cpu" if on_gpus else "")
        )
    logger.info("%-12s %d at once, each with %s", "trials", count, format_resources(resources))
    return Slots(count, resources)


def require_one_worker(run: RunConfig) -> None:
    """Check that a trial has one worker.

    Raises:
        ConfigError: `workers` is not 1.
    """
    # Several workers would need Ray Train. If Ray Tune stops a trial that uses Ray Train, the
    # placement group of the workers remains, and the next trial waits for its resources forever:
    # github.com/ray-project/ray/issues/54305.
    if run.worker_range != (1, 1):
        raise ConfigError(
            f"workers is {run.workers}: every trial of tune and crossval has one worker; leave "
            "--workers out, and train the best recipe with ser-ray train --like RUN_ID --workers "
            f"{run.workers}"
        )


def trials_per_node(node: dict[str, float], cpus: int, gpus: float) -> int:
    """Return how many trials fit on a node. A share of a GPU must come from a single GPU."""
    by_cpus = int(node.get("CPU", 0) // cpus)
    if not gpus:
        return by_cpus
    num_gpus = int(node.get("GPU", 0))
    by_gpus = num_gpus // gpus if gpus >= 1 else num_gpus * math.floor(1 / gpus + 1e-9)
    return min(by_cpus, int(by_gpus))
