"""Trainings in this process: their checkpoints, failures and stops.

That they end with the weights of a worker of Ray is a test of `test_train`.
"""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load_file

from ser_ray.cli.train import Train
from ser_ray.distributed import in_process
from ser_ray.distributed.in_process import train_in_process
from ser_ray.distributed.lr_range import run_lr_range
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import (
    TRACE,
    Epoch,
    RunFolder,
    StoredCheckpoint,
    TrainingTask,
)
from ser_ray.distributed.train import train
from ser_ray.errors import (
    CheckpointError,
    ConfigError,
    LockLostError,
    MismatchError,
    SerRayError,
    ShardsError,
)
from ser_ray.evaluation.evaluate import evaluate
from ser_ray.evaluation.to_mlflow import register
from ser_ray.storage.lock import FolderLock
from ser_ray.tracking.run_metadata import NOTE
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.checkpoint import MODEL, Snapshot
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import LrRangeConfig, TrainConfig
from tests.mlflow_store import new_store
from tests.shard_files import write_shard_files

CONFIG = TrainConfig(
    protocol="speaker-3", epochs=3, batch_size=6, crop_frames=16, weights="none", lr_max=5e-3
)


@pytest.fixture
def make(tmp_path, memory_shards, small_network):
    def task(name: str = "run", max_failures: int = 0):
        folder = RunFolder(str(tmp_path), name)
        folder.update_record(name=name)
        run = RunConfig(max_failures=max_failures)
        return TrainingTask(folder, CONFIG, memory_shards, Pretrained("none", {}), run)

    return task


def weights_of(task: TrainingTask) -> dict[str, torch.Tensor]:
    newest = task.folder.newest()
    assert newest is not None
    return load_file(Path(task.folder.path, newest.name, MODEL))


def test_epochs_arrive_once_stored_and_only_the_newest_and_the_selected_are_kept(make):
    task, found = make(), []

    def on_epoch(epoch: Epoch) -> None:
        stored = task.folder.newest()
        assert stored.progress["history"][-1] == epoch.row
        assert {path.name for path in Path(task.folder.path).glob("checkpoint-*")} == {
            stored.name, stored.selected,
        }  # fmt: skip
        found.append(epoch)

    train_in_process(task, on_epoch, gpu=False)
    assert [epoch.row["epoch"] for epoch in found] == [1, 2, 3]
    assert not any(epoch.is_restored for epoch in found)
    again: list[Epoch] = []
    train_in_process(task, again.append, gpu=False)
    assert [epoch.row for epoch in again] == [epoch.row for epoch in found]
    assert all(epoch.is_restored for epoch in again)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the user's")])
def test_a_stop_by_the_caller_is_no_failure_and_the_next_start_ends_the_same(make, error):
    whole, stopped = make("whole"), make("stopped", max_failures=3)
    train_in_process(whole, lambda epoch: None, gpu=False)

    def stop(epoch: Epoch) -> None:
        if not epoch.is_restored:
            raise error

    with pytest.raises(type(error)) as raised:
        train_in_process(stopped, stop, gpu=False)
    assert raised.value is error
    assert len(stopped.folder.newest().progress["history"]) == 1
    train_in_process(stopped, lambda epoch: None, gpu=False)
    expected, found = weights_of(whole), weights_of(stopped)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Unreliable:
    """Raises an error in some of its calls, counted from 1."""

    def __init__(self, error: Exception, calls: set[int]) -> None:
        self.error, self.calls, self.count = error, calls, 0

    def strike(self) -> None:
        self.count += 1
        if self.count in self.calls:
            raise self.error


