"""The callback by which Ray Train's controller forwards epochs and ends hopeless trainings."""

from typing import Any

from ray.train import Checkpoint, UserCallback
from ray.util.queue import Queue

from ser_ray.errors import is_permanent
from ser_ray.tracking.store import first_line


class DriverCallback(UserCallback):
    """Runs in Ray's controller. If it raises, the training ends, whatever `max_failures` is.

    Args:
        queue: receives the report of every epoch. `put` raises once the queue is shut down, which
            is how `ser_ray.distributed.group.WorkerGroup` stops a training.
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
        """End a training whose workers would fail in the same way again; else report the loss."""
        for error in worker_exceptions.values():
            if is_permanent(error):
                raise error
        reasons = {f"rank {rank}: {first_line(e)}" for rank, e in worker_exceptions.items()}
        self.queue.put({"lost": "; ".join(sorted(reasons))})
