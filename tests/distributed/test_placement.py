"""Waiting for room on a cluster, without Ray."""

import re

import pytest

from ser_ray.distributed import placement
from ser_ray.distributed.placement import PlacementWatch
from ser_ray.errors import ResourcesError


def test_waiting_for_room_ends_with_an_error_unless_there_is_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, ours = 0.0, {"other", "ours"}
    monkeypatch.setattr(placement, "monotonic", lambda: now)
    monkeypatch.setattr(placement, "placement_groups", lambda *, with_room: ours)
    monkeypatch.setattr(placement, "free_resources", lambda: "1 CPUs, 0 GPUs")
    watch = PlacementWatch({"other"}, "2 workers with 3 CPUs each")
    limit = placement.START_SECONDS * placement.START_ATTEMPTS
    for _ in range(5):  # a training that holds places waits for its epochs as long as they take
        now += limit
        watch.check()
    held = now
    assert caplog.messages == []
    ours = {"other"}
    with pytest.raises(ResourcesError, match="no room for 2 workers with 3 CPUs each for"):  # noqa: PT012
        while True:
            now += placement.START_SECONDS
            watch.check()
    assert now - held == limit
    # A minute after the places were lost, and every minute from then on, the last but one before
    # the end.
    assert len(caplog.messages) == limit / 60 - 1
    pattern = r"waiting for room for 2 workers with 3 CPUs each since \d\d:\d\d:\d\d \(29 min\); "
    assert re.match(pattern + "free now: 1 CPUs, 0 GPUs", caplog.messages[-1])
