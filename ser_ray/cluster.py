"""Joining a Ray cluster, or starting one on this machine, and asking what it has."""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ser_ray.errors import ResourcesError


@contextmanager
def cluster(address: str = "") -> Iterator[None]:
    """Be connected to Ray within the block.

    Joins the cluster at `address`, else the one that `RAY_ADDRESS` or a Ray job names, else starts
    one on this machine and stops it at the end. Nested use joins the outer block's.

    Raises:
        ResourcesError: no cluster answers at the address.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS", "")
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            # Progress and errors reach the driver by our own hand; Ray keeps its logs in files.
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise ResourcesError(
            f"no Ray cluster answers at {address} ({error}): start it with `ray start --head`, or "
            "leave --address out to use this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def require_workers(workers: int, cpus: float, gpus: float) -> None:
    """Check that the cluster has room for so many workers of one size.

    Raises:
        ResourcesError: names what was asked for and what there is.
    """
    import ray

    have = ray.cluster_resources()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        if each and workers * each > have.get(name, 0):
            raise ResourcesError(
                f"{workers} workers need {workers * each:g} {name}s, the cluster has "
                f"{have.get(name, 0):g}: ask for fewer with --workers"
                + (", or train on CPUs with --device cpu" if name == "GPU" else "")
            )


def has_gpus() -> bool:
    """Whether any node of the cluster has a GPU."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= 1


def cpus_per_worker(workers: int) -> int:
    """CPUs that each of so many CPU workers may have when they share the cluster evenly."""
    import ray

    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    on_a_node = math.ceil(workers / max(len(nodes), 1))
    return max(int(max(nodes, default=1) // on_a_node), 1)
