"""Injects random faults into a small cluster, checks the results, and measures the extra time.

`python jobs/bench.py faults --seed N --minutes M` starts an MLflow server and a cluster on this
machine: a head and two raylets of one CPU each. Every round runs one verb on the cluster and
injects one fault (`faults_inject.py`) at a random moment. If the driver ends with an error, the
same command is run again. A round is survived if

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

Faults of the network need root: each node then has a network namespace of its own. Faults of clocks
need a C compiler: `faults_clock.c` changes the system clock of the driver, or of the raylets and
their workers, while their monotonic clock and the times of files stay right. A fault that cannot be
injected on this machine is not drawn.
"""

import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import ray
import tyro
from mlflow import MlflowClient
from pyarrow import fs

from faults_cluster import (
    EPOCHS,
    MAX_SECONDS,
    Clock,
    Network,
    TestBed,
    end,
    s3_server,
    small_disk,
    wait_until,
    worker_processes,
)
from faults_inject import FAULTS, Run, Storage
from ser_ray.shards.read import open_shards
from ser_ray.storage.paths import filesystem_of

RELEASE_SECONDS = 60.0
"""Time in which the cluster must release the resources of a driver."""
MAX_COMMANDS = 4
"""Number of times that a command is run, at most, until it succeeds."""
GRACE = 5.0
"""Seconds in which a driver may still end without an error after a signal."""


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
    storage: Storage = "local"
    """Where the commands write: to a local folder, a local S3 server, or a small disk."""
    faults: tuple[str, ...] = ()
    """The faults to draw from, as in "kill driver". The default depends on `storage`: those of
    the S3 server, those of the small disk, or all others."""
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
    injected: bool = False
    """Whether the driver and the target of the fault were still running."""
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


@dataclass(frozen=True)
class Reference:
    """A command without a fault."""

    result: Any
    seconds: float


def storage_of(bench: Bench, folder: Path, host: str) -> AbstractContextManager[str]:
    """Return a context that provides the storage. It yields `TestBed.bucket`."""
    match bench.storage:
        case "s3":
            return s3_server(folder, host)
        case "small-disk":
            return small_disk(folder)
        case "local":
            return nullcontext("")


def run_without_fault(bed: TestBed, work: str, references: dict[str, Reference]) -> Reference:
    """Run a verb, and those that it needs, without a fault. Return what was run before again."""
    if work in references:
        return references[work]
    if work != "prepare":
        run_without_fault(bed, "prepare", references)
    if work == "predict":
        run_without_fault(bed, "train", references)
    target, began = bed.folder / "without-fault" / work, time.monotonic()
    driver, errors = bed.start_driver(work, target, 0)
    if status := driver.wait(MAX_SECONDS):
        sys.exit(f"{work} fails without a fault, with status {status}:\n{errors.read_text()}")
    seconds = time.monotonic() - began
    bed.fetch(target)
    references[work] = Reference(result(work, target), seconds)
    if work == "prepare":
        filesystem, path = filesystem_of(bed.location(bed.folder / "shards"))
        fs.copy_files(str(target / "shards"), path, destination_filesystem=filesystem)
    print(f"{work} without a fault: {seconds:.0f} s", flush=True)
    return references[work]


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


def run_round(
    bed: TestBed, current: Round, rng: random.Random, references: dict[str, Reference]
) -> None:
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
    current.seconds = time.monotonic() - began - references[current.work].seconds
    if current.work == "train":
        lines = "".join(path.read_text() for path in target.glob("errors-?")).splitlines()
        shown = sum(line.strip().startswith("epoch ") for line in lines)
        current.redone = max(0, shown - EPOCHS)
    if not status:
        bed.fetch(target)
        check(bed, current, target, references[current.work].result)
    if not current.problems:
        shutil.rmtree(target)


def run_with_fault(
    bed: TestBed, current: Round, rng: random.Random, target: Path
) -> tuple[int, Path]:
    """Run the command and inject the fault. Return the exit status and the file of its messages."""
    driver, errors = bed.start_driver(current.work, target, 1)
    run = Run(bed, current.work, target, rng, driver)
    with suppress(psutil.TimeoutExpired):
        driver.wait(current.moment)
    fault = FAULTS[current.fault]
    if driver.poll() is None:
        try:
            current.injected = fault.inject(run)
        except TimeoutError as error:
            current.problems.append(str(error))
    injected_at = time.monotonic()
    status = wait_for_driver(current, driver)
    seconds_after = time.monotonic() - injected_at
    if current.injected and fault.is_ending and not status and seconds_after > GRACE:
        current.problems.append(
            f"the driver ran on for {seconds_after:.0f} s: {errors.read_text()[-500:]}"
        )
    if run.second is not None and wait_for_driver(current, run.second[0]) not in (0, 2):
        current.problems.append(f"the second driver: {run.second[1].read_text()[-500:]}")
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


