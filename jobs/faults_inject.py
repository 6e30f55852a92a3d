"""The faults that the benchmark `bench_faults.py` injects, and the functions that inject them."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import ray

from faults_cluster import MODE, TestBed, end, raylet, wait_until, worker_processes

PAUSE = 10.0
"""Seconds that a fault lasts: a stopped process, a missing MLflow server, an S3 server that refuses
or delays requests, a full disk, or a cut network. A preempted node is lost this long after its
notice."""
ISOLATION_SECONDS = 180.0
"""Time in which Ray must declare an unreachable node dead. When the network is back, the raylet of
this node must end within the same time."""
JUMPS = (-3600, -60, 60, 3600)
"""Seconds by which a clock jumps."""

Storage = Literal["local", "s3", "small-disk"]


@dataclass
class Run:
    """A running command into which a fault is injected."""

    bed: TestBed
    work: str
    target: Path
    rng: random.Random
    driver: psutil.Popen
    second: tuple[psutil.Popen, Path] | None = None
    """A second driver of the same command, and the file with its messages."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault."""

    text: str
    """Its text in the table of results."""
    inject: Callable[[Run], bool]
    """Injects the fault. Returns False if its target had already ended."""
    storage: Storage = "local"
    """The `--storage` with which the fault is drawn, unless `--faults` names the fault."""
    is_ending: bool = False
    """Whether the driver must end soon after it."""
    clock: str = ""
    """Whose clock jumps: `driver`, `nodes`, or empty if none does."""
    is_network: bool = False
    """Whether the nodes must have network namespaces."""
    needs_worker: bool = False
    """Whether the function `inject` waits for a worker. Workers end before the driver."""

    def obstacle(self) -> str:
        """Return why this machine cannot inject the fault; empty if no reason is known.

        Whether this process may mount the small disk is not checked.
        """
        if self.clock and shutil.which("cc") is None:
            return "it needs a C compiler: install gcc"
        if self.is_network and not can_make_networks():
            return "it needs root, and the programs ip and unshare: install iproute2 and util-linux"
        return ""


def can_make_networks() -> bool:
    """Return whether this process may make network namespaces and connect them by veth pairs."""
    cable = ("left", "type", "veth", "peer", "name", "right")
    command = ["unshare", "--net", "ip", "link", "add", *cable]
    has_programs = all(map(shutil.which, ("unshare", "ip")))
    return has_programs and subprocess.run(command, capture_output=True).returncode == 0


def signal_driver(number: int, run: Run) -> bool:
    """Send a signal to the driver."""
    return send(run.driver, number)


def signal_worker(number: int, run: Run) -> bool:
    """Send a signal to a worker, as soon as there is one."""
    worker = choose_worker(run)
    return worker is not None and send(worker, number)


def stop_raylet(run: Run) -> bool:
    """Suspend a raylet for PAUSE seconds."""
    return send(psutil.Process(raylet(run.rng.choice(run.bed.nodes)).pid), signal.SIGSTOP)


