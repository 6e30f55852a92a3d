"""Progress is a bar on a terminal, and a few lines in a log."""

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from ser_ray import progress
from ser_ray.progress import show_progress


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(1000, 1050, 2))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with show_progress("steps") as report:
        for done in range(1, 26):
            report(f"step {done}", done, 25)
    assert capsys.readouterr().err.splitlines() == [
        "step 1",
        "step 6, 0.5 steps/s, 0:38 left",
        "step 11, 0.5 steps/s, 0:28 left",
        "step 16, 0.5 steps/s, 0:18 left",
        "step 21, 0.5 steps/s, 0:08 left",
        "step 25, 0.5 steps/s",
    ]


def test_a_notebook_does_not_get_progress_in_the_colour_of_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = io.StringIO()
    monkeypatch.setattr(progress, "stderr_console", lambda: Console(file=cells))
    with show_progress("steps") as report:
        report("step 1", 1, 1)
    assert cells.getvalue() == "step 1\n"


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.stderr_console.cache_clear()  # it knows whether it was made on a terminal
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with show_progress("steps") as report:
        report("step 3", 3, 12)
        report("step 12", 12, 12)
    shown = capsys.readouterr().err
    assert "━━━" in shown
    assert "step 12" in shown
    progress.stderr_console.cache_clear()


def test_text_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of files and messages of decoders are no markup and no emoji."""
    text = "[v2]/x [mp3 @ 0x5] [/neutral] :fire: [bold]b[/bold]"
    progress.stderr_console.cache_clear()
    progress.stderr_console().print(text)
    assert capsys.readouterr().err == f"{text}\n"
    progress.stderr_console.cache_clear()
