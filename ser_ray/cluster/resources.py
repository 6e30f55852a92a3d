"""The CPUs and GPUs of the cluster, or of this machine without Ray, and this machine's memory."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ser_ray.cluster.connect import is_connected, is_started_here
from ser_ray.errors import ResourcesError

AUTOSCALER_CONFIG = Path(os.path.expanduser("~/ray_bootstrap_config.yaml"))  # noqa: PTH111
"""File on the head node that lists the types of nodes that the autoscaler may add. `ray up` writes
it; on Kubernetes, `.kuberay/cluster.yaml` mounts it."""


def require_workers(workers: int, cpus: float, gpus: float) -> None:
    """Check that there are enough CPUs and GPUs for all workers.

    Without Ray, this machine must have them. With Ray, the cluster must have them, including the
    nodes that its autoscaler may add. Only the sums over all nodes are compared, so a worker that
    needs more than the largest node has is not noticed here.

    Args:
        workers: number of workers that run at the same time.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker.

    Raises:
        ResourcesError: there are too few CPUs or GPUs.
    """
    resources = max_resources()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        available = resources.get(name, 0)
        if workers * each <= available:
            continue
        who, advice = "a worker needs", "join a larger cluster with --address"
        if workers > 1:
            who, advice = f"{workers} workers need", "ask for fewer workers with --workers"
        if name == "GPU":
            advice += ", or train on CPUs with --device cpu"
        place = "the cluster" if is_connected() else "this machine"
        raise ResourcesError(
            f"{who} {format_resources({name: workers * each})}, but {place} has {available:g}: "
            f"{advice}"
        )


def has_gpus() -> bool:
    """Return whether the cluster has a GPU, or can add a node with a GPU."""
    return max_resources().get("GPU", 0) >= 1


def trains_on_gpus(device: str) -> bool:
    """Return whether workers use GPUs: `device` is gpu, or is auto and the cluster has a GPU."""
    return device == "gpu" or (device == "auto" and has_gpus())


def max_resources() -> dict[str, float]:
    """Return the sums of the resources of all `max_nodes`."""
    total: Counter[str] = Counter()
    for node in max_nodes():
        total.update(node)
    return dict(total)


def max_nodes() -> list[dict[str, float]]:
    """Return the resources of each node that the cluster has or that its autoscaler may add.

    If this process is not connected to Ray, this machine is the only node.
    """
    if not is_connected():
        return [local_resources()]
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [node["Resources"] for node in alive]
    num_alive = Counter(node["Labels"].get("ray.io/node-group") for node in alive)
    for name, node_type in autoscaled_types().items():
        num_more = node_type.get("max_workers", 0) - num_alive[name]
        nodes += [node_type["resources"]] * num_more
    return nodes


def autoscaled_types() -> dict[str, dict[str, Any]]:
    """Return the types of nodes that the autoscaler may add to the cluster, by name.

    A Ray that this process started has no autoscaler, even if it runs on the head node of a
    cluster.
    """
    import yaml

    if is_started_here() or not AUTOSCALER_CONFIG.exists():
        return {}
    return dict(yaml.safe_load(AUTOSCALER_CONFIG.read_text())["available_node_types"])


def local_resources() -> dict[str, float]:
    """Return the CPUs and GPUs that this process can use."""
    import torch

    cpus = len(os.sched_getaffinity(0))
    if limit := _container_limit("cpu.max"):  # "QUOTA PERIOD", in microseconds
        quota, period = map(int, limit.split())
        cpus = min(cpus, max(quota // period, 1))
    return {"CPU": cpus, "GPU": torch.cuda.device_count() if torch.cuda.is_available() else 0}


def available_memory() -> int:
    """Return the free memory in bytes, or the limit of this container if that is lower."""
    import psutil

    return min(
        psutil.virtual_memory().available, int(_container_limit("memory.max") or sys.maxsize)
    )


def _container_limit(name: str) -> str:
    """Return a limit of this process's container (cgroup v2) as text; empty if there is none."""
    try:
        limit = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return ""
    return "" if limit.startswith("max") else limit


def cpus_per_worker(workers: int) -> int:
    """Return how many CPUs each worker can have if all workers run at the same time; at least 1."""
    sizes = [int(node.get("CPU", 0)) for node in max_nodes()]
    for cpus in range(max(sizes, default=1), 1, -1):
        if sum(size // cpus for size in sizes) >= workers:
            return cpus
    return 1


def openmp_threads() -> int:
    """Return the first number in OMP_NUM_THREADS, which may be a list; 0 if there is none."""
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def format_resources(resources: Mapping[str, float]) -> str:
    """Write the CPUs and GPUs among the resources as text, for example `2 CPUs, 1 GPU`."""
    counts = {name: resources[name] for name in ("CPU", "GPU") if name in resources}
    return ", ".join(f"{n:g} {name}" + ("" if n == 1 else "s") for name, n in counts.items())
