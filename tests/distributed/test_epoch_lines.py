"""The lines of a training on a terminal and in a log."""

import io
import re

from rich.console import Console

from ser_ray.distributed.epoch_lines import show_epochs


def row(epoch: int, ua: float) -> dict[str, float]:
    return {
        "epoch": float(epoch), "train/loss": 1.5, "val/loss": 1.25, "val/ua": ua, "val/wa": 0.5,
        "lr": 1e-3, "speed/clips_per_second": 44.0, "speed/epoch_seconds": 20.0,
    }  # fmt: skip


def lines_of(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


def test_a_terminal_keeps_a_line_an_epoch_and_has_a_bar_below() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    with show_epochs(console, 4) as show:
        for epoch, ua in enumerate((0.3, 0.5, 0.4), start=1):
            show(row(epoch, ua))
    lines = lines_of(console)
    assert len([line for line in lines if re.match(r"epoch +[123]/4  loss 1\.500", line)]) == 3
    assert max(map(len, lines)) <= 80
    assert any("0:20 left  best UA 50.0% in epoch 2" in line for line in lines)


def test_a_log_gets_a_line_an_epoch() -> None:
    console = Console(file=io.StringIO(), width=200)
    with show_epochs(console, 2) as show:
        show(row(1, 0.3))
        show(row(2, 0.2))
    assert lines_of(console) == [
        "epoch   1/2  loss 1.500, validation 1.250  UA  30.0%  WA  50.0%  lr 1.00e-03     44 "
        "clips/s  0:20 left  best so far",
        "epoch   2/2  loss 1.500, validation 1.250  UA  20.0%  WA  50.0%  lr 1.00e-03     44 "
        "clips/s  0:00 left",
    ]
