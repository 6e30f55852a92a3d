"""Shows a line for each epoch of a training that has ended and, on a terminal, a bar below them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from ser_ray.progress import bar_below, clock


@contextmanager
def show_epochs(console: Console, epochs: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield a function that shows an epoch that has ended.

    Args:
        console: where to show the epochs.
        epochs: number of epochs of the training.
    """
    best: Mapping[str, float] = {}
    with bar_below(console) as bar:
        task = bar.add_task("waiting for the first epoch", total=epochs)

        def show(row: Mapping[str, float]) -> None:
            nonlocal best
            epoch, validation, mark = row["epoch"], "", ""
            if "val/ua" in row:
                validation = (
                    f", validation {row['val/loss']:.3f}  "
                    f"UA {row['val/ua']:6.1%}  WA {row['val/wa']:6.1%}"
                )
                if row["val/ua"] > best.get("val/ua", -1.0):
                    best, mark = row, "  best so far"
            line = f"epoch {epoch:3.0f}/{epochs}  loss {row['train/loss']:.3f}{validation}"
            line += f"  lr {row['lr']:.2e}"
            left = clock((epochs - epoch) * row["speed/epoch_seconds"])
            speed = f"{row['speed/clips_per_second']:5.0f} clips/s  {left} left"
            if console.is_terminal:  # the line fits into 80 columns
                console.print(line, style="green" if mark else None)
            else:
                console.print(f"{line}  {speed}{mark}")
            if best:
                speed += f"  best UA {best['val/ua']:.1%} in epoch {best['epoch']:.0f}"
            is_last = epoch == epochs
            text = "all epochs have ended: writing the model and its report" if is_last else speed
            bar.update(task, completed=epoch, description=text)

        yield show
