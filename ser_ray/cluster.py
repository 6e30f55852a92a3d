"""Joins a Ray cluster or starts one on this machine, and checks its CPUs, GPUs and files.

Work that needs only one process is done without Ray, unless the user names a cluster (`needs_ray`).
Without Ray, the functions about nodes describe only this machine.
"""

import json
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ser_ray.errors import ResourcesError
from ser_ray.local_ray import session_folder, signals_kept, small_and_on_loopback
from ser_ray.storage.paths import absolute

AUTOSCALER_CONFIG = Path(os.path.expanduser("~/ray_bootstrap_config.yaml"))  # noqa: PTH111
"""File on the head node of a cluster of `ray up`, with the nodes that the autoscaler may add."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable with the runtime environment of a Ray job."""
CONNECT_SECONDS = 5.0
"""Longest wait for the connection to a cluster; Ray itself retries a refused port for minutes."""
ANSWER_SECONDS = 60.0
"""Longest wait for a node that starts a worker process and looks for files."""
FOLDERS_ASKED = 256
"""Largest number of folders that a node looks for."""

logger = logging.getLogger(__name__)


def needs_ray(address: str, workers: int = 1) -> bool:
    """Return whether this many workers run on Ray. If not, one worker runs in this process.

    Several workers always run on Ray. One worker runs on Ray if there is an address (`local` starts
    a cluster on this machine), a RAY_ADDRESS or a Ray job, or if this process is connected to Ray.
    """
    names = (address, os.environ.get("RAY_ADDRESS"), os.environ.get(JOB_CONFIG))
    return workers > 1 or any(names) or is_connected()


def is_connected() -> bool:
    """Return whether this process is connected to Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def place_of_training(address: str, workers: int) -> str:
    """Describe where this many workers train."""
    return place_of_ray(address) if needs_ray(address, workers) else "in this process, without Ray"


def place_of_ray(address: str) -> str:
    """Describe the cluster to which `cluster` connects."""
    address = address or os.environ.get("RAY_ADDRESS", "")
    is_here = address in ("", "local")
    return "on Ray, started on this machine" if is_here else f"on the Ray cluster at {address}"


@contextmanager
def cluster(address: str = "") -> Iterator[None]:
    """Connect to Ray for the duration of the block.

    Joins the cluster at `address`, or else the cluster of `RAY_ADDRESS` or of the Ray job. Without
    these, or with the address `local`, it starts Ray on this machine, which listens only on the
    loopback and stops at the end. A nested block uses the connection of the outer block.

    Raises:
        ResourcesError: no cluster answers at the address, the address is a job server, Ray does not
            start on this machine, or Ray has no folder for temporary files.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    named = "--address" if address else "RAY_ADDRESS"
    address = address or os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address
    logger.info("%-12s %s", "Ray", f"joining {address}" if address else "starting on this machine")
    with nullcontext() if address else session_folder():
        _init(address, named)
        try:
            yield
        finally:
            ray.shutdown()


