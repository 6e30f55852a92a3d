"""Joining a Ray cluster, or starting one on this machine, and asking what it has."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ser_ray.errors import ResourcesError
from ser_ray.storage.paths import absolute

AUTOSCALER_CONFIG = Path("~/ray_bootstrap_config.yaml")
"""On the head of a cluster that `ray up` started: what its autoscaler may start."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""By this variable Ray tells the driver of a job its runtime environment, before it connects."""
ANSWER_SECONDS = 60.0
"""Time for a node to start a worker and look for files."""
FOLDERS_ASKED = 256
"""Folders of listed files that every node is asked for, at most."""


@contextmanager
def cluster(address: str = "") -> Iterator[None]:
    """Be connected to Ray within the block.

    Joins the cluster at `address`, else the one that `RAY_ADDRESS` or a Ray job names, else starts
    one on this machine and stops it at the end. Nested use joins the outer block's. One that it
    starts listens on the loopback alone.

    Raises:
        ResourcesError: no cluster answers at the address, it is a job server's, or none could be
            started.
    """
    import ray
    from ray._private import ray_constants

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address.startswith(("http://", "https://")):
        raise ResourcesError(
            f"{address} is a job server, which takes submissions: name it by "
            "RAY_API_SERVER_ADDRESS, for `ray job submit` alone; --address and RAY_ADDRESS take "
            "HOST:6379"
        )
    may_be_joined = ray_constants.ENABLE_RAY_CLUSTER
    try:
        # Off, as by itself on a Mac, Ray takes the loopback for the machine's address. Its variable
        # for this is read when Ray is imported, which may be long ago.
        ray_constants.ENABLE_RAY_CLUSTER = may_be_joined and bool(address)
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            logging_level=logging.ERROR,
            # Progress and errors reach the driver by our own hand; Ray keeps its logs in files.
            log_to_driver=False,
        )
    except (ValueError, RuntimeError) as error:
        if not address:
            raise
        raise ResourcesError(f"the Ray cluster at {address} cannot be joined: {error}") from error
    except ConnectionError as error:
        raise ResourcesError(
            f"no Ray cluster answers at {address} ({error}): start it with `ray start --head`; if "
            "it is there, it may ask for a token: set RAY_AUTH_MODE=token where ~/.ray/auth_token "
            "or RAY_AUTH_TOKEN holds it; or leave --address out to use this machine alone"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray has no class for a start that takes over 30 s
            raise
        raise ResourcesError(
            f"Ray did not start on this machine ({error}): it is too busy, or short of memory; "
            "give the same command again when it is not, or name a cluster with --address"
        ) from error
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = may_be_joined
    try:
        yield
    finally:
        ray.shutdown()


def require_workers(workers: int, cpus: float, gpus: float) -> None:
    """Check that the cluster has, or may come to have, room for so many workers of one size.

    Raises:
        ResourcesError: names what was asked for and what there is.
    """
    have = resources_within_reach()
    for name, each in (("GPU", gpus), ("CPU", cpus)):
        if each and workers * each > have.get(name, 0):
            raise ResourcesError(
                f"{workers} workers need {workers * each:g} {name}s, the cluster has "
                f"{have.get(name, 0):g}: ask for fewer with --workers"
                + (", or train on CPUs with --device cpu" if name == "GPU" else "")
            )


def has_gpus() -> bool:
    """Whether the cluster has, or may come to have, a GPU."""
    return resources_within_reach().get("GPU", 0) >= 1


def resources_within_reach() -> dict[str, float]:
    """What the cluster has and, where machines are started on demand, how far that may grow."""
    reach: dict[str, float] = {}
    for node in nodes_within_reach():
        for name, amount in node.items():
            reach[name] = reach.get(name, 0) + amount
    return reach


def nodes_within_reach() -> list[dict[str, float]]:
    """Resources of each node that the cluster has, and of those that it may start on demand."""
    import ray
    import yaml

    alive = [node for node in ray.nodes() if node["Alive"]]
    reach = [node["Resources"] for node in alive]
    config = AUTOSCALER_CONFIG.expanduser()
    if config.exists():
        started = Counter(node["Labels"].get("ray.io/node-group") for node in alive)
        for name, kind in yaml.safe_load(config.read_text())["available_node_types"].items():
            reach += [kind["resources"]] * (kind.get("max_workers", 0) - started[name])
    return reach


def require_shared(*locations: str) -> None:
    """Check that local paths lead to the same places on every node; a URI is taken to.

    Raises:
        ResourcesError: a node does not see one, or will not, or Ray will delete it after the job.
    """
    import ray

    for location in locations:
        require_kept(location)
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    local = {location: Path(absolute(location)) for location in locations if "://" not in location}
    blind: dict[str, list[str]] = {}
    if others:
        with ExitStack() as stack:
            seen_by = [stack.enter_context(_marker(path)) for path in local.values()]
            blind = dict(zip(local, _nodes_without(seen_by, others), strict=True))
    elif AUTOSCALER_CONFIG.expanduser().exists():
        to_come = ["the machines that are to be started"]
        blind = {location: to_come for location, path in local.items() if _on_own_disk(path)}
    for location, names in blind.items():
        if names:
            raise ResourcesError(
                f"{location}: is on this machine, but not on {', '.join(names)}: give a folder "
                "that all nodes of the cluster share, or a URI like s3://bucket/folder"
            )


def one_of_each_folder(files: Iterable[str]) -> list[str]:
    """Return a local file of every folder that files lie in, of `FOLDERS_ASKED` at most."""
    found: dict[str, str] = {}
    for file in files:
        if "://" not in file:
            found.setdefault(os.path.dirname(file), file)  # noqa: PTH120 - a million of them
    return list(found.values())[:: -(-len(found) // FOLDERS_ASKED) or 1]


def require_kept(location: str) -> None:
    """Check that a path or SQLite store is not in the copy of the code that a Ray job runs in.

    Raises:
        ResourcesError: it is.
    """
    location = location.removeprefix("sqlite:///")
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    is_copy = "working_dir" in job.get("runtime_env", {})
    if is_copy and "://" not in location and Path(absolute(location)).is_relative_to(Path.cwd()):
        raise ResourcesError(
            f"{location}: is inside the copy of the code that Ray deletes after the job: give an "
            "absolute path or, where one is taken, a URI like s3://bucket/folder"
        )


@contextmanager
def _marker(path: Path) -> Iterator[Path]:
    """A path that exists in the block and leads nowhere on a machine that does not share it."""
    marker = path / f".seen-by-all-{os.getpid()}"
    try:
        marker.touch()
    except OSError:  # a file, or a folder that may only be read
        yield path
        return
    try:
        yield marker
    finally:
        marker.unlink()


def _on_own_disk(path: Path) -> bool:
    """Whether a path is on the disk that the machine started from; what is shared is mounted."""
    return path.exists() and path.stat().st_dev == Path("/").stat().st_dev


def _nodes_without(paths: list[Path], nodes: list[dict[str, Any]]) -> list[list[str]]:
    """Names of the nodes on which each path does not exist; those that do not answer count not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def exist() -> list[bool]:
        return [os.path.exists(path) for path in paths]  # noqa: PTH110 - raises nothing

    look = ray.remote(num_cpus=0, max_retries=0)(exist)
    asked = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node["NodeManagerHostname"]
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)
    blind: list[list[str]] = [[] for _ in paths]
    for answer in answered:
        try:
            there = ray.get(answer)
        except ray.exceptions.RayError:  # the node was lost meanwhile
            continue
        for names, is_there in zip(blind, there, strict=True):
            if not is_there:
                names.append(asked[answer])
    return [sorted(names) for names in blind]


def cpus_per_worker(workers: int) -> int:
    """CPUs that each of so many CPU workers may have when all find room at once."""
    sizes = [int(node.get("CPU", 0)) for node in nodes_within_reach()]
    fitting = range(max(sizes, default=1), 1, -1)
    return next((cpus for cpus in fitting if sum(n // cpus for n in sizes) >= workers), 1)


def placement_groups() -> set[str]:
    """Ids of the placement groups that this job holds."""
    import ray
    from ray.util.placement_group import placement_group_table

    # The id of a group ends in that of the job that made it.
    job = ray.get_runtime_context().get_job_id()
    return {
        name
        for name, group in placement_group_table().items()
        if name.endswith(job) and group["state"] != "REMOVED"
    }


def remove_placement_groups(names: set[str]) -> None:
    """Give placement groups back to the cluster."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
