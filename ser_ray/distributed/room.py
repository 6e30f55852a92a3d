"""Room on a cluster for workers and trials: the placement groups that hold it, and waiting for it.

Ray says nothing to a driver while a training or search waits for room, and lets an elastic training
or a search wait forever. `RoomWatch` says what is waited for, and ends the waiting.
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

from ser_ray.cluster.resources import in_words
from ser_ray.errors import ResourcesError

START_SECONDS = 30.0
"""How long Ray waits for the placement group of new workers before it counts the nodes again.

Ray's list of nodes may be 20 s old, so only the second attempt may notice that a node is gone.
Workers that have their placement group are not limited, for instance to install packages."""
START_ATTEMPTS = 60
"""Number of these waits: half an hour in all to start machines or to finish other work."""
TELL_SECONDS = 60.0
"""How often whoever waits for room says so."""

logger = logging.getLogger(__name__)


class RoomWatch:
    """Says what workers or trials wait for, and raises an error if they wait too long.

    Args:
        other_groups: ids of the placement groups that do not count.
        need: what needs room, in words.
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
        elif self.looked - self.told >= TELL_SECONDS:
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
        bundle: its resources.
        need: what needs them, in words.

    Raises:
        ResourcesError: there was no room.
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
        with_room: leave out those that wait for room.
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
    """Return the CPUs and GPUs that nothing uses at present, in words."""
    return in_words({"CPU": 0.0, "GPU": 0.0} | ray.available_resources())
