"""Injects random faults into a small cluster, checks the results, and measures the extra time.

`python jobs/bench.py faults --seed N --minutes M` starts an MLflow server and a cluster on this
machine: a head and two raylets of one CPU each. Every round runs one verb on the cluster and
injects one fault at a random moment. If the driver ends with an error, the same command is run
again. A round is survived if

- the result equals the result without a fault (shards and weights byte for byte);
- every file has one outcome, and MLflow has one FINISHED run that has every epoch once;
- no process, actor, placement group, lock or temporary file is left;
- no command hangs.

Each round appends one line of JSON to `--log`. The table at the end summarises all lines of this
file, so several short calls add up. The seconds are meaningful only on a machine without other
work.

With `--storage s3`, shards, runs and predictions are in a bucket of a local S3 server. By default,
the faults are then that this server refuses all requests or answers them late. With `--storage
small-disk`, they are on a disk in memory, which only root can mount, and the fault is a full disk.
Faults of the network between nodes and of clocks are not injected.
"""

import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import psutil
import pyarrow.parquet as pq
import ray
import requests
import tyro
from mlflow import MlflowClient
from pyarrow import fs
from ray.cluster_utils import Cluster

from ser_ray.corpus.manifest import SYNTHETIC_MARKER
from ser_ray.corpus.synthetic import make_synthetic_corpus
from ser_ray.shards.read import open_shards
from ser_ray.storage.paths import filesystem_of

