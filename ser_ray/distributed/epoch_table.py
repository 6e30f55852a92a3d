"""Shows the epochs of a training on a terminal, or as lines of a log."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ser_ray.progress import clock
from ser_ray.training.metrics import validation_rank

HEADER = "   epoch    loss val loss      UA      WA        lr clips/s   time"
BEST = "  best so far"


class EpochTable:
    """Shows a row for each epoch that has ended and, on a terminal, a progress bar.

    Args:
        console: the terminal or log.
        epochs: number of epochs of the training.
    """

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self._last: Mapping[str, float] = {}
        self._ended_at = 0.0
        self._best: tuple[float, ...] = ()
        self._live = Live(
            get_renderable=self.running_epoch, console=console, refresh_per_second=2, transient=True
        )

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, row: Mapping[str, float]) -> None:
        """Show the metrics of an epoch that has ended (`run_folder.Epoch.row`)."""
        is_first, self._last, self._ended_at = not self._last, row, time.monotonic()
        is_best = False
        # A resumed training does not show its earlier epochs, so its best epoch is unknown here.
        if "val/ua" in row and (row["epoch"] == 1 or self._best):
            is_best = validation_rank(row) > self._best
            self._best = max(self._best, validation_rank(row))
        if not self.console.is_terminal:
            self.console.print(self._log_line(row) + (BEST if is_best else ""))
            return
        if is_first:
            self.console.print(HEADER, style="bold")
        line = (
            f"{row['epoch']:4.0f}/{self.epochs:<3} {row['train/loss']:7.3f} "
            f"{_validation_columns(row):24} {row['lr']:9.2e} "
            f"{row['speed/clips_per_second']:7.0f} {clock(row['speed/epoch_seconds']):>6}"
        )
        self.console.print(Text(line) + Text(BEST if is_best else "", style="green"))

    def running_epoch(self) -> RenderableType:
        """Return the line of the running epoch, with a bar over all epochs and the remaining time.

        The progress within the epoch is estimated from the duration of the previous epoch.
        """
        done = int(self._last.get("epoch", 0))
        if done == self.epochs:
            return Text("all epochs have ended: writing the model and its report", style="dim")
        grid = Table.grid(padding=(0, 1))
        if not done:
            grid.add_row("", ProgressBar(width=30, pulse=True), "waiting for the first epoch")
            return grid
        duration = self._last["speed/epoch_seconds"]
        fraction = min((time.monotonic() - self._ended_at) / max(duration, 1e-9), 0.99)
        time_left = clock((self.epochs - done - fraction) * duration)
        bar = ProgressBar(total=self.epochs, completed=done + fraction, width=30)
        grid.add_row(f"{done + 1:4d}/{self.epochs:<3}", bar, f"{time_left} left")
        return grid

    def _log_line(self, row: Mapping[str, float]) -> str:
        seconds_left = (self.epochs - row["epoch"]) * row["speed/epoch_seconds"]
        validation = ""
        if "val/ua" in row:
            validation = (
                f", validation {row['val/loss']:.3f}  "
                f"UA {row['val/ua']:6.1%}  WA {row['val/wa']:6.1%}"
            )
        return (
            f"epoch {row['epoch']:3.0f}/{self.epochs}  "
            f"loss {row['train/loss']:.3f}{validation}  lr {row['lr']:.2e}  "
            f"{row['speed/clips_per_second']:5.0f} clips/s  {clock(seconds_left)} left"
        )


def _validation_columns(row: Mapping[str, float]) -> str:
    """Return the validation columns of a row; empty without validation clips."""
    if "val/ua" not in row:
        return ""
    return f"{row['val/loss']:8.3f} {row['val/ua']:7.1%} {row['val/wa']:7.1%}"
