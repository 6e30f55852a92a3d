"""The cluster of the faults benchmark (`bench_faults.py`), with its network, clocks and storage."""

import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import count
from pathlib import Path
from threading import Thread
from typing import Any
from unittest import mock

import psutil
import ray
import requests
from pyarrow import fs
from ray.cluster_utils import Cluster

from ser_ray.corpus.manifest import SYNTHETIC_MARKER
from ser_ray.corpus.synthetic import make_synthetic_corpus
from ser_ray.storage.paths import filesystem_of

NODES = 2
OBJECT_STORE = 100 << 20
"""Bytes of each node's object store."""
SPEAKERS = 6
EPOCHS = 4
DELAY = 1.0
"""Seconds that the S3 server adds to each answer while it is slow."""
DISK = "2g"
"""Size of the small disk."""
MAX_SECONDS = 600.0
"""A driver that runs longer than this is killed, and counts as hanging."""
RECIPE = (
    *("--protocol", "speaker-3", "--weights", "none", "--crop-frames", "32", "--no-audio"),
    *("--batch-size", "4", "--validation-speakers", "1"),
)
MODE = "s3-mode"
"""Name of the file with the mode of the S3 server (`s3_server`)."""
CLOCK = Path(__file__).with_name("faults_clock.c")
IDLE_TITLES = ("ray::IDLE", "ray::IDLE_SpillWorker", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of Ray processes that do no work for a driver."""


class Network:
    """Network namespaces: one for this process and its children, and one for each node.

    A cable connects each node to a bridge. The kernel deletes the namespaces and cables as soon as
    their processes have ended.
    """

    host = "10.77.0.1"
    """Address of this process."""

    def __init__(self) -> None:
        self._home, self._numbers = new_namespace(), count(2)
        ip("link", "add", "bridge", "type", "bridge")
        ip("address", "add", f"{self.host}/24", "dev", "bridge")
        ip("link", "set", "bridge", "up")

    @contextmanager
    def new_machine(self) -> Iterator[str]:
        """Start the processes of the block in a new namespace, and yield its address."""
        address, cable = f"10.77.0.{(number := next(self._numbers))}", f"cable{number}"
        namespace = new_namespace()
        enter_namespace(self._home)
        inside = ("netns", f"/proc/{os.getpid()}/fd/{namespace}")
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", *inside)
        ip("link", "set", cable, "master", "bridge", "up")
        enter_namespace(namespace)
        os.close(namespace)
        try:
            ip("address", "add", f"{address}/24", "dev", "eth0")
            ip("link", "set", "eth0", "up")
            yield address
        finally:
            enter_namespace(self._home)

    @contextmanager
    def cut(self, address: str) -> Iterator[None]:
        """Unplug the cable of a node while the block runs."""
        cable = f"cable{address.rpartition('.')[2]}"
        ip("link", "set", cable, "down")
        try:
            yield
        finally:
            ip("link", "set", cable, "up")


def ip(*arguments: str) -> None:
    """Run iproute2's `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def new_namespace() -> int:
    """Move this thread to a new network namespace, and return a file descriptor of it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x40000000):  # CLONE_NEWNET
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    ip("link", "set", "lo", "up")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def enter_namespace(descriptor: int) -> None:
    """Move this thread, and all processes that it starts from now on, to a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, 0):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


class Clock:
    """A system clock for some processes, which can jump (`faults_clock.c`)."""

    def __init__(self, folder: Path) -> None:
        library, self._offset = folder / "clock.so", folder / "clock-offset"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(CLOCK)], check=True)
        self.set_offset(0)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET": str(self._offset)}
        """Environment variables of the processes that have this clock."""

    def set_offset(self, seconds: int) -> None:
        """Set the number of seconds by which the clock is ahead."""
        # The processes map the file into memory: it must be overwritten, not replaced.
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(seconds.to_bytes(8, sys.byteorder, signed=True))


