import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from pyarrow import fs

from ser_ray.errors import ShardsError
from ser_ray.lock import LOCK_NAME, Lock
from ser_ray.storage import filesystem_of


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
    with lock_of(tmp_path) as lock:
        lock.check()
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()


def test_a_holder_elsewhere_is_believed(tmp_path: Path) -> None:
    write_claim(tmp_path, host="elsewhere", pid=dead_process())
    with pytest.raises(ShardsError, match="on elsewhere since noon"):
        lock_of(tmp_path).__enter__()


@pytest.mark.parametrize("place", ["local", "memory"])
def test_of_many_at_once_one_wins(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ser_ray.lock.SETTLE_SECONDS", 0.3)
    uri = str(tmp_path) if place == "local" else "memory://lock-test"
    filesystem, folder = filesystem_of(uri)
    filesystem.create_dir(folder)
    start, end = threading.Barrier(8), threading.Barrier(8)
    results = []

    def run() -> None:
        start.wait()
        try:
            with Lock(filesystem, folder, ShardsError, "is here"):
                results.append("won")
                end.wait()
        except ShardsError:
            results.append("lost")
            end.wait()

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["lost"] * 7 + ["won"]


def test_a_lost_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A laptop that slept for an hour wakes up to find another run at work."""
    monkeypatch.setattr("ser_ray.lock.BEAT_SECONDS", 0.05)
    with lock_of(tmp_path) as lock:
        lock.check()
        write_claim(tmp_path, host="elsewhere")
        time.sleep(0.5)
        with pytest.raises(ShardsError, match="on elsewhere"):
            lock.check()
    assert json.loads((tmp_path / LOCK_NAME).read_text())["host"] == "elsewhere"
