"""One process at a time holds a lock, whatever happens to processes, machines, clocks and disks."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ser_ray.errors import CheckpointError, LockLostError, ShardsError
from ser_ray.storage import lock as module
from ser_ray.storage.lock import LOCK_NAME, FolderLock


def lock_of(folder: Path | str) -> FolderLock:
    return FolderLock(str(folder), ShardsError, activity="is here", advice="go away")


def write_claim(folder: Path, **changes: object) -> None:
    claim = lock_of(folder)._claim | {"token": "other", "since": "noon", "beat": 0}
    (folder / LOCK_NAME).write_text(json.dumps(claim | changes))


def read_claim(folder: Path) -> dict[str, Any]:
    claim: dict[str, Any] = json.loads((folder / LOCK_NAME).read_text())
    return claim


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give the lock a `time` module of its own, in which a test can replace functions.

    Other threads of the process sleep too, so the real module stays as it is.
    """
    functions = {name: getattr(time, name) for name in ("time", "monotonic", "sleep", "strftime")}
    clock = SimpleNamespace(**functions)
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def watching(clock: SimpleNamespace) -> list[float]:
    """Let time pass only while the lock sleeps, and return the seconds of each sleep."""
    slept: list[float] = []
    clock.sleep = slept.append
    clock.monotonic = lambda: sum(slept)
    return slept


def test_the_holder_is_named_at_once_and_leaves_nothing(
    tmp_path: Path, watching: list[float]
) -> None:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with lock_of(tmp_path / "new"), pytest.raises(ShardsError, match=holder):
        lock_of(tmp_path / "new").__enter__()
    with lock_of(tmp_path / "new"):
        pass
    assert not list((tmp_path / "new").iterdir())
    assert watching == []


def test_the_lock_of_a_process_that_ended_on_this_machine_is_taken_over_without_waiting(
    tmp_path: Path, watching: list[float]
) -> None:
    write_claim(tmp_path, pid=dead_process())
    with lock_of(tmp_path) as held:
        held.require_held()
        assert read_claim(tmp_path)["pid"] == os.getpid()
    assert watching == [module.SETTLE_SECONDS]


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "elsewhere"},
        {"pid_namespace": "pid:[1]", "pid": dead_process()},
        {"process_started": 1.0},
    ],
    ids=["another machine", "another container", "this machine, process id used again"],
)
def test_the_lock_of_a_holder_that_cannot_be_seen_is_taken_over_only_after_a_silence(
    tmp_path: Path, watching: list[float], changes: dict[str, object]
) -> None:
    write_claim(tmp_path, **changes)
    with lock_of(tmp_path) as held:
        held.require_held()
        assert read_claim(tmp_path)["token"] == held._claim["token"]
    assert sum(watching) == module.STALE_SECONDS + module.SETTLE_SECONDS


@pytest.mark.parametrize("offset", [-3600.0, -60.0, 0.0, 3600.0])
def test_a_living_holder_keeps_its_lock_whatever_its_clock_says(
    tmp_path: Path, clock: SimpleNamespace, offset: float
) -> None:
    """The holder is on another machine, so neither its clock nor the file's times can be used."""
    write_claim(tmp_path, host="elsewhere", alive=time.time() + offset)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == 9:
            write_claim(tmp_path, host="elsewhere", alive=time.time() + offset, beat=1)
        os.utime(tmp_path / LOCK_NAME, (1, time.time() + offset))

    clock.sleep = sleep
    clock.monotonic = lambda: sum(slept)
    with pytest.raises(ShardsError, match=r"on elsewhere is here \(since noon\); go away"):
        lock_of(tmp_path).__enter__()
    assert read_claim(tmp_path)["beat"] == 1


def test_a_lock_that_is_released_while_it_is_watched_is_acquired(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    write_claim(tmp_path, host="elsewhere")
    clock.sleep = lambda _: (tmp_path / LOCK_NAME).unlink()
    with lock_of(tmp_path) as held:
        assert read_claim(tmp_path)["token"] == held._claim["token"]


@pytest.mark.parametrize("text", ["", "[]", "null"])
def test_an_unreadable_lock_is_taken_over_once_it_is_old(
    text: str, tmp_path: Path, watching: list[float]
) -> None:
    (tmp_path / LOCK_NAME).write_text(text)  # a full disk leaves an empty file
    with lock_of(tmp_path) as held:
        held.require_held()
    assert sum(watching) == module.STALE_SECONDS + module.SETTLE_SECONDS


def test_the_file_changes_with_every_beat(tmp_path: Path) -> None:
    with lock_of(tmp_path) as held:
        claims = [read_claim(tmp_path)]
        for _ in range(2):
            held._send_heartbeat()
            claims.append(read_claim(tmp_path))
    assert [claim["beat"] for claim in claims] == [0, 1, 2]


def test_a_disk_that_is_full_for_a_beat_leaves_the_claim(tmp_path: Path) -> None:
    with lock_of(tmp_path) as held:
        claim = read_claim(tmp_path)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                held._send_heartbeat()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert read_claim(tmp_path) == claim
        held.require_held()
    assert not list(tmp_path.iterdir())


def test_of_many_processes_at_once_exactly_one_gets_the_lock(tmp_path: Path) -> None:
    start, end = (threading.Barrier(8, timeout=30) for _ in range(2))

    def run(_: int) -> str:
        start.wait()
        try:
            with lock_of(tmp_path):
                end.wait()
                return "won"
        except ShardsError:
            end.wait()
            return "lost"

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(run, range(8))) == ["lost"] * 7 + ["won"]


