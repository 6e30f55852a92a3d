"""Trainings by Ray Train that lose what they run on.

Every scenario ends as an uninterrupted run does: with the same weights, bit for bit where one CPU
worker did all of it, and the same learning rates in one MLflow run.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from mlflow import MlflowClient
from ray import cloudpickle
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from safetensors.torch import load_file

from ser_ray.command import flags_of
from ser_ray.distributed import placement, worker_group
from ser_ray.distributed import train as train_module
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RAY_LIST, RunFolder
from ser_ray.distributed.train import TrainResult, train
from ser_ray.distributed.worker import preemption_check
from ser_ray.errors import (
    CheckpointError,
    ConfigError,
    LockLostError,
    SerRayError,
    ShardsError,
)
from ser_ray.evaluation import evaluate as evaluation
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage.lock import FolderLock
from ser_ray.training.calibration import apply_temperature
from ser_ray.training.checkpoint import MODEL, STATE, checkpoint_name
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from tests.mlflow_server import MlflowServer
from tests.mlflow_store import new_store
from tests.processes import wait_for
from tests.shard_files import write_shard_files

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # of its own settings
]

CONFIG = TrainConfig(
    augment=AugmentConfig(noise=0, echo=0, band_limit=0),
    protocol="speaker-3",
    epochs=6,
    batch_size=6,
    crop_frames=16,
    weights="none",
    lr_max=5e-3,
)
STEPS = 4 * CONFIG.epochs


class World:
    """A cluster on this machine, shards, a store, and trainings in them."""

    def __init__(self, folder: Path) -> None:
        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self.folder = folder
        self.shards = write_shard_files(folder / "shards")
        self.store = new_store(folder)

    def run(self, name: str, **how: object) -> RunConfig:
        return RunConfig(
            name=name,
            storage=str(self.folder / "runs"),
            tracking_uri=self.store,
            device="cpu",
            **how,  # type: ignore[arg-type]
        )

    def train(
        self,
        name: str,
        on_epoch: Callable[[int], None] = lambda _: None,
        config: TrainConfig = CONFIG,
        **how: object,
    ) -> TrainResult:
        return train(
            self.shards,
            config,
            self.run(name, **how),
            on_epoch=lambda row: on_epoch(int(row["epoch"])),
        )

    def run_folder(self, name: str) -> Path:
        return self.folder / "runs" / name

    def processes(self, title: str) -> list[int]:
        """Processes of this cluster's nodes by what Ray calls them."""
        raylets = {
            info.process.pid
            for node in self.cluster.list_all_nodes()
            for info in node.all_processes["raylet"]
        }
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                name = (path / "cmdline").read_bytes().decode()
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
            if parent in raylets and title in name:
                found.append(int(path.name))
        return found

    def kill(self, title: str) -> None:
        pids = self.processes(title)
        assert pids, f"no {title} to kill"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def learning_rates(self, run_id: str) -> list[tuple[int, float]]:
        history = MlflowClient(self.store).get_metric_history(run_id, "train/lr")
        return sorted((metric.step, metric.value) for metric in history)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        # One process less for each start of the workers; no node here announces its end.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        world = World(tmp_path_factory.mktemp("world"))
        ray.init(address=world.cluster.address, log_to_driver=False, logging_level="ERROR")
        yield world
        ray.shutdown()
        world.cluster.shutdown()


@pytest.fixture(scope="module")
def uninterrupted(world: World) -> TrainResult:
    return world.train("uninterrupted")


def require_same_weights(checkpoint: Path, expected: Path) -> None:
    """Bit for bit; a failure names the layers and how far they are apart."""
    weights, others = (load_file(folder / MODEL) for folder in (checkpoint, expected))
    differing = {
        key: float((weights[key].double() - others[key].double()).abs().max())
        for key in others
        if not torch.equal(weights[key], others[key])
    }
    assert differing == {}


def assert_same(world: World, result: TrainResult, expected: TrainResult) -> None:
    keys = ("train/loss", "val/loss", "val/ua", "lr")
    for row, other in zip(result.history, expected.history, strict=True):
        assert {key: row[key] for key in keys} == {key: other[key] for key in keys}
    require_same_weights(Path(result.checkpoint), Path(expected.checkpoint))
    rates = world.learning_rates(result.run_id)
    assert rates == world.learning_rates(expected.run_id)
    assert [step for step, _ in rates] == list(range(STEPS))
    assert MlflowClient(world.store).get_run(result.run_id).info.status == "FINISHED"