def check(bed: TestBed, current: Round, target: Path, expected: Any) -> None:
    """Record everything that differs from a command without a fault, whose result is `expected`."""
    if result(current.work, target) != expected:
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
    rounds = [Round(**json.loads(line)) for line in log.read_text().splitlines()]
    rows: dict[str, list[Round]] = defaultdict(list)
    for entry in rounds:
        if entry.injected:
            rows[entry.fault].append(entry)
    lines = ["| fault | injected | survived | commands | extra seconds, median and maximum | "
             "epochs trained again |",
             "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
    for name in FAULTS:
        if entries := rows[name]:
            seconds = sorted(max(0.0, entry.seconds) for entry in entries)
            lines.append(
                f"| {FAULTS[name].text} | {len(entries)} | "
                f"{sum(not entry.problems for entry in entries)} | "
                f"{sum(entry.commands for entry in entries)} | {seconds[len(seconds) // 2]:.0f}, "
                f"{seconds[-1]:.0f} | {sum(entry.redone for entry in entries)} |"
            )
    late = sum(not entry.injected for entry in rounds)
    lines.append(f"\n{len(rounds)} rounds; in {late} of them, the command ended before its fault")
    return "\n".join(lines)


def choose_faults(bench: Bench) -> list[str]:
    """Return the names of the faults to draw from, and print why others cannot be injected."""
    wanted = bench.faults or [name for name in FAULTS if FAULTS[name].storage == bench.storage]
    if unknown := set(wanted) - set(FAULTS):
        sys.exit(f"--faults: {', '.join(unknown)}: choose from {', '.join(FAULTS)}")
    for name in wanted:
        if FAULTS[name].storage not in ("local", bench.storage):
            sys.exit(f"--faults: {name} needs --storage {FAULTS[name].storage}")
    obstacles = {name: FAULTS[name].obstacle() for name in wanted}
    for name, obstacle in obstacles.items():
        if obstacle:
            print(f"{name!r} is not injected: {obstacle}", flush=True)
    if all(obstacles.values()):
        sys.exit("no fault can be injected")
    return [name for name in wanted if not obstacles[name]]


def main(bench: Bench) -> None:
    """Run rounds, and print the table of all logged rounds."""
    bench.log.parent.mkdir(parents=True, exist_ok=True)
    names = choose_faults(bench)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    network = Network() if any(FAULTS[name].is_network for name in names) else None
    with storage_of(bench, folder, network.host if network else "127.0.0.1") as bucket:
        clock = Clock(folder) if any(FAULTS[name].clock for name in names) else None
        has_failed = run_rounds(bench, names, TestBed(folder, bucket, network, clock))
    if not has_failed:
        shutil.rmtree(folder)
    print(table(bench.log))
    if has_failed:
        sys.exit(f"the files of the failed rounds are in {folder}")


def run_rounds(bench: Bench, names: list[str], bed: TestBed) -> bool:
    """Run rounds until `minutes` or `rounds` is reached; return whether one was not survived."""
    ends = time.monotonic() + 60 * bench.minutes
    references: dict[str, Reference] = {}
    has_failed = False
    try:
        ray.init(address=bed.cluster.address, log_to_driver=False)
        for number in range(bench.rounds):
            rng = random.Random(f"{bench.seed}-{number}")
            work, name = rng.choice(bench.work), rng.choice(names)
            # Workers end before their driver.
            share = rng.uniform(0.2, 0.8 if FAULTS[name].needs_worker else 1.0)
            if time.monotonic() > ends:
                break
            reference = run_without_fault(bed, work, references)
            current = Round(bench.seed, number, work, name, round(share * reference.seconds, 1))
            with bed.jumping_clock(whose) if (whose := FAULTS[name].clock) else nullcontext():
                run_round(bed, current, rng, references)
            if not current.injected:  # the driver ended before the fault, perhaps in less time
                faster = reference.seconds + min(current.seconds, 0.0)
                references[work] = Reference(reference.result, faster)
            has_failed |= bool(current.problems)
            with bench.log.open("a") as log:
                log.write(json.dumps(asdict(current)) + "\n")
            print(json.dumps(asdict(current)), flush=True)
    finally:
        bed.close()
    return has_failed


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
