"""Waits until a cluster has room for workers or trials, and gives up after half an hour.

Workers and trials can start when Ray has created a placement group, which reserves their CPUs and
GPUs. Until then, Ray tells the driver nothing, and elastic trainings and searches would wait
forever. Therefore `PlacementWatch` logs the wait, and ends a long wait with an error.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from time import localtime, monotonic, strftime, time

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from ser_ray.cluster.resources import format_resources
from ser_ray.errors import ResourcesError

START_SECONDS = 30.0
"""How long Ray waits for the placement group of new workers before it counts the nodes again.

Ray's list of nodes may be 20 s old, so Ray may notice only at the second attempt that a node was
lost. What workers do after this wait, for example install packages, has no limit."""
START_ATTEMPTS = 60
"""Number of such waits. Together they last half an hour, in which machines can start or other work
can end."""
LOG_SECONDS = 60.0
"""Seconds between two log lines about the wait."""

logger = logging.getLogger(__name__)


class PlacementWatch:
    """Logs that workers or trials wait for a placement group, and ends a wait that is too long.

    Args:
        other_groups: ids of this job's placement groups that belong to other work.
        need: description of the workers or trials, for messages.
    """

    def __init__(self, other_groups: set[str], need: str) -> None:
        self.other_groups, self.need = other_groups, need
        self.placed_at = self.checked_at = self.logged_at = monotonic()

    def check(self) -> None:
        """Look for a placement group, at most once every START_SECONDS.

        Raises:
            ResourcesError: there has been none for START_ATTEMPTS times START_SECONDS.
        """
        if monotonic() - self.checked_at < START_SECONDS:
            return
        self.checked_at = monotonic()
        if placement_groups(with_room=True) - self.other_groups:
            self.placed_at = self.logged_at = self.checked_at
        elif self.checked_at - self.placed_at >= START_SECONDS * START_ATTEMPTS:
            raise ResourcesError(
                f"the cluster had no room for {self.need} for {START_SECONDS * START_ATTEMPTS:g} "
                "seconds: run the same command again when there is room, or ask for less"
            )
        elif self.checked_at - self.logged_at >= LOG_SECONDS:
            self.logged_at = self.checked_at
            waited = self.checked_at - self.placed_at
            logger.warning(
                "waiting for room for %s since %s (%.0f min); free now: %s",
                self.need,
                strftime("%H:%M:%S", localtime(time() - waited)),
                waited / 60,
                free_resources(),
            )


@contextmanager
def reserve(resources: dict[str, float], need: str) -> Iterator[PlacementGroup]:
    """Wait for a placement group with these resources, yield it, and release it at the end.

    Args:
        resources: amount by Ray's name of the resource.
        need: description of the work that needs them, for messages.

    Raises:
        ResourcesError: the cluster had no room for START_ATTEMPTS times START_SECONDS.
    """
    watch = PlacementWatch(placement_groups(), need)
    group = placement_group([resources])
    try:
        while not group.wait(1):
            watch.check()
        yield group
    finally:
        remove_placement_group(group)


def placement_groups(*, with_room: bool = False) -> set[str]:
    """Return the ids of this job's placement groups.

    Args:
        with_room: leave out the groups that still wait for room.
    """
    # The id of a placement group ends with the id of the job that created it.
    job = ray.get_runtime_context().get_job_id()
    return {
        group_id
        for group_id, group in placement_group_table().items()
        if group_id.endswith(job)
        and (group["state"] == "CREATED" if with_room else group["state"] != "REMOVED")
    }


def remove_placement_groups(ids: set[str]) -> None:
    """Release placement groups, so that the cluster can use their resources again."""
    for group_id in ids:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group_id)))


def free_resources() -> str:
    """Return the unused CPUs and GPUs as text, for example `2 CPUs, 1 GPU`."""
    return format_resources({"CPU": 0.0, "GPU": 0.0} | ray.available_resources())