class TestBed:
    """The cluster, the MLflow server and the corpus.

    Args:
        bucket: format string that makes a URI of a name in the bucket; empty if there is no bucket.
        network: the network between the nodes; None if all nodes have this machine's address.
        clock: the clock that can jump; None if no clock jumps.
    """

    def __init__(
        self, folder: Path, bucket: str, network: Network | None, clock: Clock | None
    ) -> None:
        self.folder, self.log = folder, (folder / "output.log").open("ab")
        self.bucket, self.network, self.clock = bucket, network, clock
        self.environments: dict[str, dict[str, str]] = {"driver": {}, "nodes": {}}
        """Further environment variables of the drivers and nodes that will be started."""
        address = {"node_ip_address": network.host} if network else {}
        head = {"num_cpus": 0, "object_store_memory": OBJECT_STORE, **address}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: list[Any] = []
        self.replace_lost_nodes()
        self.host = network.host if network else "127.0.0.1"
        with socket.socket() as free:
            free.bind((self.host, 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://{self.host}:{self.port}"
        self.server: psutil.Popen | None = None
        self.start_server()
        self.corpus = small_corpus(folder)

    def replace_lost_nodes(self) -> None:
        """Start nodes in place of lost ones."""
        for node in [node for node in self.nodes if raylet(node).poll() is not None]:
            self.kill_node(node)
        while len(self.nodes) < NODES:
            machine = self.network.new_machine() if self.network else nullcontext(None)
            with machine as address, mock.patch.dict(os.environ, self.environments["nodes"]):
                self.nodes.append(
                    self.cluster.add_node(
                        num_cpus=1, object_store_memory=OBJECT_STORE, node_ip_address=address
                    )
                )
        self.cluster.wait_for_nodes()

    def kill_node(self, node: Any) -> None:
        """Kill all processes of a node, if there are any, and forget it."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    @contextmanager
    def jumping_clock(self, whose: str) -> Iterator[None]:
        """Give the driver or the nodes, while the block runs, the clock that can jump.

        Args:
            whose: `driver` or `nodes`.
        """
        assert self.clock is not None
        with mock.patch.dict(self.environments[whose], self.clock.environment):
            if whose == "nodes":
                self._restart_nodes()
            yield
        self.clock.set_offset(0)
        if whose == "nodes":
            self._restart_nodes()

    def _restart_nodes(self) -> None:
        for node in list(self.nodes):
            self.kill_node(node)
        self.replace_lost_nodes()

    def start_server(self) -> None:
        """Start the MLflow server if it does not run, and wait until it answers."""
        if self.server is None or not self.server.is_running():
            self.server = psutil.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", self.host,
                 "--port", str(self.port),
                 "--backend-store-uri", f"sqlite:///{self.folder}/server.db",
                 "--artifacts-destination", f"{self.folder}/artifacts"],
                stdout=self.log, stderr=self.log,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        wait_until("the MLflow server answers", self._server_answers, MAX_SECONDS)

    def _server_answers(self) -> bool:
        with suppress(requests.RequestException):
            url = f"{self.uri}/api/2.0/mlflow/experiments/search"
            return requests.post(url, json={"max_results": 1}, timeout=30).ok
        return False

    def command(self, work: str, target: Path) -> list[str]:
        """Return the command line of a verb that writes into a folder."""
        model = self.location(self.folder / "without-fault" / "train" / "runs" / "run" / "selected")
        run = ("--shards", self.location(self.folder / "shards"),
               "--storage", self.location(target / "runs"), "--name", "run",
               "--tracking-uri", self.uri, "--experiment", str(target.name), *RECIPE)  # fmt: skip
        flags = {
            "prepare": ("--corpus", str(self.corpus), "--shards", self.location(target / "shards")),
            "train": (*run, "--epochs", str(EPOCHS)),
            "crossval": (*run, "--epochs", "2"),
            "tune": (*run, "--epochs", "2", "--trials", "2", "--searcher", "random"),
            "predict": (str(self.corpus), "--model", model,
                        "--output", self.location(target / "answers.parquet")),
        }  # fmt: skip
        address = ("--address", self.cluster.address, "--json")
        return [sys.executable, "-m", "ser_ray", work, *flags[work], *address]

    def location(self, path: Path) -> str:
        """Return a path in the folder or, if there is a bucket, the URI for it in the bucket."""
        name = str(path.relative_to(self.folder))
        return self.bucket.format(name) if self.bucket else str(path)

    def fetch(self, target: Path) -> None:
        """Copy the files of a command from the bucket, if there is one, to their local folder."""
        if self.bucket:
            filesystem, path = filesystem_of(self.location(target))
            fs.copy_files(path, str(target), source_filesystem=filesystem)

    def start_driver(self, work: str, target: Path, number: int) -> tuple[psutil.Popen, Path]:
        """Start the driver of a command. Return the driver, and the file with its messages."""
        target.mkdir(parents=True, exist_ok=True)
        output, errors = target / f"output-{number}", target / f"errors-{number}"
        with output.open("wb") as out, errors.open("wb") as err:
            driver = psutil.Popen(
                self.command(work, target), stdout=out, stderr=err, start_new_session=True,
                preexec_fn=default_signals,
                env=os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
                | self.environments["driver"],
            )  # fmt: skip
        return driver, errors

    def close(self) -> None:
        """Stop the MLflow server and the cluster."""
        if self.server is not None:
            end(self.server)
        ray.shutdown()
        self.cluster.shutdown()
        self.log.close()


def default_signals() -> None:
    """Restore the default signal handlers, which a shell replaces in background programs."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def small_corpus(folder: Path) -> Path:
    """Make a synthetic corpus of the first speakers, with one wav file for each take."""
    make_synthetic_corpus(folder / "complete")
    target = folder / "corpus"
    target.mkdir()
    for path in sorted((folder / "complete").rglob("03-*.wav")):
        if int(path.stem[-2:]) <= SPEAKERS:
            shutil.copy(path, target)
    shutil.copy(folder / "complete" / SYNTHETIC_MARKER, target)
    return target


def raylet(node: Any) -> subprocess.Popen[bytes]:
    """Return the process of a node's raylet."""
    return node.all_processes["raylet"][0].process


def worker_processes(bed: TestBed) -> list[psutil.Process]:
    """Return the processes on the nodes that do work for a driver."""
    found = []
    for node in bed.nodes:
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(raylet(node).pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    title = "".join(process.cmdline()[:1])  # empty for a process that has ended
                    if title.startswith("ray::") and title not in IDLE_TITLES:
                        found.append(process)
    return sorted(found, key=lambda process: process.pid)


def end(process: psutil.Process) -> None:
    """Kill a process and all its descendants."""
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(30)


def wait_until(what: str, holds: Callable[[], Any], seconds: float) -> None:
    """Wait until a condition holds.

    Raises:
        TimeoutError: the condition does not hold within this time.
    """
    ends = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > ends:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)


@contextmanager
def s3_server(folder: Path, host: str) -> Iterator[str]:
    """Run an S3 server with one bucket, and yield the format string of its URIs.

    The file MODE in the folder tells the server how to answer: `refusing`, `slow`, or, if it is
    empty, as usual.
    """
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app, mode = DomainDispatcherApplication(create_backend_app), folder / MODE
    mode.write_text("")

    def answer(environment: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if mode.read_text() == "refusing":
            start_response("503 Slow Down", [("Content-Length", "0")])
            return [b""]
        time.sleep(DELAY if mode.read_text() == "slow" else 0)
        return app(environment, start_response)

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    server = make_server(host, 0, answer, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    query = f"endpoint_override={host}:{server.port}&scheme=http&region=us-east-1"
    uri = f"s3://faults/{{}}?{query}"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://?{query}&allow_bucket_creation=true")
    filesystem.create_dir("faults")
    try:
        yield uri
    finally:
        server.shutdown()


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a small disk over the folder."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "faults", str(folder)]
    subprocess.run(mount, check=True)
    try:
        yield ""
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