@pytest.mark.parametrize(
    ("error", "calls", "max_failures", "message"),
    [
        (OSError(28, "No space left on device"), {2}, 1, ""),
        (OSError(28, "No space left on device"), {2, 3}, 1, r"failed: OSError: .*No space left"),
        (OSError(28, "No space left on device"), {2, 3, 4}, -1, ""),
        (ShardsError("no answer"), {1}, 0, "^no answer$"),
        (ConfigError("bad recipe"), {1}, 3, "^bad recipe$"),
        (torch.OutOfMemoryError("CUDA out of memory"), {1}, 3, r"OutOfMemoryError: CUDA out of m"),
    ],
)
def test_a_failure_is_tried_again_if_that_may_help(
    make, monkeypatch, caplog, error, calls, max_failures, message
):
    whole, task = make("whole"), make(max_failures=max_failures)
    train_in_process(whole, lambda epoch: None, gpu=False)
    storage, store = Unreliable(error, calls), Snapshot.store

    def store_or_fail(self: Snapshot, filesystem: fs.FileSystem, path: str) -> None:
        storage.strike()
        store(self, filesystem, path)

    monkeypatch.setattr(Snapshot, "store", store_or_fail)
    monkeypatch.setattr(in_process, "RETRY_SECONDS", 0)
    seen: list[Epoch] = []
    if message:
        with pytest.raises(SerRayError, match=message):
            train_in_process(task, seen.append, gpu=False)
        is_ours = isinstance(error, SerRayError)
        assert Path(task.folder.path, TRACE).exists() != is_ours
        assert len(caplog.messages) == len(calls) - 1
        return
    train_in_process(task, seen.append, gpu=False)
    assert len(caplog.messages) == len(calls)
    assert {epoch.row["epoch"] for epoch in seen} == {1, 2, 3}
    expected, found = weights_of(whole), weights_of(task)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_storage_that_is_away_at_the_start_is_tried_again(make, monkeypatch, caplog):
    task, newest = make(max_failures=2), RunFolder.newest
    pauses: list[float] = []
    storage = Unreliable(OSError("AWS Error NETWORK_CONNECTION"), {1, 2})

    def newest_or_fail(self: RunFolder) -> StoredCheckpoint | None:
        storage.strike()
        return newest(self)

    monkeypatch.setattr(RunFolder, "newest", newest_or_fail)
    monkeypatch.setattr(in_process, "time", SimpleNamespace(sleep=pauses.append))
    seen: list[Epoch] = []
    train_in_process(task, seen.append, gpu=False)
    assert [epoch.row["epoch"] for epoch in seen] == [1, 2, 3]
    assert pauses == [in_process.RETRY_SECONDS] * 2
    assert "NETWORK_CONNECTION" in caplog.text


def test_a_folder_that_another_process_took_over_is_not_tried_again(make, monkeypatch, caplog):
    task = make(max_failures=3)

    def refuse() -> None:
        raise LockLostError("process 1 on elsewhere is training under this name")

    monkeypatch.setattr(task.folder, "check_lock", refuse)
    with pytest.raises(LockLostError):
        train_in_process(task, lambda epoch: pytest.fail("it trains"), gpu=False)
    assert not caplog.messages


def test_the_threads_and_the_device_are_those_of_a_worker_of_ray(monkeypatch):
    monkeypatch.setattr(in_process, "cpus_per_worker", lambda workers: 3)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    with in_process.worker_device(gpu=True) as device:
        assert (device.type, torch.get_num_threads()) == ("cuda", 3)
    assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with in_process.worker_device(gpu=False) as device:
        assert (device.type, torch.get_num_threads()) == ("cpu", 2)


@pytest.mark.slow
def test_a_model_of_all_speakers_is_registered_without_scores(in_tmp, small_network):
    shards = write_shard_files(in_tmp / "shards")
    recipe = replace(CONFIG, protocol="all")
    rows: list[Mapping[str, float]] = []
    run = RunConfig(tracking_uri=new_store(in_tmp), device="cpu")
    result = train(shards, recipe, run, on_epoch=rows.append)
    assert result.card.split["train_speakers"] == sorted({"01", "02", "03", "04", "05", "06"})
    assert len(rows) == recipe.epochs
    assert not any(name.startswith("val/") for name in rows[0])
    printed = Train(shards=(shards,)).training_result(result)
    assert "all speakers, no validation or test part" in printed.text
    assert f"ser-ray register {result.run_id}" in printed.next_step
    with pytest.raises(ConfigError, match="all has no test part"):
        evaluate(Path(result.checkpoint), shards)
    _, card = register(result.run_id, "shipped", "champion", result.tracking_uri)
    assert "trained on 6 speakers" in card
    assert "no validation or test score of its own" in card
    assert "UA" not in card


