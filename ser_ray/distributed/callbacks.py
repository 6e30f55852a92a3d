"""The journal: one line an epoch, from Ray's controller to the driver.

Both run on the same machine and share nothing but this file, so what was reported while the
tracking server, or the driver itself, was away is still there afterwards.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback

from ser_ray.distributed.json_lines import LineFollower, append_line
from ser_ray.errors import is_permanent
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.checkpoint import learning_rates_by_epoch

EpochLine = Callable[[dict[str, float]], None]
"""Shows an epoch's row."""


class FailFast(UserCallback):
    """Runs in Ray's controller: a group that fails for good is not started again.

    An error that a callback raises ends the training, whatever failures it is still allowed.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first of the workers' errors that another attempt would meet again."""
        for error in worker_exceptions.values():
            if is_permanent(error):
                raise error


class JournalWriter(FailFast):
    """Runs in Ray's controller: writes each epoch's report down, once its checkpoint is stored."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Append rank 0's report, which is every rank's, and what each node says of itself."""
        if "row" not in metrics[0]:
            return  # a checkpoint in mid-epoch
        nodes: dict[str, dict[str, float]] = {}
        for report in metrics:
            nodes |= report.get("node", {})
        append_line(self.journal, metrics[0] | {"node": nodes})


class JournalReader:
    """Runs in the driver: shows the epochs and delivers them to the tracker."""

    def __init__(self, journal: Path, tracker: Tracker, on_epoch: EpochLine) -> None:
        self.journal, self.tracker, self.on_epoch = journal, tracker, on_epoch
        self._seen: set[int] = set()
        self._lines = LineFollower(journal)
        self.read(show=False)  # what an earlier start of the run left

    def recover(self, progress: dict[str, Any]) -> None:
        """Write down epochs that a checkpoint has and the journal has not.

        A checkpoint is stored before its line is written: what was killed in between left none.
        """
        known = progress["history"], learning_rates_by_epoch(progress), progress["times_ms"]
        for row, lr, when in zip(*known, strict=True):
            if int(row["epoch"]) not in self._seen:
                append_line(self.journal, {"timestamp_ms": when, "row": row, "learning_rates": lr})
        self.read(show=False)

    def read(self, *, show: bool = True) -> None:
        """Take up the lines written since the last call."""
        for report in self._lines.read():
            self._take(report, show=show)
        self.tracker.flush()

    def _take(self, report: dict[str, Any], *, show: bool) -> None:
        row, epoch = report["row"], int(report["row"]["epoch"])
        if epoch in self._seen:
            return  # an epoch done again after a lost worker: the same numbers
        self._seen.add(epoch)
        self.tracker.log_epoch(
            row, report["learning_rates"], report["timestamp_ms"], report.get("node")
        )
        if show:
            self.on_epoch(row)
