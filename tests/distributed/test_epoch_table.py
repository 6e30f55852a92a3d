"""The rows of a training on a terminal and in a log."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from ser_ray.distributed import epoch_table
from ser_ray.distributed.epoch_table import EpochTable


def row(epoch: int, ua: float, loss: float = 1.25) -> dict[str, float]:
    return {
        "epoch": float(epoch), "train/loss": 1.5, "val/loss": loss, "val/ua": ua, "val/wa": 0.5,
        "lr": 1e-3, "speed/clips_per_second": 44.0, "speed/epoch_seconds": 20.0,
    }  # fmt: skip


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_terminal_keeps_a_row_an_epoch_and_marks_the_best() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with EpochTable(console, 3) as show:
        for epoch, ua in enumerate((0.3, 0.5, 0.4), start=1):
            show(row(epoch, ua))
    lines = lines_of(console)
    rows = [line for line in lines if re.match(r"\s+[123]/3\s+1\.500", line)]
    assert len(rows) == 3
    assert ["best so far" in line for line in rows] == [True, True, False]
    assert max(map(len, lines)) <= 80
    assert sum("val loss" in line for line in lines) == 1


def test_of_equal_scores_the_lower_loss_is_marked_as_in_the_selection() -> None:
    console = Console(file=io.StringIO(), width=200)
    with EpochTable(console, 3) as show:
        for epoch, loss in enumerate((1.25, 1.0, 1.5), start=1):
            show(row(epoch, 0.3, loss))
    assert ["best so far" in line for line in lines_of(console)] == [True, True, False]


def test_no_epoch_of_a_resumed_training_is_called_the_best() -> None:
    console = Console(file=io.StringIO(), width=200)
    with EpochTable(console, 3) as show:
        for epoch in (2, 3):
            show(row(epoch, 0.1 * epoch))
    assert not any("best" in line for line in lines_of(console))


def test_the_running_epoch_has_a_bar_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 105.0])
    monkeypatch.setattr(epoch_table, "time", SimpleNamespace(monotonic=lambda: next(now)))
    console = Console(file=io.StringIO(), width=80)
    table = EpochTable(console, 3)
    table(row(1, 0.3))
    shown = Console(file=io.StringIO(), width=80)
    shown.print(table.running_epoch())
    text = shown.file.getvalue()  # type: ignore[attr-defined]
    # A quarter of the second epoch of 20 s has passed, so 15 s of it and the third are left.
    assert text.split()[0] == "2/3"
    assert "0:35 left" in text


def test_a_log_gets_a_line_an_epoch() -> None:
    console = Console(file=io.StringIO(), width=200)
    with EpochTable(console, 2) as show:
        show(row(1, 0.3))
        show(row(2, 0.2))
    assert lines_of(console) == [
        "epoch   1/2  loss 1.500, validation 1.250  UA  30.0%  WA  50.0%  lr 1.00e-03     44 "
        "clips/s  0:20 left  best so far",
        "epoch   2/2  loss 1.500, validation 1.250  UA  20.0%  WA  50.0%  lr 1.00e-03     44 "
        "clips/s  0:00 left",
    ]