def test_a_run_is_described_once_with_the_command_that_repeats_it(
    in_tmp, small_network, monkeypatch
):
    notes, set_tags = [], Tracker.set_tags

    def record(tracker: Tracker, tags: Mapping[str, str]) -> None:
        notes.extend([tags[NOTE]] if NOTE in tags else [])
        set_tags(tracker, tags)

    def stop(row: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tracker, "set_tags", record)
    shards, uri = write_shard_files(in_tmp / "shards"), new_store(in_tmp)
    with pytest.raises(KeyboardInterrupt):
        train(shards, CONFIG, RunConfig(tracking_uri=uri, name="run"), on_epoch=stop)
    run_id = RunFolder("ser-ray-out/runs", "run").record()["run_id"]
    [note] = notes
    assert f"**Again**: `ser-ray train --like {run_id} " in note
    assert "**Run**: one training" in note


@pytest.mark.slow
def test_a_project_that_was_moved_goes_on_in_its_own_run(in_tmp, small_network, monkeypatch):
    def stop(row: Mapping[str, float]) -> None:
        raise KeyboardInterrupt

    def move(name: str) -> str:
        monkeypatch.chdir(in_tmp)
        project.rename(in_tmp / name)
        monkeypatch.chdir(in_tmp / name)
        return f"sqlite:///{in_tmp}/{name}/ser-ray-out/mlflow.db"

    project = in_tmp / "first"
    write_shard_files(project / "shards")
    monkeypatch.chdir(project)
    with pytest.raises(KeyboardInterrupt):
        train("shards", CONFIG, RunConfig(name="run"), on_epoch=stop)
    begun = RunFolder("ser-ray-out/runs", "run").record()["run_id"]
    store = move("second")
    finished = train("shards", CONFIG, RunConfig(name="run"), on_epoch=lambda row: None)
    assert (finished.run_id, finished.tracking_uri) == (begun, store)
    project = in_tmp / "second"
    store = move("third")
    again = train("shards", CONFIG, RunConfig(name="run"), on_epoch=stop)
    assert (again.run_id, again.tracking_uri) == (begun, store)


@pytest.mark.slow
def test_verbs_that_one_process_can_do_load_no_ray_and_start_no_process(in_tmp):
    """Without `ray` in the process, and with no process left behind or running beside it."""
    shards = write_shard_files(in_tmp / "shards")
    program = """
import subprocess, sys, threading
import psutil
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
from ser_ray.cli.main import main
from pathlib import Path
flags = ["--shards", %r, "--protocol", "speaker-3", "--epochs", "1", "--batch-size", "6",
         "--crop-frames", "16", "--weights", "none", "--device", "cpu"]
assert main(["train", *flags, "--name", "one"]) == 0
assert main(["lr-range", *flags, "--steps", "80", "--name", "one"]) == 0
assert Path("ser-ray-out/runs/one-2/report.html").exists(), "the page of the training is kept"
assert main(["evaluate", "ser-ray-out/runs/one/selected", "--shards", %r]) == 0
assert not psutil.Process().children(recursive=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program % (shards, shards)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_no_training_runs_in_the_folder_of_a_range_test(in_tmp, small_network, monkeypatch):
    shards, run, test = (
        write_shard_files(in_tmp / "shards"),
        RunConfig(name="one"),
        LrRangeConfig(lowest=1e-4, steps=80),
    )
    other = FolderLock("ser-ray-out/runs/one", SerRayError, activity="", advice="")
    with other, monkeypatch.context() as patch:
        patch.setattr(RunFolder, "is_used", lambda folder: False)  # it began a moment ago
        with pytest.raises(CheckpointError, match="under this name"):
            run_lr_range(shards, CONFIG, run, test)
    result = run_lr_range(shards, CONFIG, run, test)
    page = Path(result.report).read_bytes()
    with pytest.raises(
        MismatchError, match="runs/one: the earlier run of this name was made by another verb"
    ):
        train(shards, CONFIG, run, on_epoch=lambda row: None)
    assert Path(result.report).read_bytes() == page
    assert RunFolder("ser-ray-out/runs", "one").record()["run_id"] == result.run_id
