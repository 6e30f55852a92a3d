"""Machines with addresses of their own: a node in each of several network namespaces.

They share one disk, as nodes of a cluster do. What is lost here is the network: no process dies.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from mlflow import MlflowClient

from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.train import train
from ser_ray.training.recipe import TrainConfig
from tests.processes import answers_at, end, held_port, wait_for
from tests.shard_files import write_shard_files

RAY = str(Path(sys.executable).with_name("ray"))
BRIDGE, HEAD = "serbridge", "10.77.0.1"
OPEN = os.environ | {"RAY_AUTH_MODE": "disabled"}  # the test itself joins without a token
EPOCHS = 30


def ip(*arguments: str) -> str:
    """Run iproute2's `ip`."""
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def may_make_networks() -> bool:
    made = shutil.which("ip") and shutil.which("unshare")
    return bool(made) and subprocess.run(["unshare", "--net", "true"]).returncode == 0


@dataclass
class Machine:
    """A network namespace with one cable to the bridge."""

    number: int

    @property
    def name(self) -> str:
        return f"serns{self.number}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number}"

    def build(self) -> None:
        ip("netns", "add", self.name)
        ip("link", "add", self.cable, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        ip("link", "set", self.cable, "master", BRIDGE, "up")
        ip("-n", self.name, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", self.name, "link", "set", device, "up")

    @property
    def cable(self) -> str:
        return f"sercable{self.number}"

    def start(self, port: int) -> subprocess.Popen[bytes]:
        command = [RAY, "start", f"--address={HEAD}:{port}", f"--node-ip-address={self.address}"]
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *command, "--num-cpus=1", "--block"],
            stdout=subprocess.DEVNULL,
            env=OPEN,
        )


@pytest.fixture
def port() -> Iterator[int]:
    """A port that is held at every address of this machine."""
    with held_port("") as port:
        yield port


@pytest.fixture
def machines(port: int) -> Iterator[list[Machine]]:
    """Three machines of one CPU beside a head without any."""
    if not may_make_networks():
        pytest.skip("needs the right to make network namespaces")
    temp = tempfile.mkdtemp(prefix="ray-")  # Ray's sockets need a short path
    machines, started = [Machine(number) for number in (2, 3, 4)], []
    try:
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("address", "add", f"{HEAD}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        head = [RAY, "start", "--head", f"--port={port}", f"--node-ip-address={HEAD}"]
        head += ["--num-cpus=0", "--include-dashboard=false", "--block", f"--temp-dir={temp}"]
        started.append(subprocess.Popen(head, stdout=subprocess.DEVNULL, env=OPEN))
        for machine in machines:
            machine.build()
        wait_for("the head", lambda: answers_at(f"{HEAD}:{port}"))
        ray.init(address=f"{HEAD}:{port}", log_to_driver=False)
        for machine in machines:  # one by one: a start takes all the CPUs
            started.append(machine.start(port))
            wait_for("its node", lambda: len(ray.nodes()) == len(started))
        yield machines
    finally:
        ray.shutdown()
        for process in reversed(started):
            end(process)
        for machine in machines:
            subprocess.run(["ip", "netns", "delete", machine.name])
        subprocess.run(["ip", "link", "delete", BRIDGE])
        shutil.rmtree(temp, ignore_errors=True)


def machines_that_train(machines: list[Machine]) -> list[Machine]:
    workers = [
        process.pid
        for process in psutil.process_iter()
        if "ray::RayTrainWorker" in " ".join(process.cmdline())
    ]
    names = {ip("netns", "identify", str(pid)) for pid in workers}
    return [machine for machine in machines if machine.name in names]


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*")
def test_a_training_survives_a_cable_that_is_pulled(machines, tmp_path):
    trained: list[Machine] = []

    def pull_a_cable(row: dict[str, float]) -> None:
        if row["epoch"] == 2:
            trained.extend(machines_that_train(machines))
            ip("link", "set", trained[-1].cable, "down")

    config = TrainConfig(
        protocol="speaker-3", epochs=EPOCHS, batch_size=6, crop_frames=16, weights="none"
    )
    run = RunConfig(
        workers="2",
        device="cpu",
        storage=str(tmp_path / "runs"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
    )
    result = train(write_shard_files(tmp_path / "shards"), config, run, on_epoch=pull_a_cable)
    assert len(trained) == 2, "the workers were on two machines"
    assert [row["epoch"] for row in result.history] == list(range(1, EPOCHS + 1))
    assert {row["speed/workers"] for row in result.history} == {2.0}
    metrics = MlflowClient(tracking_uri=run.tracking_uri).get_run(result.run_id).data.metrics
    seen = {name.split("/")[1] for name in metrics if name.startswith("system/")}
    assert seen == {machine.address for machine in machines}, "the third took the lost one's place"