def _init(address: str, named: str) -> None:
    """Join a cluster, or start one if the address is empty; `named` says who gave the address."""
    import ray

    try:
        if address:
            _require_listener(address, named)
        with signals_kept(), nullcontext() if address else small_and_on_loopback():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                logging_level=logging.ERROR,
                # ser_ray itself reports progress and errors; Ray's logs are in files.
                log_to_driver=False,
            )
    except (ValueError, RuntimeError) as error:
        if not address:
            raise
        raise ResourcesError(
            f"the Ray cluster at {address}, which {named} names, cannot be joined: {error}"
        ) from error
    except OSError as error:
        if not address:
            raise _not_started(error) from error
        raise ResourcesError(
            f"no Ray cluster answers at {address}, which {named} names ({error}): start it with "
            "`ray start --head`; if it is running, it may require a token: set "
            "RAY_AUTH_MODE=token, with the token in RAY_AUTH_TOKEN or ~/.ray/auth_token; or leave "
            f"out {named} to use this machine only"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises this type when its start takes over 30 s
            raise
        raise _not_started(error) from error


def _not_started(error: Exception) -> ResourcesError:
    return ResourcesError(
        f"Ray did not start on this machine ({error}): it is too busy, or short of memory or disk "
        "space; run the same command again later, or name a cluster with --address"
    )


def _require_listener(address: str, named: str) -> None:
    """Check within seconds that a server listens at the address of a cluster.

    Raises:
        ResourcesError: the address has the wrong form.
        OSError: no server listens, or the host name is unknown.
    """
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise ResourcesError(
            f"{address} is a job server, which only accepts jobs: set RAY_API_SERVER_ADDRESS to it "
            "for `ray job submit`; --address and RAY_ADDRESS have the form HOST:6379"
        )
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:  # the port is not a number
        host, port = None, None
    if not host or not port:
        raise ResourcesError(f"{named} is {address}: it must be HOST:PORT, such as 10.0.0.1:6379")
    socket.create_connection((host, port), CONNECT_SECONDS).close()


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
                f"{have.get(name, 0):g}: ask for fewer with --workers"
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
    reach: dict[str, float] = {}
    for node in nodes_within_reach():
        for name, amount in node.items():
            reach[name] = reach.get(name, 0) + amount
    return reach


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

    has_affinity = hasattr(os, "sched_getaffinity")  # macOS does not have it
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
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


def require_shared(*locations: str) -> None:
    """Check that all nodes can open these local paths; URIs are not checked.

    Raises:
        ResourcesError: a path is not on a shared disk, or Ray deletes it after the job.
    """
    for location in locations:
        require_kept(location)
    if not is_connected():
        return
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    local = {location: Path(absolute(location)) for location in locations if "://" not in location}
    missing_on: dict[str, list[str]] = {}
    if others:
        with ExitStack() as stack:
            seen_by = [stack.enter_context(_marker(path)) for path in local.values()]
            missing_on = dict(zip(local, _nodes_without(seen_by, others), strict=True))
    elif AUTOSCALER_CONFIG.exists():
        added = ["the machines that the autoscaler starts"]
        root = Path("/").stat().st_dev  # a shared folder is mounted, so it has another device
        missing_on = {
            location: added
            for location, path in local.items()
            if path.exists() and path.stat().st_dev == root
        }
    for location, names in missing_on.items():
        if names:
            raise ResourcesError(
                f"{location}: is on this machine, but not on {', '.join(names)}: use a folder "
                "that all nodes of the cluster share, or a URI like s3://bucket/folder"
            )


def one_of_each_folder(files: Iterable[str]) -> list[str]:
    """Return one local file from each folder, from at most `FOLDERS_ASKED` of the folders."""
    found: dict[str, str] = {}
    for file in files:
        if "://" not in file:
            found.setdefault(os.path.dirname(file), file)  # noqa: PTH120 - called for each file
    return list(found.values())[:: -(-len(found) // FOLDERS_ASKED) or 1]


def require_kept(location: str) -> None:
    """Check that Ray does not delete a path or SQLite store after the job.

    Raises:
        ResourcesError: the location is in the working folder of a Ray job, a copy of the code.
    """
    location = location.removeprefix("sqlite:///")
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    is_copy = "working_dir" in job.get("runtime_env", {})
    if is_copy and "://" not in location and Path(absolute(location)).is_relative_to(Path.cwd()):
        raise ResourcesError(
            f"{location}: is inside the copy of the code that Ray deletes after the job: use an "
            "absolute path or, where a URI is accepted, one like s3://bucket/folder"
        )


@contextmanager
def _marker(path: Path) -> Iterator[Path]:
    """Yield the path of a file in the folder, which exists for the duration of the block."""
    marker = path / f".seen-by-all-{os.getpid()}"
    try:
        marker.touch()
    except OSError:  # a file or a read-only folder: the nodes look for the path itself
        yield path
        return
    try:
        yield marker
    finally:
        marker.unlink()


def _nodes_without(paths: list[Path], nodes: list[dict[str, Any]]) -> list[list[str]]:
    """Return, for each path, the names of nodes that lack it. Unresponsive nodes are ignored."""
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
    missing_on: list[list[str]] = [[] for _ in paths]
    for answer in answered:
        try:
            found = ray.get(answer)
        except ray.exceptions.RayError:  # the node was lost in the meantime
            continue
        for names, is_found in zip(missing_on, found, strict=True):
            if not is_found:
                names.append(asked[answer])
    return [sorted(names) for names in missing_on]


def cpus_per_worker(workers: int) -> int:
    """Return the largest number of CPUs per worker with which all workers run at the same time."""
    sizes = [int(node.get("CPU", 0)) for node in nodes_within_reach()]
    fitting = range(max(sizes, default=1), 1, -1)
    return next((cpus for cpus in fitting if sum(n // cpus for n in sizes) >= workers), 1)


def in_words(resources: Mapping[str, float]) -> str:
    """Write the CPUs and GPUs among the resources."""
    names = [name for name in ("CPU", "GPU") if name in resources]
    return ", ".join(f"{resources[name]:g} {name}s" for name in names)
