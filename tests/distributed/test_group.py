"""What passes between a group of workers and its driver, without Ray."""

import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from ser_ray.distributed import room
from ser_ray.distributed.group import DriverCallback, WorkerGroup
from ser_ray.distributed.room import RoomWatch
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import StoredCheckpoint
from ser_ray.distributed.task import TrainingTask
from ser_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    LocationError,
    MismatchError,
    ResourcesError,
    ShardsError,
)


class ListQueue:
    """Keeps what is put into it."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def put(self, item: Any) -> None:
        self.items.append(item)


def test_an_epoch_is_forwarded_with_the_metrics_of_every_node() -> None:
    queue = ListQueue()
    epoch = {
        "timestamp_ms": 1, "row": {"epoch": 3.0}, "learning_rates": [0.1], "confusion": [[1]],
        "is_selected": True, "score": 3.0,
    }  # fmt: skip
    reports: list[dict[str, Any]] = [
        epoch | {"system_metrics": {"10.0.0.1": {"cpu": 90.0}}},
        epoch,  # the second worker of the first node
        epoch | {"system_metrics": {"10.0.0.2": {"cpu": 30.0}}},
    ]
    callback = DriverCallback(queue)
    callback.after_report(None, [{"score": 0}, {"score": 0}], None)  # a checkpoint in mid-epoch
    callback.after_report(None, reports, None)
    assert queue.items == [
        {
            "row": {"epoch": 3.0},
            "learning_rates": [0.1],
            "timestamp_ms": 1,
            "system_metrics": {"10.0.0.1": {"cpu": 90.0}, "10.0.0.2": {"cpu": 30.0}},
        }
    ]


@pytest.mark.parametrize(
    "error",
    [ConfigError("x"), MismatchError("x"), DivergedError("x"), torch.OutOfMemoryError("x")],
    ids=lambda e: type(e).__name__,
)
def test_a_permanent_error_ends_the_training(error: Exception) -> None:
    callback = DriverCallback(ListQueue())
    with pytest.raises(type(error)):
        callback.after_exception(None, {0: RuntimeError("connection reset"), 1: error})


@pytest.mark.parametrize(
    "error",
    [ShardsError("x"), CheckpointError("x"), LocationError("x"), OSError("x"), MemoryError("x")],
    ids=lambda e: type(e).__name__,
)
def test_another_error_is_left_to_rays_retries(error: Exception) -> None:
    DriverCallback(ListQueue()).after_exception(None, {1: error})


def test_the_epochs_before_a_checkpoint_are_restored_from_it() -> None:
    rows = [{"epoch": float(epoch), "val/ua": epoch / 10} for epoch in (1, 2, 3)]
    rates = [step / 10 for step in range(7)]  # two steps an epoch, and one of the fourth
    progress = {"learning_rates": rates, "step": 1, "history": rows, "times_ms": [10, 20, 30]}
    found = list(StoredCheckpoint("checkpoint-0003-000001", progress).epochs())
    assert [epoch.row for epoch in found] == rows
    assert [epoch.learning_rates for epoch in found] == [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]
    assert [epoch.timestamp_ms for epoch in found] == [10, 20, 30]
    assert all(epoch.is_restored for epoch in found)


def test_waiting_for_places_ends_with_an_error_unless_there_are_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, ours = 0.0, {"other", "ours"}
    monkeypatch.setattr(room, "monotonic", lambda: now)
    monkeypatch.setattr(room, "placement_groups", lambda *, with_room: ours)
    monkeypatch.setattr(room, "free_resources", lambda: "1 CPUs, 0 GPUs")
    watch = RoomWatch({"other"}, "2 workers with 3 CPUs each")
    limit = room.START_SECONDS * room.START_ATTEMPTS
    for _ in range(5):  # a training that holds places waits for its epochs as long as they take
        now += limit
        watch.require_room()
    held = now
    assert caplog.messages == []
    ours = {"other"}
    with pytest.raises(ResourcesError, match="no room for 2 workers with 3 CPUs each for"):  # noqa: PT012
        while True:
            now += room.START_SECONDS
            watch.require_room()
    assert now - held == limit
    # A minute after the places were lost, and every minute from then on, the last but one before
    # the end.
    assert len(caplog.messages) == limit / 60 - 1
    pattern = r"waiting for room for 2 workers with 3 CPUs each since \d\d:\d\d:\d\d \(29 min\); "
    assert re.match(pattern + "free now: 1 CPUs, 0 GPUs", caplog.messages[-1])


@pytest.mark.parametrize(("max_failures", "expected"), [(0, 0), (1, 1), (-1, 2)])
def test_a_lost_worker_that_is_replaced_gets_one_line(
    max_failures: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    queue = ListQueue()
    error = RuntimeError("The actor died unexpectedly.\n\tclass_name: RayTrainWorker\n\tpid: 1")
    DriverCallback(queue).after_exception(None, {1: error})
    workers = object.__new__(WorkerGroup)  # its constructor needs Ray
    workers.task = cast(TrainingTask, SimpleNamespace(run=RunConfig(max_failures=max_failures)))
    workers.losses = 0
    for _ in range(2):
        workers._tell_loss(queue.items[0]["lost"])
    assert len(caplog.messages) == expected
    for message in caplog.messages:
        assert "lost (rank 1: The actor died unexpectedly.): Ray replaces it" in message
        assert "\n" not in message
