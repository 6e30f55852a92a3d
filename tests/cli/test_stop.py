"""Signals and encodings, for every verb."""

import contextlib
import io
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest

from ser_ray.cli import main as main_module
from ser_ray.cli.main import main
from ser_ray.cli.stop import make_output_safe
from ser_ray.cli.verb import VerbResult
from tests.clips import voice, write_wav
from tests.conftest import make_memory_shards
from tests.processes import family, has_ended, wait_for
from tests.shard_files import write_shard_files


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], VerbResult]], int]:
    """Run a function as the verb `export` would be run; returns the exit status."""

    def run(work: Callable[[], VerbResult]) -> int:
        monkeypatch.setattr(main_module.Export, "run", lambda self: work())
        return main(["export", "model"])

    return run


@pytest.fixture(autouse=True)
def _default_signals() -> Any:
    """Restore the default signals: under `nohup pytest`, SIGHUP is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_lets_a_verb_clean_up_and_says_one_line(verb, capfd, number, status):
    cleaned = []

    def work() -> VerbResult:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGTERM)  # an impatient second one
            cleaned.append(True)
            raise
        raise AssertionError("the signal was lost")

    assert verb(work) == status
    assert cleaned == [True]
    name = signal.Signals(number).name
    assert capfd.readouterr().err == f"stopped by {name}\n"
    assert signal.getsignal(number) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("words", "resumes"),
    [
        ("pipeline", True),
        ("download", True),
        ("prepare --corpus a.csv", True),
        ("train", True),
        ("lr-range", False),
        ("tune", True),
        ("crossval", True),
        ("evaluate model", False),
        ("predict a.wav --model model", False),
        ("predict a.wav --model model --output a.csv", True),
        ("demo-ui model", False),
        ("export model", False),
        ("register id", False),
    ],
)
def test_an_interrupted_verb_says_how_to_resume_if_it_can_be_resumed(
    monkeypatch, capfd, words, resumes
):
    def interrupt(_: object) -> VerbResult:
        raise KeyboardInterrupt

    name, *_ = arguments = words.split()
    monkeypatch.setattr(main_module.VERBS[name], "run", interrupt)
    assert main(arguments) == 130
    advice = "; to resume, run the same command again" if resumes else ""
    assert capfd.readouterr().err == f"interrupted{advice}\n"


def test_a_signal_in_a_finalizer_is_not_lost(verb, capfd):
    """Python ignores an error that is raised there."""

    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> VerbResult:
        Finalized()
        wait_for("the signal", lambda: False)
        raise AssertionError("unreachable")

    assert verb(work) == 143
    assert capfd.readouterr().err == "stopped by SIGTERM\n"


def test_a_library_that_replaces_the_error_of_a_signal_does_not_disturb_the_cleanup(verb, capfd):
    """As Ray's C++ code does in `ray.wait`, which runs while a search or a batch pass runs."""
    cleaned = []

    def work() -> VerbResult:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        resend = next(t for t in threading.enumerate() if isinstance(t, threading.Timer))
        try:
            raise KeyboardInterrupt
        finally:
            resend.join()
            cleaned.append(True)

    assert verb(work) == 143
    assert cleaned == [True]
    assert capfd.readouterr().err == "stopped by SIGTERM\n"


def test_a_signal_that_is_ignored_stays_ignored(verb):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    def work() -> VerbResult:
        signal.raise_signal(signal.SIGHUP)
        return VerbResult({}, "done")

    assert verb(work) == 0


def test_a_closed_terminal_does_not_prevent_the_cleanup(verb):
    keep = [os.dup(1), os.dup(2)]
    leader, terminal = os.openpty()
    try:
        for descriptor in (1, 2):
            os.dup2(terminal, descriptor)
        os.close(terminal)

        def work() -> VerbResult:
            os.close(leader)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(2, b"progress")
            try:
                signal.raise_signal(signal.SIGHUP)
            finally:
                os.write(2, b"more progress")
            raise AssertionError("the signal was lost")

        assert verb(work) == 129
    finally:
        for descriptor, kept in zip((1, 2), keep, strict=True):
            os.dup2(kept, descriptor)
            os.close(kept)


