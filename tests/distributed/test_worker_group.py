"""What passes between a group of workers and its driver, without Ray."""

from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from ray.train import ControllerError

from ser_ray.distributed.run_folder import StoredCheckpoint
from ser_ray.distributed.worker_group import DriverCallback, WorkerGroup
from ser_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    LocationError,
    MismatchError,
    SerRayError,
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
        "timestamp_ms": 1, "row": {"epoch": 3.0}, "learning_rates": [0.1], "is_selected": True,
        "score": 3.0,
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


@pytest.mark.parametrize("error", [DivergedError("nan"), torch.OutOfMemoryError("nan")])
def test_a_permanent_error_after_a_checkpoint_starts_no_other_controller(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[object] = []

    def run_controller(_: WorkerGroup, start: object) -> NoReturn:
        starts.append(start)
        raise ControllerError(error)

    folder = SimpleNamespace(
        restore=lambda _: "before", newest=lambda: "after", failure=CheckpointError
    )
    group = WorkerGroup.__new__(WorkerGroup)
    task: Any = SimpleNamespace(folder=folder, run=SimpleNamespace(max_failures=3))
    group.task = task
    monkeypatch.setattr(WorkerGroup, "_run_controller", run_controller)
    with pytest.raises(SerRayError, match="nan"):
        group.run(lambda _: None)
    assert starts == ["before"]


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
    found = list(StoredCheckpoint("checkpoint-000003-000001", progress).epochs())
    assert [epoch.row for epoch in found] == rows
    assert [epoch.learning_rates for epoch in found] == [[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]
    assert [epoch.timestamp_ms for epoch in found] == [10, 20, 30]
    assert all(epoch.is_restored for epoch in found)


def test_a_lost_worker_is_named_in_one_line() -> None:
    queue = ListQueue()
    error = RuntimeError("The actor died unexpectedly.\n\tclass_name: RayTrainWorker\n\tpid: 1")
    DriverCallback(queue).after_exception(None, {1: error})
    assert queue.items == [{"lost": "rank 1: The actor died unexpectedly."}]
