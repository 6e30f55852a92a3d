"""Checks that all nodes can open the files of a job, and that Ray keeps the job's outputs."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from ser_ray.cluster.connect import JOB_CONFIG, is_connected
from ser_ray.cluster.resources import autoscaled_types
from ser_ray.errors import ResourcesError
from ser_ray.storage.packed import ROW
from ser_ray.storage.paths import absolute

ANSWER_SECONDS = 60.0
"""Longest wait until all nodes have started a worker process and looked for the files."""
MAX_FOLDERS = 256
"""Largest number of folders from which the nodes look for a file."""


def require_shared(*locations: str) -> None:
    """Check that all nodes of the cluster share these local paths; URIs are not checked.

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
            paths = [stack.enter_context(_marker_in(path)) for path in local.values()]
            missing_on = dict(zip(local, _nodes_without(paths, others), strict=True))
    elif autoscaled_types():
        root_device = Path("/").stat().st_dev  # a shared folder is a mount with another device
        missing_on = {
            location: ["the machines that the autoscaler starts"]
            for location, path in local.items()
            if path.exists() and path.stat().st_dev == root_device
        }
    for location, names in missing_on.items():
        if names:
            raise ResourcesError(
                f"{location} is on this machine, but not on {', '.join(names)}: use a folder "
                "that all nodes of the cluster share, or a URI like s3://bucket/folder"
            )


def one_of_each_folder(files: Iterable[str]) -> list[str]:
    """Return one local file from each folder, for at most MAX_FOLDERS folders.

    If the file is a recording in a row of a Parquet file, the Parquet file is returned.
    """
    by_folder: dict[str, str] = {}
    for location in files:
        file = location.partition(ROW)[0]
        if "://" not in file:
            by_folder.setdefault(os.path.dirname(file), file)  # noqa: PTH120 - called for each file
    step = max(1, math.ceil(len(by_folder) / MAX_FOLDERS))
    return list(by_folder.values())[::step]


def require_kept(location: str) -> None:
    """Check that Ray does not delete a path or SQLite store after the job.

    Raises:
        ResourcesError: the location is inside the working folder of a Ray job. This folder is a
            copy of the code that was submitted.
    """
    location = location.removeprefix("sqlite:///")
    job = json.loads(os.environ.get(JOB_CONFIG, "{}"))
    is_copy = "working_dir" in job.get("runtime_env", {})
    if is_copy and "://" not in location and Path(absolute(location)).is_relative_to(Path.cwd()):
        raise ResourcesError(
            f"{location} is inside the copy of the code, which Ray deletes after the job: use an "
            "absolute path or, where a URI is accepted, a URI like s3://bucket/folder"
        )


@contextmanager
def _marker_in(path: Path) -> Iterator[Path]:
    """Create a file in a folder for the duration of the block, and yield the file's path."""
    marker = path / f".seen-by-all-{uuid4().hex[:8]}"
    try:
        marker.touch()
    except OSError:  # the path is a file or a read-only folder, so the nodes look for the path
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
    host_of = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node["NodeManagerHostname"]
        for node in nodes
    }
    answered, _ = ray.wait(list(host_of), num_returns=len(host_of), timeout=ANSWER_SECONDS)
    missing_on: list[list[str]] = [[] for _ in paths]
    for answer in answered:
        try:
            exists = ray.get(answer)
        except ray.exceptions.RayError:  # the node was lost in the meantime
            continue
        for names, path_exists in zip(missing_on, exists, strict=True):
            if not path_exists:
                names.append(host_of[answer])
    return [sorted(names) for names in missing_on]