def test_output_is_readable_in_ascii(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    make_output_safe()
    print("UA 71 % ± 2 %, 0:01–0:03 ██ Müller\udcff.wav", flush=True)
    assert written.getvalue() == b"UA 71 % +- 2 %, 0:01-0:03 ## M\\xfcller\\udcff.wav\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_verb_runs_although_its_output_is_closed(closed, in_tmp):
    done = subprocess.run(
        f"{sys.executable} -m ser_ray download --dry-run {closed}", shell=True, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (b'"download"' in done.stdout) == (">&-" not in closed.split())


def test_a_full_disk_is_one_line(verb, capsys):
    def work() -> VerbResult:
        with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
            full.write("model")
        raise AssertionError("there was room")

    assert verb(work) == 2
    assert capsys.readouterr().err == "error: No space left on device\n"


def test_an_error_of_a_bucket_is_one_line(verb, capsys):
    """They have no number: pyarrow makes them from the answers of AWS."""

    def work() -> VerbResult:
        raise OSError("When reading 'runs/a':\n  AWS Error NETWORK_CONNECTION")

    assert verb(work) == 2
    assert capsys.readouterr().err == "error: When reading 'runs/a': AWS Error NETWORK_CONNECTION\n"


def test_another_error_of_the_system_keeps_its_traceback(verb):
    def work() -> VerbResult:
        raise FileNotFoundError("our own bug")

    with pytest.raises(FileNotFoundError):
        verb(work)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "number"), [("crossval", signal.SIGTERM), ("predict", signal.SIGHUP)]
)
def test_a_verb_that_is_stopped_while_ray_works_leaves_nothing(
    tmp_path: Path, verb: str, number: int
) -> None:
    """Neither a process nor a file of Ray, and no MLflow run that seems to run."""
    if verb == "crossval":
        shards = write_shard_files(tmp_path / "shards", make_memory_shards(num_frames=26))
        recipe = ["--protocol", "speaker-2", "--weights", "none", "--epochs", "1000"]
        words = ["--shards", shards, "--device", "cpu", *recipe, "--crop-frames", "24"]
    else:
        from tests.models import make_checkpoint

        (tmp_path / "model").mkdir()
        make_checkpoint(tmp_path / "model")
        clips = [write_wav(tmp_path / f"{n}.wav", voice(500.0, 8_000), 8_000) for n in range(4)]
        words = [*map(str, clips), "--model", str(tmp_path / "model"), "--output", "a.csv"]
    with TemporaryDirectory(prefix="t", dir="/tmp") as root:
        driver = subprocess.Popen(
            [sys.executable, "-c", "from ser_ray.cli.main import main; exit(main())", verb, *words],
            cwd=tmp_path, env=os.environ | {"RAY_TMPDIR": root}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            wait_for("work on Ray", lambda: "ray::" in works(driver.pid) or driver.poll())
            started = [psutil.Process(member) for member in family(driver.pid)]
            driver.send_signal(number)
            _, printed = driver.communicate()
        finally:
            driver.kill()
        assert driver.returncode == 128 + number, printed
        name = signal.Signals(number).name
        assert printed.endswith(f"stopped by {name}; to resume, run the same command again\n")
        assert not os.listdir(root)  # noqa: PTH208
    wait_for("the end of all processes", lambda: all(map(has_ended, started)))
    if verb == "crossval":
        with contextlib.closing(sqlite3.connect(tmp_path / "ser-ray-out" / "mlflow.db")) as store:
            assert {row[0] for row in store.execute("SELECT status FROM runs")} == {"KILLED"}


def works(driver: int) -> str:
    """The titles of the Ray workers of a driver that do something."""
    return "".join(
        command for command in family(driver).values() if re.match("ray::(Impl|Map)", command)
    )