def test_a_training_whose_worker_and_then_controller_are_killed_ends_the_same(
    world: World, uninterrupted: TrainResult
) -> None:
    victims = {1: "RayTrainWorker", 3: "TrainController"}
    killed = []

    def on_epoch(epoch: int) -> None:
        if victim := victims.pop(epoch, ""):
            world.kill(victim)
            killed.append(victim)

    result = world.train("killed", on_epoch)
    assert killed == ["RayTrainWorker", "TrainController"]
    assert_same(world, result, uninterrupted)


def test_a_killed_driver_resumes_past_its_incomplete_files_and_ends_the_same(
    world: World, uninterrupted: TrainResult, caplog: pytest.LogCaptureFixture
) -> None:
    folder = world.run_folder("driver-killed")
    driver = subprocess.Popen(command(world, "driver-killed", address=world.cluster.address))
    try:
        wait_for(
            "the second checkpoint",
            lambda: (folder / checkpoint_name(2)).exists() or driver.poll() is not None,
        )
    finally:
        driver.kill()
        driver.wait()
    assert driver.returncode == -signal.SIGKILL, "it was at work"
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    wait_for("the workers' end", lambda: not world.processes("RayTrainWorker"))
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    state = newest / STATE
    if state.exists():  # else the kill has cut it short already
        state.write_bytes(state.read_bytes()[:1000])
    assert (folder / RAY_LIST).exists(), "Ray has renamed its list: see run_folder.RAY_LIST"
    (folder / RAY_LIST).write_text('{"ray_ver')
    result = world.train("driver-killed")
    assert f"{newest.name} is incomplete and is skipped" in caplog.text
    assert result.run_id == run_id
    assert_same(world, result, uninterrupted)


