import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pyarrow import fs

from ser_ray.errors import ShardsError
from ser_ray.storage import lock
from ser_ray.storage.lock import LOCK_NAME, Lock
from ser_ray.storage.paths import filesystem_of


def lock_of(folder: Path) -> Lock:
    return Lock(fs.LocalFileSystem(), str(folder), ShardsError, "is here")


def write_claim(folder: Path, **changes: object) -> None:
    claim = {"token": "x", "host": socket.gethostname(), "pid": os.getpid(), "since": "noon"}
    (folder / LOCK_NAME).write_text(json.dumps(claim | {"alive": time.time()} | changes))


def dead_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_holder_is_named(tmp_path: Path) -> None:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with lock_of(tmp_path), pytest.raises(ShardsError, match=holder):
        lock_of(tmp_path).__enter__()
    with lock_of(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "changes",
    [{"pid": dead_process()}, {"host": "elsewhere", "alive": time.time() - 61}, {"alive": 0.0}],
    ids=["its process is gone", "silent elsewhere", "silent here, its number taken again"],
)
def test_a_dead_holder_is_followed(tmp_path: Path, changes: dict[str, object]) -> None:
    write_claim(tmp_path, **changes)
    with lock_of(tmp_path) as held:
        held.check()
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_claim_that_nobody_can_read_is_followed_once_it_is_old(tmp_path: Path) -> None:
    claim = tmp_path / LOCK_NAME
    claim.touch()  # a full disk left this
    with pytest.raises(ShardsError, match="another run is here"):
        lock_of(tmp_path).__enter__()
    old = time.time() - lock.STALE_SECONDS - 1
    os.utime(claim, (old, old))
    with lock_of(tmp_path) as held:
        held.check()


def test_a_disk_that_is_full_for_a_beat_leaves_the_claim(tmp_path: Path) -> None:
    with lock_of(tmp_path) as held:
        claim = (tmp_path / LOCK_NAME).read_text()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                held._write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        assert (tmp_path / LOCK_NAME).read_text() == claim
        held.check()
    assert not list(tmp_path.iterdir())


def test_a_holder_elsewhere_is_believed(tmp_path: Path) -> None:
    write_claim(tmp_path, host="elsewhere", pid=dead_process())
    with pytest.raises(ShardsError, match="on elsewhere since noon"):
        lock_of(tmp_path).__enter__()


def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
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
def test_in_a_bucket_the_last_to_write_wins(is_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looked before anybody wrote writes too, within the time that all of them wait."""
    filesystem, folder = filesystem_of(f"memory://lock-test-{is_last}")
    filesystem.create_dir(folder)
    other = Lock(filesystem, folder, ShardsError, "is here")
    lock = Lock(filesystem, folder, ShardsError, "is here")
    monkeypatch.setattr(
        "ser_ray.storage.lock.time.sleep", lambda _: None if is_last else other._write()
    )
    if is_last:
        with lock:
            assert lock._is_ours()
    else:
        with pytest.raises(ShardsError, match=f"process {os.getpid()} .* is here"):
            lock.__enter__()
        assert other._is_ours()


def test_a_lost_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept for an hour wakes up to find another run at work."""
    monkeypatch.setattr("ser_ray.storage.lock.BEAT_SECONDS", 0.05)
    with lock_of(tmp_path) as held:
        held.check()
        write_claim(tmp_path, host="elsewhere")
        time.sleep(0.5)
        with pytest.raises(ShardsError, match="on elsewhere"):
            held.check()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["host"] == "elsewhere"
