"""What Ray Train's controller does for the driver: it forwards epochs and permanent errors."""

from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

from ser_ray.errors import is_permanent


class DriverCallback(UserCallback):
    """Runs in Ray's controller. A callback that raises ends the training, whatever failures remain.

    Args:
        queue: gets the report of every epoch. Where it is gone, `put` raises: that is how
            `ser_ray.distributed.group.WorkerGroup` stops a training.
    """

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Forward a stored epoch: rank 0's report, and every node's metrics."""
        if "row" not in metrics[0]:
            return  # a checkpoint in mid-epoch
        nodes: dict[str, dict[str, float]] = {}
        for report in metrics:
            nodes |= report.get("system_metrics", {})
        names = ("row", "learning_rates", "timestamp_ms")
        report = {name: metrics[0][name] for name in names}
        self.queue.put(report | {"system_metrics": nodes})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End a training whose workers would fail in the same way again."""
        for error in worker_exceptions.values():
            if is_permanent(error):
                raise error