def test_a_training_stopped_in_one_process_goes_on_as_a_worker_of_ray_and_ends_the_same(
    world: World, uninterrupted: TrainResult
) -> None:
    folder = world.run_folder("begun-here")
    driver = subprocess.Popen(
        command(world, "begun-here"), env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for(
            "the second checkpoint",
            lambda: (folder / checkpoint_name(2)).exists() or driver.poll() is not None,
        )
        driver.terminate()
        _, printed = driver.communicate()
    finally:
        driver.kill()
    assert driver.returncode == 128 + signal.SIGTERM
    assert printed.endswith("stopped by SIGTERM; to resume, run the same command again\n")
    assert "CPUs in this process" in printed
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    assert MlflowClient(world.store).get_run(run_id).info.status == "KILLED"
    result = world.train("begun-here")
    assert result.run_id == run_id
    assert_same(world, result, uninterrupted)


def test_a_training_begun_by_ray_goes_on_in_one_process_and_ends_the_same(
    world: World, uninterrupted: TrainResult
) -> None:
    def stop(epoch: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.train("begun-by-ray", stop)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(world, "begun-by-ray"), env=environment, check=True)
    assert_same(world, world.train("begun-by-ray"), uninterrupted)


def command(world: World, name: str, config: TrainConfig = CONFIG, **flags: str) -> list[str]:
    """The command line of `world.train`."""
    flags = {
        "shards": world.shards, "name": name, "storage": str(world.folder / "runs"),
        "tracking_uri": world.store, "device": "cpu",
    } | flags  # fmt: skip
    words = [word for key, value in flags.items() for word in (f"--{key.replace('_', '-')}", value)]
    return [sys.executable, "-m", "ser_ray", "train", *words, *flags_of(config)]


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_fifty_short_trainings_end_with_status_0(world: World) -> None:
    """Processes of Ray were seen to crash at their end (ray 51527)."""
    config = replace(CONFIG, epochs=1)
    for number in range(50):
        on_ray = {"address": world.cluster.address} if number % 2 else {}
        short = command(world, f"short-{number}", config, **on_ray)
        done = subprocess.run(short, capture_output=True, text=True)
        assert done.returncode == 0, f"training {number}: {done.stderr}"
    runs = MlflowClient(world.store).search_runs(["0", "1"], "attributes.run_name LIKE 'short-%'")
    assert [run.info.status for run in runs] == ["FINISHED"] * 50
    wait_for("the workers' end", lambda: not world.processes("RayTrainWorker"))


def can_mount() -> bool:
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(mount).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small disk")
def test_a_disk_that_was_full_while_checkpointing_costs_nothing(
    world: World, uninterrupted: TrainResult, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    train_there = shlex.join(command(world, "full", storage=str(disk), max_failures="0"))
    script = f"""
        mount -t tmpfs -o size=200m none {disk}  # a checkpoint takes 134 MB
        {train_there} 2> {tmp_path}/errors; echo $? > {tmp_path}/first
        mount -o remount,size=700m {disk}
        {train_there}; echo $? > {tmp_path}/second
        cp {disk}/full/selected/* {tmp_path}
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as the world's one CPU has it
    subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment, check=True)
    assert (tmp_path / "first").read_text() == "2\n"
    errors = (tmp_path / "errors").read_text()
    assert "No space left on device" in errors
    assert "the same command tries again from the newest checkpoint" in errors
    assert (tmp_path / "second").read_text() == "0\n"
    require_same_weights(tmp_path, Path(uninterrupted.checkpoint))


class FaultyShards(ShardSet):
    """Shards that the second worker cannot read, once or every time."""

    fault: SerRayError
    attempts: Path
    """Gets a line from the second worker whenever it reads."""
    is_lasting: bool

    def features(self, kind: str, rows: np.ndarray | None = None) -> np.ndarray:
        if dist.get_rank() == 1:
            with self.attempts.open("a") as file:
                file.write("\n")
            if self.is_lasting or num_lines(self.attempts) == 1:
                raise self.fault
        return super().features(kind, rows)


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def faulty_shards(shards: str, **how: object) -> FaultyShards:
    faulty = FaultyShards(shards, open_shards(shards).card)
    for name, value in how.items():
        object.__setattr__(faulty, name, value)
    return faulty


@pytest.fixture
def second_node(world: World) -> Iterator[None]:
    node = world.cluster.add_node(num_cpus=1)
    world.cluster.wait_for_nodes()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    world.cluster.remove_node(node)


@pytest.mark.timeout(600)  # the first worker would wait 30 minutes for the second
def test_two_workers_train_after_a_storage_error_of_one_and_score_for_the_drivers_page(
    world: World, second_node: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hiccup = ShardsError("the storage did not answer")
    shards = faulty_shards(
        world.shards, fault=hiccup, attempts=tmp_path / "attempts", is_lasting=False
    )
    monkeypatch.setattr(train_module, "open_corpora", lambda *_: shards)

    def refuse(*_: object) -> None:
        pytest.fail("the driver scores clips, which may not fit into its memory")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_score", refuse)
        result = world.train("hiccup", config=replace(CONFIG, epochs=2), workers="2")
    assert [row["speed/workers"] for row in result.history] == [2, 2]
    assert num_lines(shards.attempts) == 3, "one failed; then the training and validation clips"

    folder = RunFolder(str(world.folder / "runs"), "hiccup")
    newest = folder.newest()
    assert newest is not None
    scored = evaluation.evaluate(Path(result.checkpoint), world.shards, part="validation")
    found = apply_temperature(folder.validation_probabilities(newest), scored.card.temperature)
    np.testing.assert_allclose(found, scored.probabilities, atol=1e-6)
    assert scored.scores.ua == pytest.approx(result.selected["val/ua"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("fault", "max_failures"), [(ShardsError("no answer"), 0), (ConfigError("bad recipe"), 1)]
)
def test_a_lasting_error_of_one_of_two_workers_is_reported_as_it_is(
    world: World,
    second_node: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: SerRayError,
    max_failures: int,
) -> None:
    shards = faulty_shards(
        world.shards, fault=fault, attempts=tmp_path / "attempts", is_lasting=True
    )
    monkeypatch.setattr(train_module, "open_corpora", lambda *_: shards)
    with pytest.raises(type(fault), match=str(fault)):
        world.train(f"faulty-{max_failures}", workers="2", max_failures=max_failures)
    assert num_lines(shards.attempts) == 1


@pytest.mark.parametrize("workers", ["1", "1..2"])
def test_without_room_for_the_workers_the_training_ends_with_an_error(
    world: World, monkeypatch: pytest.MonkeyPatch, workers: str
) -> None:
    for module in (worker_group, placement):
        monkeypatch.setattr(module, "START_SECONDS", 1.0)
        monkeypatch.setattr(module, "START_ATTEMPTS", 3)
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    occupant = placement_group([{"CPU": 1}])
    assert occupant.wait(60)
    try:
        with pytest.raises(SerRayError, match=r"no room for|timed out .* waiting for 1"):
            world.train(f"no-room-{workers}", workers=workers)
    finally:
        remove_placement_group(occupant)


def test_a_training_that_loses_its_lock_ends_before_it_deletes_anything(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = world.run_folder("robbed")
    seen: list[int] = []
    kept: set[str] = set()

    def on_epoch(epoch: int) -> None:
        seen.append(epoch)
        if epoch == 2:  # another driver took the lock over, and has begun
            monkeypatch.setattr(FolderLock, "require_held", refuse)
            (folder / checkpoint_name(1, 1)).mkdir()
            kept.update(path.name for path in folder.glob("checkpoint-*"))

    def refuse(lock: FolderLock) -> None:
        raise LockLostError("process 1 on elsewhere is training under this name")

    with pytest.raises(LockLostError, match="on elsewhere is training"):
        world.train("robbed", on_epoch)
    assert seen == [1, 2], "it ends at once, not after its last epoch"
    assert checkpoint_name(1, 1) in {path.name for path in folder.glob("checkpoint-*")}
    run_id = json.loads((folder / "run.json").read_text())["run_id"]
    run = MlflowClient(world.store).get_run(run_id)
    assert run.info.status == "RUNNING", "the run is the other driver's now"


def test_a_second_run_of_the_same_name_is_refused(world: World, uninterrupted: TrainResult) -> None:
    folder = RunFolder(str(world.folder / "runs"), "taken")
    with (
        folder.lock(),
        pytest.raises(CheckpointError, match=r"is training under this name .*; wait"),
    ):
        world.train("taken")


def test_a_finished_run_is_not_trained_again(world: World, uninterrupted: TrainResult) -> None:
    again = world.train("uninterrupted", on_epoch=lambda epoch: pytest.fail("it trains"))
    assert again.history == uninterrupted.history
    assert (again.checkpoint, again.run_id) == (uninterrupted.checkpoint, uninterrupted.run_id)


def test_another_recipe_or_other_shards_under_a_name_are_refused(
    world: World, uninterrupted: TrainResult
) -> None:
    with pytest.raises(CheckpointError, match=r"lr_max is 0\.005 instead of 0\.01\); give another"):
        world.train("uninterrupted", config=replace(CONFIG, lr_max=0.01))
    card = Path(world.shards, "card.json")
    content = card.read_text()
    try:
        card.write_text(json.dumps(json.loads(content) | {"fingerprint": "another set"}))
        with pytest.raises(
            CheckpointError, match="shards_fingerprint differs: 'ffffffffffshards' instead of"
        ):
            world.train("uninterrupted")
    finally:
        card.write_text(content)


def test_when_the_tracking_server_returns_the_same_command_delivers_the_rest(
    world: World,
    uninterrupted: TrainResult,
    mlflow_server: MlflowServer,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(world, "store", mlflow_server.uri)
    away = world.train("server-away", lambda epoch: mlflow_server.stop() if epoch == 2 else None)
    assert [row["val/ua"] for row in away.history] == [
        row["val/ua"] for row in uninterrupted.history
    ]
    assert "the same command is run again" in caplog.text
    assert "could not be written" in away.undelivered, "the command line ends with an error"
    mlflow_server.start()
    assert MlflowClient(mlflow_server.uri).get_run(away.run_id).info.status == "RUNNING"
    again = world.train("server-away", lambda epoch: pytest.fail("it trains"))
    assert again.run_id == away.run_id
    assert MlflowClient(mlflow_server.uri).get_run(away.run_id).info.status == "FINISHED"
    assert [step for step, _ in world.learning_rates(away.run_id)] == list(range(STEPS))


def test_every_preemption_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, both = object(), object()
    infos = iter([None, first, first, both, both])
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: next(infos))
    check = preemption_check()
    assert [check() for _ in range(5)] == [False, True, False, True, False]


@pytest.mark.soak
def test_an_elastic_training_follows_the_nodes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_group, "RESIZE_SECONDS", 1.0)
    epochs = 80  # a new node is used after some ten seconds, or more where the CPUs are busy
    config = replace(CONFIG, epochs=epochs)
    nodes = [world.cluster.add_node(num_cpus=1)]
    world.cluster.wait_for_nodes()
    time.sleep(21)  # where trainings ran before, Ray looks for new nodes every 20 s
    seen: list[int] = []

    def on_epoch(row: dict[str, float]) -> None:
        seen.append(int(row["speed/workers"]))
        if len(seen) == 2:
            world.cluster.remove_node(nodes[0], allow_graceful=False)  # its raylet gets SIGKILL
        if seen[-1] == 1 and len(nodes) == 1:
            nodes.append(world.cluster.add_node(num_cpus=1))

    result = train(world.shards, config, world.run("elastic", workers="1..2"), on_epoch=on_epoch)
    world.cluster.remove_node(nodes[1])
    sizes = [size for size, _ in groupby(seen)]
    assert sizes == [2, 1, 2], "what is there is used, it shrinks, it grows"
    assert [int(row["epoch"]) for row in result.history] == list(range(1, epochs + 1))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)]),
        max_lr=config.lr_max,
        total_steps=4 * epochs,
        pct_start=config.pct_start,
        div_factor=config.lr_max / config.lr_min,
        final_div_factor=config.final_div_factor,
    )
    expected = []
    for _ in range(4 * epochs - 1):
        expected.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    expected.append(schedule.get_last_lr()[0])
    found = world.learning_rates(result.run_id)
    assert [step for step, _ in found] == list(range(4 * epochs))
    assert [rate for _, rate in found] == pytest.approx(expected, rel=1e-9)
