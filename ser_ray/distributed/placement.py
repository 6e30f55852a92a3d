"""Waits until a cluster has room for workers or trials, that is, a placement group for them.

While a training or a search waits for room, Ray tells the driver nothing. Ray also lets elastic
trainings and searches wait forever. `RoomWatch` logs that they wait, and ends the wait.
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

Ray's list of nodes may be 20 s old, so perhaps only the second attempt notices that a node is gone.
After workers have their placement group, there is no limit, for example to install packages."""
START_ATTEMPTS = 60
"""Number of these waits: half an hour in total to start machines or to finish other work."""
LOG_SECONDS = 60.0
"""Time between two log lines about the wait."""

logger = logging.getLogger(__name__)


class RoomWatch:
    """Logs that workers or trials wait for room, and raises an error if they wait too long.

    Args:
        other_groups: ids of placement groups that belong to other work.
        need: description of the workers or trials, for messages.
    """

    def __init__(self, other_groups: set[str], need: str) -> None:
        self.other_groups, self.need = other_groups, need
        self.had_room = self.looked = self.told = monotonic()

    def require_room(self) -> None:
        """Check every START_SECONDS whether there is a placement group with room.

        Raises:
            ResourcesError: there has been none for START_ATTEMPTS times START_SECONDS.
        """
        if monotonic() - self.looked < START_SECONDS:
            return
        self.looked = monotonic()
        if placement_groups(with_room=True) - self.other_groups:
            self.had_room = self.told = self.looked
        elif self.looked - self.had_room >= START_SECONDS * START_ATTEMPTS:
            raise ResourcesError(
                f"the cluster had no room for {self.need} for {START_SECONDS * START_ATTEMPTS:g} "
                "seconds: give the same command again when there is room, or ask for less"
            )
        elif self.looked - self.told >= LOG_SECONDS:
            self.told = self.looked
            waited = self.looked - self.had_room
            logger.warning(
                "waiting for room for %s since %s (%.0f min); free now: %s",
                *(self.need, strftime("%H:%M:%S", localtime(time() - waited)), waited / 60),
                free_resources(),
            )


@contextmanager
def placed(bundle: dict[str, float], need: str) -> Iterator[PlacementGroup]:
    """Yield a placement group as soon as the cluster has room for it, and release it at the end.

    Args:
        bundle: resources of the placement group.
        need: description of the work that needs the group, for messages.

    Raises:
        ResourcesError: the cluster had no room for START_ATTEMPTS times START_SECONDS.
    """
    watch = RoomWatch(placement_groups(), need)
    group = placement_group([bundle])
    try:
        while not group.wait(1):
            watch.require_room()
        yield group
    finally:
        remove_placement_group(group)


def placement_groups(*, with_room: bool = False) -> set[str]:
    """Return the ids of the placement groups that this job holds.

    Args:
        with_room: whether to leave out the groups that wait for room.
    """
    # The id of a placement group ends with the id of the job that created it.
    job = ray.get_runtime_context().get_job_id()
    return {
        name
        for name, group in placement_group_table().items()
        if name.endswith(job)
        and (group["state"] == "CREATED" if with_room else group["state"] != "REMOVED")
    }


def remove_placement_groups(names: set[str]) -> None:
    """Release placement groups, so that the cluster can use their resources again."""
    for name in names:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def free_resources() -> str:
    """Return the unused CPUs and GPUs, in words."""
    return format_resources({"CPU": 0.0, "GPU": 0.0} | ray.available_resources())