NODES = 2
SPEAKERS = 6
EPOCHS = 4
PAUSE = 10.0
"""Seconds that a fault lasts: a stopped process, a missing MLflow server, an S3 server that refuses
or delays requests, or a full disk. A preempted node is lost this long after its notice."""
DELAY = 1.0
"""Seconds that the S3 server adds to each answer while it is slow."""
DISK = "2g"
"""Size of the small disk."""
MAX_SECONDS = 600.0
"""A driver that runs longer than this is killed, and counts as hanging."""
RELEASE_SECONDS = 60.0
"""Time in which the cluster must release the resources of a driver."""
MAX_COMMANDS = 4
"""Number of times that a command is run, at most, until it succeeds."""
RECIPE = (
    *("--protocol", "speaker-3", "--weights", "none", "--crop-frames", "32", "--no-audio"),
    *("--batch-size", "4", "--validation-speakers", "1"),
)
GRACE = 5.0
"""Seconds in which a driver may still end without an error after a signal."""
MODE = "s3-mode"
"""Name of the file with the mode of the S3 server (`s3_server`)."""
ENDING_SIGNALS = ("terminate driver", "hang up driver", "interrupt driver")
DRIVER = ("kill driver", "stop driver", *ENDING_SIGNALS)
FAULTS = (
    *("kill worker", "stop worker", "kill raylet", "stop raylet", "preempt node"),
    *("kill server", "stop server", *DRIVER, "two drivers"),
)
STORAGE_FAULTS = {"local": (), "s3": ("refusing s3", "slow s3"), "small-disk": ("full disk",)}
"""Further faults of each kind of storage."""
IDLE_TITLES = ("ray::IDLE", "ray::IDLE_SpillWorker", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Titles of Ray processes that do no work for a driver."""
SIGNALS = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "terminate": signal.SIGTERM,
    "hang up": signal.SIGHUP, "interrupt": signal.SIGINT,
}  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    seed: int = 0
    """Seed from which verbs, faults and moments are drawn."""
    minutes: float = 10.0
    """After this many minutes, no further round begins."""
    log: Path = Path("ser-ray-out/faults.jsonl")
    """File to which each round appends a line."""
    work: tuple[str, ...] = ("prepare", "train")
    """The verbs to draw from: prepare, train, predict, crossval, tune."""
    storage: Literal["local", "s3", "small-disk"] = "local"
    """Where the commands write: to a local folder, a local S3 server, or a small disk."""
    faults: tuple[str, ...] = ()
    """The faults to draw from. The default depends on `storage`: those of the S3 server, those of
    the small disk, or all others."""
    rounds: int = 1000
    """Largest number of rounds."""


@dataclass
class Round:
    """One round, as a line of the log."""

    seed: int
    number: int
    work: str
    fault: str
    moment: float
    """Seconds from the start of the driver to the fault."""
    thrown: bool = False
    """Whether the fault was injected."""
    commands: int = 0
    """Number of times that the command was run."""
    statuses: list[int] = field(default_factory=list)
    """Exit status of each driver."""
    seconds: float = 0.0
    """Seconds of all commands, minus the seconds of a command without a fault."""
    redone: int = 0
    """Number of epochs that `train` trained again after the fault; 0 for other verbs."""
    problems: list[str] = field(default_factory=list)
    """Descriptions of the failed checks; empty if the round was survived."""


class TestBed:
    """The cluster, the MLflow server, the corpus, and the results without a fault."""

    def __init__(self, folder: Path, bucket: str) -> None:
        self.folder, self.log = folder, (folder / "output.log").open("ab")
        self.bucket = bucket
        """Format string that makes a URI of a name in the bucket; empty if there is no bucket."""
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 << 20},
        )
        self.nodes: list[Any] = []
        self.replace_lost_nodes()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.server: psutil.Popen | None = None
        self.start_server()
        self.corpus = small_corpus(folder)
        self.results: dict[str, Any] = {}
        self.durations: dict[str, float] = {}

    def replace_lost_nodes(self) -> None:
        """Start nodes in place of lost ones."""
        self.nodes = [node for node in self.nodes if raylet(node).is_running()]
        while len(self.nodes) < NODES:
            self.nodes.append(self.cluster.add_node(num_cpus=1, object_store_memory=100 << 20))
        self.cluster.wait_for_nodes()

    def start_server(self) -> None:
        """Start the MLflow server if it does not run, and wait until it answers."""
        if self.server is None or not self.server.is_running():
            self.server = psutil.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
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
                env=os.environ | {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"},
            )  # fmt: skip
        return driver, errors

    def run_without_fault(self, work: str) -> None:
        """Run a verb without a fault, once, and keep its result and duration."""
        if work in self.results:
            return
        if work != "prepare":
            self.run_without_fault("prepare")
        if work == "predict":
            self.run_without_fault("train")
        target, began = self.folder / "without-fault" / work, time.monotonic()
        driver, errors = self.start_driver(work, target, 0)
        if status := driver.wait(MAX_SECONDS):
            sys.exit(f"{work} fails without a fault, with status {status}:\n{errors.read_text()}")
        self.durations[work] = time.monotonic() - began
        self.fetch(target)
        self.results[work] = result(work, target)
        if work == "prepare":
            filesystem, path = filesystem_of(self.location(self.folder / "shards"))
            fs.copy_files(str(target / "shards"), path, destination_filesystem=filesystem)
        print(f"{work} without a fault: {self.durations[work]:.0f} s", flush=True)

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


def result(work: str, target: Path) -> Any:
    """Return the results of a verb that must be the same with and without a fault."""
    if work == "prepare":
        folder = target / "shards"
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in (*folder.glob("*/shard-*"), folder / "card.json")
        }
    if work == "predict":
        return pq.read_table(target / "answers.parquet").sort_by("path").to_pylist()
    if work == "train":
        return (target / "runs" / "run" / "selected" / "model.safetensors").read_bytes()
    answers = sorted(target.glob("output-*"), key=lambda path: path.stat().st_mtime)
    return keep_scores(json.loads(answers[-1].read_text()))


def keep_scores(value: Any) -> Any:
    """Return only the scores in the JSON of a search or cross-validation."""
    if isinstance(value, dict):
        kept = {name: keep_scores(item) for name, item in value.items() if "second" not in name}
        return {name: item for name, item in kept.items() if item not in (None, {}, [])}
    if isinstance(value, list):
        return [item for item in map(keep_scores, value) if item not in (None, {}, [])]
    return value if isinstance(value, float) else None


def raylet(node: Any) -> psutil.Process:
    """Return the process of a node's raylet."""
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def worker_processes(bed: TestBed) -> list[psutil.Process]:
    """Return the processes on the nodes that do work for a driver."""
    found = []
    for node in bed.nodes:
        with suppress(psutil.NoSuchProcess):
            for process in raylet(node).children(recursive=True):
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
def stopped(processes: list[psutil.Process]) -> Iterator[None]:
    """Suspend processes while the block runs."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


def inject(bed: TestBed, current: Round, driver: psutil.Popen, rng: random.Random) -> bool:
    """Inject the fault of the round. Return False if its target had already ended."""
    how, _, whom = current.fault.rpartition(" ")
    if current.fault in AROUND:
        AROUND[current.fault](bed, rng)
        return True
    target: psutil.Process | None = driver
    if whom == "worker":
        target = choose_worker(bed, driver, rng)
    elif whom == "raylet":
        target = raylet(rng.choice(bed.nodes))
    if target is None or driver.poll() is not None:
        return False
    with suppress(psutil.NoSuchProcess):
        if how == "stop":
            with stopped([target]):
                time.sleep(PAUSE)
        else:
            target.send_signal(SIGNALS[how])
        return True
    return False


def choose_worker(bed: TestBed, driver: psutil.Popen, rng: random.Random) -> psutil.Process | None:
    """Choose a worker as soon as there is one; return None if the driver ends before."""
    while driver.poll() is None:
        if found := worker_processes(bed):
            return rng.choice(found)
        time.sleep(0.02)
    return None


def kill_raylet(bed: TestBed, rng: random.Random) -> None:
    """Kill a node."""
    node = rng.choice(bed.nodes)
    bed.nodes.remove(node)
    bed.cluster.remove_node(node, allow_graceful=False)


def preempt_node(bed: TestBed, rng: random.Random) -> None:
    """Announce that a node will be preempted, and kill the node after PAUSE seconds."""
    node = rng.choice(bed.nodes)
    bed.nodes.remove(node)
    subprocess.run(
        ["ray", "drain-node", "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
         "--reason-message", "spot", "--deadline-remaining-seconds", str(round(PAUSE)),
         "--address", bed.cluster.address],
        check=True, stdout=bed.log, stderr=bed.log,
    )  # fmt: skip
    time.sleep(PAUSE)
    bed.cluster.remove_node(node, allow_graceful=False)


def kill_server(bed: TestBed, rng: random.Random) -> None:
    """Kill the MLflow server, and start it again after a pause."""
    assert bed.server is not None
    end(bed.server)
    time.sleep(PAUSE)
    bed.start_server()


def stop_server(bed: TestBed, rng: random.Random) -> None:
    """Suspend the MLflow server for PAUSE seconds."""
    assert bed.server is not None
    with stopped([bed.server, *bed.server.children(recursive=True)]):
        time.sleep(PAUSE)


def set_s3_mode(bed: TestBed, mode: str) -> None:
    """Make the S3 server refuse or delay all requests for PAUSE seconds."""
    (bed.folder / MODE).write_text(mode)
    time.sleep(PAUSE)
    (bed.folder / MODE).write_text("")


def fill_disk(bed: TestBed, rng: random.Random) -> None:
    """Write a file until the disk is full, and delete it after a pause."""
    filler, ends = bed.folder / "filler", time.monotonic() + PAUSE
    with filler.open("wb", buffering=0) as file:
        while time.monotonic() < ends:  # other processes may delete files meanwhile
            with suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
            time.sleep(0.1)
    filler.unlink()


AROUND: dict[str, Callable[[TestBed, random.Random], None]] = {
    "kill raylet": kill_raylet,
    "preempt node": preempt_node,
    "kill server": kill_server,
    "stop server": stop_server,
    "refusing s3": lambda bed, rng: set_s3_mode(bed, "refusing"),
    "slow s3": lambda bed, rng: set_s3_mode(bed, "slow"),
    "full disk": fill_disk,
}
"""Faults that are more than one signal to one process."""


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
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
    server = make_server("127.0.0.1", 0, answer, threaded=True)
    Thread(target=server.serve_forever, daemon=True).start()
    query = f"endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"
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


def storage_of(bench: Bench, folder: Path) -> AbstractContextManager[str]:
    """Return a context that provides the storage. It yields `TestBed.bucket`."""
    match bench.storage:
        case "s3":
            return s3_server(folder)
        case "small-disk":
            return small_disk(folder)
        case "local":
            return nullcontext("")


def run_round(bed: TestBed, current: Round, rng: random.Random) -> None:
    """Run one round, and record its failed checks."""
    target, began = bed.folder / f"round-{current.seed}-{current.number}", time.monotonic()
    current.commands = 1
    status, errors = run_with_fault(bed, current, rng, target)
    bed.replace_lost_nodes()
    bed.start_server()
    while status and current.commands < MAX_COMMANDS:
        current.commands += 1
        driver, errors = bed.start_driver(current.work, target, current.commands)
        status = wait_for_driver(current, driver)
    if status:
        current.problems.append(f"status {status}: {errors.read_text()[-500:]}")
    current.seconds = time.monotonic() - began - bed.durations[current.work]
    if current.work == "train":
        lines = "".join(path.read_text() for path in target.glob("errors-?")).splitlines()
        shown = sum(line.strip().startswith("epoch ") for line in lines)
        current.redone = max(0, shown - EPOCHS)
    if not status:
        bed.fetch(target)
        check(bed, current, target)
    if not current.problems:
        shutil.rmtree(target)


def run_with_fault(
    bed: TestBed, current: Round, rng: random.Random, target: Path
) -> tuple[int, Path]:
    """Run the command and inject the fault. Return the exit status and the file of its messages."""
    driver, errors = bed.start_driver(current.work, target, 1)
    with suppress(psutil.TimeoutExpired):
        driver.wait(current.moment)
    other = None
    if driver.poll() is None and current.fault == "two drivers":
        other, current.thrown = bed.start_driver(current.work, target, 100), True
    elif driver.poll() is None:
        current.thrown = inject(bed, current, driver, rng)
    injected_at = time.monotonic()
    status = wait_for_driver(current, driver)
    seconds_after = time.monotonic() - injected_at
    if current.thrown and current.fault in ENDING_SIGNALS and not status and seconds_after > GRACE:
        current.problems.append(
            f"the driver ran on for {seconds_after:.0f} s: {errors.read_text()[-500:]}"
        )
    if other is not None and wait_for_driver(current, other[0]) not in (0, 2):
        current.problems.append(f"the second driver: {other[1].read_text()[-500:]}")
    return status, errors


def wait_for_driver(current: Round, driver: psutil.Popen) -> int:
    """Wait until a driver ends, and return its exit status. Kill a driver that hangs."""
    try:
        current.statuses.append(int(driver.wait(MAX_SECONDS)))
        return current.statuses[-1]
    except psutil.TimeoutExpired:
        current.problems.append(f"hangs: not ended after {MAX_SECONDS:g} s")
        end(driver)
        return 1


def check(bed: TestBed, current: Round, target: Path) -> None:
    """Record everything that differs from a command without a fault."""
    if result(current.work, target) != bed.results[current.work]:
        current.problems.append("the result differs from the result without a fault")
    if current.work == "prepare":
        outcomes = open_shards(str(target / "shards")).outcomes()["path"].to_pylist()
        listed = sorted(str(path) for path in bed.corpus.glob("*.wav"))
        if sorted(outcomes) != listed:
            current.problems.append(f"{len(outcomes)} outcomes of {len(listed)} files")
    elif current.work != "predict":
        check_mlflow(bed, current, target.name)
    left = written_files(target) - written_files(bed.folder / "without-fault" / current.work)
    if left:
        current.problems.append(f"files left: {', '.join(sorted(left)[:5])}")
    try:
        wait_until("the cluster is free", lambda: not held_resources(bed), RELEASE_SECONDS)
    except TimeoutError:
        current.problems.append(f"left on the cluster: {held_resources(bed)}")


def written_files(target: Path) -> set[str]:
    """Return the names of the files that a verb wrote, with `DATE` in place of dates.

    The names of Ray Tune's snapshots contain the date of the start. The files of this benchmark are
    left out, and so are `error.txt` and `error.pkl`, in which Ray Tune says why an attempt failed.
    """
    return {
        re.sub(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "DATE", str(path.relative_to(target)))
        for path in target.rglob("*")
        if path.is_file() and not path.name.startswith(("output-", "errors-", "error."))
    }


def check_mlflow(bed: TestBed, current: Round, experiment: str) -> None:
    """Record what is wrong with the MLflow runs of a round."""
    client = MlflowClient(bed.uri)
    found = client.get_experiment_by_name(experiment)
    runs = [] if found is None else client.search_runs([found.experiment_id])
    tops = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    if len(tops) != 1:
        current.problems.append(f"{len(tops)} MLflow runs instead of one")
    states = {run.info.status for run in runs}
    if states != {"FINISHED"}:
        current.problems.append(f"MLflow runs are {', '.join(sorted(states))}")
    if current.work == "train":
        for run in tops:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, "val/ua")]
            if sorted(steps) != list(range(1, EPOCHS + 1)):
                current.problems.append(f"val/ua has the epochs {steps}")


def held_resources(bed: TestBed) -> str:
    """Describe the resources that the cluster still holds; empty if there are none."""
    free, total = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
    groups = [
        name
        for name, group in ray.util.placement_group_table().items()
        if group["state"] != "REMOVED"
    ]
    working = [process.name() for process in worker_processes(bed)]
    parts = [f"{total - free:g} CPUs"] if free < total else []
    parts += [f"{len(groups)} placement groups"] if groups else []
    return ", ".join([*parts, *working])


def table(log: Path) -> str:
    """Return a table of all logged rounds, with one line per fault."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["thrown"]:
            rows[entry["fault"]].append(entry)
    lines = ["| fault | injected | survived | commands | extra seconds, median and maximum | "
             "epochs trained again |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for fault, entries in sorted(rows.items()):
        seconds = sorted(max(0.0, entry["seconds"]) for entry in entries)
        lines.append(
            f"| {fault} | {len(entries)} | {sum(not entry['problems'] for entry in entries)} | "
            f"{sum(entry['commands'] for entry in entries)} | {seconds[len(seconds) // 2]:.0f}, "
            f"{seconds[-1]:.0f} | {sum(entry['redone'] for entry in entries)} |"
        )
    return "\n".join(lines)


def main(bench: Bench) -> None:
    """Run rounds, and print the table of all logged rounds."""
    bench.log.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    faults = bench.faults or STORAGE_FAULTS[bench.storage] or FAULTS
    with storage_of(bench, folder) as bucket:
        has_failed = run_rounds(bench, faults, TestBed(folder, bucket))
    if not has_failed:
        shutil.rmtree(folder)
    print(table(bench.log))
    if has_failed:
        sys.exit(f"the files of the failed rounds are in {folder}")


def run_rounds(bench: Bench, faults: Sequence[str], bed: TestBed) -> bool:
    """Run rounds until `minutes` or `rounds` is reached; return whether one was not survived."""
    ends = time.monotonic() + 60 * bench.minutes
    has_failed = False
    try:
        ray.init(address=bed.cluster.address, log_to_driver=False)
        for number in range(bench.rounds):
            rng = random.Random(f"{bench.seed}-{number}")
            work, fault = rng.choice(bench.work), rng.choice(faults)
            # Workers end before their driver.
            share = rng.uniform(0.2, 0.8 if "worker" in fault else 1.0)
            if time.monotonic() > ends:
                break
            bed.run_without_fault(work)
            moment = round(share * bed.durations[work], 1)
            current = Round(bench.seed, number, work, fault, moment)
            run_round(bed, current, rng)
            if not current.thrown:  # the driver ended before the fault, perhaps in less time
                bed.durations[work] += min(current.seconds, 0.0)
            has_failed |= bool(current.problems)
            with bench.log.open("a") as log:
                log.write(json.dumps(asdict(current)) + "\n")
            print(json.dumps(asdict(current)), flush=True)
    finally:
        bed.close()
    return has_failed


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
