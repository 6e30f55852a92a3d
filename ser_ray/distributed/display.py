"""Shows the epochs of a training on a terminal or in a log."""

from typing import Self

from rich.console import Console


class EpochPrinter:
    """Shows an epoch's row: in place on a terminal, as a line in a log."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console, self.epochs = console, epochs
        self._in_place = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the line of a training that ended early."""
        if self._in_place:
            self.console.print()

    def __call__(self, row: dict[str, float]) -> None:
        """Show one epoch."""
        done = int(row["epoch"])
        left = (self.epochs - done) * row["speed/epoch_seconds"]
        # In place on a terminal, but for the last; a log keeps every line.
        self._in_place = self.console.is_terminal and done < self.epochs
        self.console.print(
            f"epoch {done:3d}/{self.epochs}  "
            f"loss {row['train/loss']:.3f}, validation {row['val/loss']:.3f}  "
            f"UA {row['val/ua']:6.1%}  WA {row['val/wa']:6.1%}  lr {row['lr']:.2e}  "
            f"{row['speed/clips_per_second']:5.0f} clips/s  {clock(left)} left",
            end="\r" if self._in_place else "\n",
            overflow="crop" if self._in_place else None,
            no_wrap=self._in_place,
        )


def clock(seconds: float) -> str:
    """Seconds as H:MM:SS or M:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def stderr_console() -> Console:
    """Console for progress, which stays off standard output."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
