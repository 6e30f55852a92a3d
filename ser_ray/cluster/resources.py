"""The CPUs, GPUs and memory of the cluster, or of this machine if Ray is not used."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from ser_ray.cluster.connect import is_connected
from ser_ray.errors import ResourcesError

AUTOSCALER_CONFIG = Path(os.path.expanduser("~/ray_bootstrap_config.yaml"))  # noqa: PTH111
"""File on the head node of a cluster of `ray up`, with the nodes that the autoscaler may add."""


def require_workers(workers: int, cpus: float, gpus: float) -> None:
    """Check that the cluster, after the autoscaler has grown it, has room for all workers.

    Args:
        workers: number of workers that run at the same time.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.

    Raises:
        ResourcesError: the message has the required and the available resources.
    """
    have = resources_within_reach()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        if each and workers * each > have.get(name, 0):
            raise ResourcesError(
                f"{workers} workers need {workers * each:g} {name}s, but the cluster has "
                f"{have.get(name, 0):g}: "
                + ("ask for fewer with --workers" if workers > 1 else "join another with --address")
                + (", or train on CPUs with --device cpu" if name == "GPU" else "")
            )


def has_gpus() -> bool:
    """Return whether the cluster has a GPU, or can add a node with a GPU."""
    return resources_within_reach().get("GPU", 0) >= 1


def trains_on_gpus(device: str) -> bool:
    """Return whether `RunConfig.device` means GPUs on this cluster."""
    return device == "gpu" or (device == "auto" and has_gpus())


def resources_within_reach() -> dict[str, float]:
    """Return the resources of the cluster at its largest size."""
    reach: Counter[str] = Counter()
    for node in nodes_within_reach():
        reach.update(node)
    return dict(reach)


def nodes_within_reach() -> list[dict[str, float]]:
    """Return the resources of each node, including nodes that the autoscaler may add."""
    if not is_connected():
        return [this_machine()]
    import ray
    import yaml

    alive = [node for node in ray.nodes() if node["Alive"]]
    reach = [node["Resources"] for node in alive]
    config = AUTOSCALER_CONFIG
    if config.exists():
        started = Counter(node["Labels"].get("ray.io/node-group") for node in alive)
        for name, kind in yaml.safe_load(config.read_text())["available_node_types"].items():
            reach += [kind["resources"]] * (kind.get("max_workers", 0) - started[name])
    return reach


def this_machine() -> dict[str, float]:
    """Return the CPUs and GPUs that this process can use."""
    import torch

    cpus = len(os.sched_getaffinity(0))
    if limit := _container_limit("cpu.max"):  # "QUOTA PERIOD", in microseconds
        quota, period = map(int, limit.split())
        cpus = min(cpus, max(quota // period, 1))
    return {"CPU": cpus, "GPU": torch.cuda.device_count() if torch.cuda.is_available() else 0}


def memory_of_this_machine() -> int:
    """Return the free memory in bytes, or the limit of the container if it is smaller."""
    import psutil

    return min(
        psutil.virtual_memory().available, int(_container_limit("memory.max") or sys.maxsize)
    )


def _container_limit(name: str) -> str:
    """Read a limit of this process's container; empty if there is no limit."""
    try:
        limit = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""
    return "" if limit.startswith("max") else limit


def cpus_per_worker(workers: int) -> int:
    """Return the largest number of CPUs per worker with which all workers run at the same time."""
    sizes = [int(node.get("CPU", 0)) for node in nodes_within_reach()]
    fitting = range(max(sizes, default=1), 1, -1)
    return next((cpus for cpus in fitting if sum(n // cpus for n in sizes) >= workers), 1)


def in_words(resources: Mapping[str, float]) -> str:
    """Write the CPUs and GPUs among the resources."""
    names = [name for name in ("CPU", "GPU") if name in resources]
    return ", ".join(f"{resources[name]:g} {name}s" for name in names)