def send(process: psutil.Process, number: int) -> bool:
    """Send a signal to a process; a stopped process continues after PAUSE seconds."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    if number == signal.SIGSTOP:
        time.sleep(PAUSE)
        with suppress(psutil.NoSuchProcess):
            process.resume()
    return True


def choose_worker(run: Run) -> psutil.Process | None:
    """Choose a worker as soon as there is one; return None if the driver ends before."""
    while run.driver.poll() is None:
        if found := worker_processes(run.bed):
            return run.rng.choice(found)
        time.sleep(0.02)
    return None


def kill_raylet(run: Run) -> bool:
    """Kill a raylet, and all other processes of its node."""
    run.bed.kill_node(run.rng.choice(run.bed.nodes))
    return True


def preempt_node(run: Run) -> bool:
    """Announce that a node will be preempted, and kill the node after PAUSE seconds."""
    node = run.rng.choice(run.bed.nodes)
    subprocess.run(
        ["ray", "drain-node", "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "spot", "--deadline-remaining-seconds", str(round(PAUSE)),
         "--address", run.bed.cluster.address],
        check=True, stdout=run.bed.log, stderr=run.bed.log,
    )  # fmt: skip
    time.sleep(PAUSE)
    run.bed.kill_node(node)
    return True


def cut_network(run: Run, *, until_dead: bool) -> bool:
    """Cut the network of a node on which a worker runs.

    The network is back after PAUSE seconds or, with `until_dead`, PAUSE seconds after Ray declared
    the node dead. In the second case, the raylet must then end by itself.

    Raises:
        TimeoutError: Ray does not notice the loss of the node, or the node does not end.
    """
    assert run.bed.network is not None
    worker = choose_worker(run)
    nodes = [node for node in run.bed.nodes if worker in descendants(raylet(node).pid)]
    if not nodes:  # the worker has ended
        return False
    node = nodes[0]
    with run.bed.network.cut(node.node_ip_address):
        if until_dead:
            wait_until(
                "Ray declares the node dead",
                lambda: node.node_id not in living_nodes(),
                ISOLATION_SECONDS,
            )
        time.sleep(PAUSE)
    if until_dead:
        wait_until(
            "the raylet ends",
            lambda: raylet(node).poll() is not None,
            ISOLATION_SECONDS,
        )
    return True


def descendants(pid: int) -> list[psutil.Process]:
    """Return the descendants of a process; none if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def living_nodes() -> set[str]:
    """Return the ids of the nodes that Ray considers alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def jump(run: Run) -> bool:
    """Let the clock of the driver or of the nodes jump by a minute or an hour."""
    assert run.bed.clock is not None
    run.bed.clock.set_offset(run.rng.choice(JUMPS))
    return True


def kill_server(run: Run) -> bool:
    """Kill the MLflow server, and start it again after PAUSE seconds."""
    assert run.bed.server is not None
    end(run.bed.server)
    time.sleep(PAUSE)
    run.bed.start_server()
    return True


def stop_server(run: Run) -> bool:
    """Suspend the MLflow server for PAUSE seconds."""
    assert run.bed.server is not None
    processes = [run.bed.server, *run.bed.server.children(recursive=True)]
    for process in processes:
        process.suspend()
    time.sleep(PAUSE)
    for process in processes:
        process.resume()
    return True


def set_s3_mode(mode: str, run: Run) -> bool:
    """Make the S3 server refuse or delay all requests for PAUSE seconds."""
    (run.bed.folder / MODE).write_text(mode)
    time.sleep(PAUSE)
    (run.bed.folder / MODE).write_text("")
    return True


def fill_disk(run: Run) -> bool:
    """Write a file until the disk is full, and delete it after PAUSE seconds."""
    filler, ends = run.bed.folder / "filler", time.monotonic() + PAUSE
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < ends:  # other processes may delete files meanwhile
            with suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            time.sleep(0.1)
    filler.unlink()
    return True


def start_second_driver(run: Run) -> bool:
    """Start the same command again while the first driver is running."""
    run.second = run.bed.start_driver(run.work, run.target, 100)
    return True


FAULTS = {
    "kill worker": Fault(
        "a worker is killed", partial(signal_worker, signal.SIGKILL), needs_worker=True
    ),
    "stop worker": Fault(
        f"a worker is stopped for {PAUSE:g} s",
        partial(signal_worker, signal.SIGSTOP),
        needs_worker=True,
    ),
    "kill raylet": Fault("a raylet is killed", kill_raylet),
    "stop raylet": Fault(f"a raylet is stopped for {PAUSE:g} s", stop_raylet),
    "preempt node": Fault("a node is preempted", preempt_node),
    "kill server": Fault("the MLflow server is killed", kill_server),
    "stop server": Fault(f"the MLflow server is stopped for {PAUSE:g} s", stop_server),
    "kill driver": Fault("the driver is killed", partial(signal_driver, signal.SIGKILL)),
    "stop driver": Fault(
        f"the driver is stopped for {PAUSE:g} s", partial(signal_driver, signal.SIGSTOP)
    ),
    "terminate driver": Fault(
        "SIGTERM to the driver", partial(signal_driver, signal.SIGTERM), is_ending=True
    ),
    "hang up driver": Fault(
        "SIGHUP to the driver", partial(signal_driver, signal.SIGHUP), is_ending=True
    ),
    "interrupt driver": Fault(
        "Ctrl-C to the driver", partial(signal_driver, signal.SIGINT), is_ending=True
    ),
    "two drivers": Fault("two drivers", start_second_driver),
    "refusing s3": Fault(
        f"the S3 server refuses all requests for {PAUSE:g} s",
        partial(set_s3_mode, "refusing"),
        "s3",
    ),
    "slow s3": Fault(
        f"the S3 server delays all answers for {PAUSE:g} s", partial(set_s3_mode, "slow"), "s3"
    ),
    "full disk": Fault(f"the disk is full for {PAUSE:g} s", fill_disk, "small-disk"),
    "cut network": Fault(
        f"the network of a node is cut for {PAUSE:g} s",
        partial(cut_network, until_dead=False),
        is_network=True,
        needs_worker=True,
    ),
    "isolate node": Fault(
        "the network of a node is cut until Ray declares the node dead",
        partial(cut_network, until_dead=True),
        is_network=True,
        needs_worker=True,
    ),
    "driver clock": Fault("the driver's clock jumps by a minute or an hour", jump, clock="driver"),
    "node clock": Fault("the nodes' clock jumps by a minute or an hour", jump, clock="nodes"),
}