@pytest.mark.parametrize("is_last", [True, False])
def test_in_a_bucket_the_last_to_write_wins(is_last: bool, clock: SimpleNamespace) -> None:
    """All processes that saw no lock write one within the time that each of them waits."""
    folder = f"memory://{uuid.uuid4().hex}"
    other, lock = lock_of(folder), lock_of(folder)
    clock.sleep = lambda _: None if is_last else other._write()
    if is_last:
        with lock:
            assert lock._is_ours()
    else:
        with pytest.raises(ShardsError, match=f"process {os.getpid()} .* is here"):
            lock.__enter__()
        assert other._is_ours()


def test_a_successors_lock_is_noticed_at_the_next_beat_and_left_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.01)
    with lock_of(tmp_path) as held:
        write_claim(tmp_path, host="elsewhere")
        held._thread.join(30)  # it ends with the lock
        with pytest.raises(LockLostError, match="on elsewhere"):
            held.require_held()
    assert read_claim(tmp_path)["host"] == "elsewhere"


def test_a_successors_lock_survives_a_release_between_two_beats(tmp_path: Path) -> None:
    with lock_of(tmp_path):
        write_claim(tmp_path, host="elsewhere")
    assert read_claim(tmp_path)["host"] == "elsewhere"


def test_a_check_reads_the_lock_once_a_beat_is_overdue(
    tmp_path: Path, clock: SimpleNamespace
) -> None:
    """A laptop that slept for an hour wakes up in the middle of an epoch."""
    with lock_of(tmp_path) as held:
        write_claim(tmp_path, host="elsewhere")
        held.require_held()
        woken = time.time() + 3600
        clock.time = lambda: woken
        with pytest.raises(LockLostError, match="on elsewhere"):
            held.require_held()


def test_a_check_between_two_beats_does_not_touch_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with lock_of(tmp_path) as held:
        monkeypatch.setattr(held, "_read", lambda: pytest.fail("it read"))
        held.require_held()
        monkeypatch.undo()


def test_a_deleted_lock_is_lost(tmp_path: Path) -> None:
    with lock_of(tmp_path) as held:
        (tmp_path / LOCK_NAME).unlink()
        held._send_heartbeat()
        with pytest.raises(
            LockLostError,
            match=r"lock\.json: the lock was deleted, perhaps because .* is here; go away",
        ):
            held.require_held()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / place
    with pytest.raises(CheckpointError) as caught:
        FolderLock(str(folder), CheckpointError, activity="is here", advice="go away").__enter__()
    assert str(caught.value).startswith(f"{folder}/lock.json: cannot be written (")
    assert str(caught.value).endswith("; choose another folder, or make this one writable")


@pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has a folder that root cannot write"
)
def test_a_read_only_folder_is_one_error() -> None:
    with pytest.raises(ShardsError, match=r"^/sys/lock.json: cannot be written \(.*Permission"):
        lock_of("/sys").__enter__()


def test_a_bucket_that_is_away_for_a_moment_keeps_no_lock(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ser_ray.storage.lock.POLL_SECONDS", 0.01)
    with lock_of("memory://away-for-a-moment") as held:
        is_ours, failures = held._is_ours, [OSError("503"), OSError("503")]

        def away_at_first() -> bool:
            if failures:
                raise failures.pop()
            return is_ours()

        monkeypatch.setattr(held, "_is_ours", away_at_first)
    assert held._read() is None
    assert caplog.text == ""


@pytest.mark.parametrize("is_failing", [True, False])
def test_a_failed_release_is_a_warning_and_hides_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_failing
) -> None:
    def away() -> None:
        raise OSError("no route to host")

    def work() -> None:
        with lock_of(tmp_path) as held:
            monkeypatch.setattr(held, "_read", away)
            if is_failing:
                raise KeyError("what mattered")

    if is_failing:
        with pytest.raises(KeyError, match="what mattered"):
            work()
    else:
        work()
    assert "cannot be removed (no route to host)" in caplog.text
