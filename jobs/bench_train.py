"""Measures how fast training is, in comparison with a bare PyTorch loop and with Ray's examples.

`python jobs/bench.py train --shards DIR` measures these ways in one run, on the clips of one fold:

- ours: `train` with one worker in one process, with its validation, checkpoints and reports;
- bare: a PyTorch loop with the same arithmetic and nothing else;
- ours_on_ray: ours with `--address local`, as one worker of Ray Train;
- ray: the bare loop in a worker of Ray Train. ours_on_ray / ray shows the cost of this project, and
  ray / bare the cost of Ray's processes if the training uses all CPUs;
- ours_ddp, bare_ddp: ours and bare with several workers. The workers of bare_ddp are plain
  processes that use gloo or, with `--device gpu`, NCCL and one GPU each;
- ingest: ours with `--ingest stream`, which reads the training clips again in every epoch;
- stream: a loop as in Ray's examples, which calls `iter_torch_batches` on a dataset of Ray Data in
  every epoch.

Each way runs in a new Python process. Our ways (ours..., ingest) get huge pages of memory and rare
garbage collections, as `ser-ray` does (`ser_ray.cli.start`). To give huge pages to the other ways
too, put `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before the command.

Clips per second are those of the training steps after the first epoch, so the start and the warm-up
change only the seconds to the first step. `outside` is the share of these epochs that is spent
neither in training steps nor in validation. `processes` is the number of processes that the way
started, as far as they live for a tenth of a second. Our ways record their runs in one MLflow
database, which is made before the measurements. The first training of a project makes this database
itself, which takes as long as the first line says. A way that is named several times is measured
several times, and the ratios use its means. Workers on several nodes are not measured.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import tyro

from ser_ray.cli import start
from ser_ray.training.recipe import TrainConfig

NOT_OURS = ("bare", "ray", "bare_ddp", "stream")
"""The ways that do not train with `ser_ray` but with a loop of this file."""
RATIOS = (
    ("ours", "bare"),
    ("ours_on_ray", "ray"),
    ("ours", "ours_on_ray"),
    ("ours_ddp", "bare_ddp"),
    ("ours", "stream"),
    ("ingest", "ours"),
    ("ingest", "stream"),
)
"""Pairs of ways whose speeds are divided, the first by the second."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    shards: str
    """Shard set to train on."""
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(weights="none", epochs=3))
    """The recipe of all ways. The speed of the first epoch is left out."""
    device: Literal["cpu", "gpu"] = "cpu"
    """The device of every worker."""
    workers: int = 2
    """Number of workers of ours_ddp and bare_ddp."""
    store: str = ""
    """MLflow store of our ways; by default a new database."""
    ways: tuple[str, ...] = (
        "bare", "ours", "ray", "ours_on_ray", "bare_ddp", "ours_ddp", "ingest", "stream",
    )  # fmt: skip
    """The ways to compare, in this order."""


@dataclass(frozen=True)
class Timing:
    """A measurement of one way."""

    clips_per_second: float
    """Training clips per second in the steps of the epochs after the first."""
    outside: float
    """Share of these epochs that is spent neither in steps nor in validation; NaN if unknown."""
    first_step: float
    """Seconds from the start of the process to the end of the first step."""


def ours(
    bench: Bench,
    started: float,
    workers: int = 1,
    ingest: Literal["resident", "stream"] = "resident",
    address: str = "",
) -> Timing:
    """Train with `ser_ray`, as users do."""
    from ser_ray.distributed.run_config import RunConfig
    from ser_ray.distributed.train import train

    ends = [time.time()]
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(
            workers=str(workers),
            device=bench.device,
            ingest=ingest,
            storage=folder,
            tracking_uri=bench.store,
        )
        result = train(
            bench.shards, bench.recipe, run, address=address,
            on_epoch=lambda row: ends.append(time.time()),
        )  # fmt: skip
    rows = result.history
    num_steps, num_clips = epoch_size(bench)
    step_seconds = [num_clips / row["speed/clips_per_second"] for row in rows]
    wall = ends[-1] - ends[1]
    outside = 1 - sum(row["speed/epoch_seconds"] for row in rows[1:]) / wall
    first_epoch_start = ends[1] - rows[0]["speed/epoch_seconds"]
    first_step = first_epoch_start + step_seconds[0] / num_steps - started
    return Timing(num_clips * (len(rows) - 1) / sum(step_seconds[1:]), outside, first_step)


def epoch_size(bench: Bench) -> tuple[int, int]:
    """Return the number of steps of an epoch, and the number of clips in all these steps."""
    from ser_ray.shards.read import open_shards
    from ser_ray.training.data import steps_per_epoch
    from ser_ray.training.parts import select_rows

    rows = len(select_rows(open_shards(bench.shards).clips(), bench.recipe).train)
    steps = steps_per_epoch(rows, bench.recipe.batch_size)
    return steps, steps * bench.recipe.batch_size


def bare(bench: Bench, started: float, workers: int = 1) -> Timing:
    """Train with the bare loop in this process or, with several workers, in new processes."""
    import torch

    torch.set_num_threads(num_threads(workers))
    if workers == 1:
        return _run_bare(bench, started, 0, 1)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (bench, started, workers, folder)
        torch.multiprocessing.spawn(_bare_worker, arguments, nprocs=workers)
        return Timing(**json.loads(Path(folder, "timing.json").read_text()))


def num_threads(workers: int = 1) -> int:
    """Return the number of threads of a worker, as `train` chooses it on one machine."""
    from ser_ray.cluster.resources import openmp_threads

    return openmp_threads() or max((os.cpu_count() or 1) // workers, 1)


def _bare_worker(rank: int, bench: Bench, started: float, workers: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(num_threads(workers))
    if bench.device == "gpu":
        torch.cuda.set_device(rank)
    backend = "nccl" if bench.device == "gpu" else "gloo"
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=workers
    )
    timing = _run_bare(bench, started, rank, workers)
    if rank == 0:
        Path(folder, "timing.json").write_text(json.dumps(asdict(timing)))
    dist.destroy_process_group()


def _run_bare(bench: Bench, started: float, rank: int, workers: int) -> Timing:
    import torch

    trainer = _BareTrainer(bench, rank, workers)
    marks = []
    first = 0.0
    for _ in range(bench.recipe.epochs):
        order = torch.randperm(len(trainer.clips)).to(trainer.device)
        marks.append(trainer.now())
        for step in range(trainer.steps):
            rows = order[step * bench.recipe.batch_size :][: bench.recipe.batch_size]
            trainer.train_step(*trainer.augment(trainer.clips, rows))
            first = first or trainer.now() - started
    marks.append(trainer.now())
    clips = trainer.steps * bench.recipe.batch_size * (bench.recipe.epochs - 1)
    return Timing(clips / (marks[-1] - marks[1]), 0.0, first)


class _BareTrainer:
    """A network with its optimiser and schedule, for training steps outside the package's loop."""

    def __init__(self, bench: Bench, rank: int, workers: int) -> None:
        import torch
        from torch.optim.lr_scheduler import OneCycleLR

        from ser_ray.shards.read import open_shards
        from ser_ray.training.augment import Augment
        from ser_ray.training.data import load_fold, steps_per_epoch
        from ser_ray.training.model import ResNet18, supports_bfloat16, to_channels_last

        device = torch.device("cpu") if bench.device == "cpu" else torch.device("cuda", rank)
        config = bench.recipe
        opened = open_shards(bench.shards)
        data = load_fold(opened, config, device)
        self.config, self.rank, self.workers, self.clips = config, rank, workers, data.train
        self.device = device
        self.normalisation = data.normalisation
        self.steps = steps_per_epoch(len(data.train), config.batch_size)
        features = opened.card.features
        num_bins = len(data.normalisation.std)
        self.autocast = supports_bfloat16(device, num_bins, config.crop_frames)
        self.augment = Augment(config, features, len(data.labels), data.normalisation, device)
        network = to_channels_last(ResNet18(len(data.labels)), device)
        network.train()
        self.network: torch.nn.Module = network
        if workers > 1:
            self.network = torch.nn.parallel.DistributedDataParallel(
                network, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.optimiser = torch.optim.AdamW(
            network.parameters(), weight_decay=config.weight_decay, fused=True
        )
        total = config.epochs * self.steps
        self.schedule = OneCycleLR(self.optimiser, config.lr_max, total_steps=total + 1)

    def now(self) -> float:
        """Wait until the device has finished all steps so far, and return the time."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.time()

    def train_step(self, batch: Any, targets: Any) -> None:
        """Train the network on one batch; each worker takes its share of the rows."""
        import torch
        import torch.nn.functional as F

        share = slice(self.rank, None, self.workers)
        batch = batch[share].contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(
                self.network(batch), targets[share], label_smoothing=self.config.label_smoothing
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        self.schedule.step()


def stream(bench: Bench, started: float) -> Timing:
    """Train on batches that Ray Data reads, decodes and shuffles again in every epoch."""
    import ray.data

    from ser_ray.cluster.connect import cluster
    from ser_ray.shards.layout import clips_name
    from ser_ray.shards.read import open_shards
    from ser_ray.training.parts import select_rows

    opened = open_shards(bench.shards)
    clips = opened.clips()
    selected = set(clips["path"].take(select_rows(clips, bench.recipe).train).to_pylist())
    labels = {label: index for index, label in enumerate(opened.card.labels)}
    features = opened.card.features
    shape = (features.num_bins("mel"), features.num_frames)

    def decode(batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        keep = np.asarray([path in selected for path in batch["path"]], dtype=bool)
        rows = [np.frombuffer(value, np.float16).reshape(shape) for value in batch["mel"][keep]]
        return {
            "mel": np.stack(rows) if rows else np.zeros((0, *shape), np.float16),
            "num_frames": batch["num_frames"][keep].astype(np.int64),
            "label": np.asarray([labels[name] for name in batch["emotion"][keep]], np.int64),
        }

    columns = ["path", "mel", "num_frames", "emotion"]
    files = [f"{bench.shards}/{clips_name(number)}" for number in opened.card.shard_numbers]
    with cluster():
        data = ray.data.read_parquet(files).select_columns(columns).map_batches(decode)
        return _in_ray(_stream_worker, bench, started, {"train": data.random_shuffle()})


def ray(bench: Bench, started: float) -> Timing:
    """Train with the bare loop in a worker of Ray Train."""
    from ser_ray.cluster.connect import cluster

    with cluster():
        return _in_ray(_ray_worker, bench, started, {})


def _in_ray(
    worker: Callable[[dict[str, Any]], None],
    bench: Bench,
    started: float,
    datasets: dict[str, Any],
) -> Timing:
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    with tempfile.TemporaryDirectory() as folder:
        TorchTrainer(
            worker,
            train_loop_config={"bench": bench, "started": started, "folder": folder},
            scaling_config=ScalingConfig(num_workers=1, use_gpu=bench.device == "gpu"),
            run_config=RunConfig(storage_path=folder),
            datasets=datasets,
        ).fit()
        return Timing(**json.loads(Path(folder, "timing.json").read_text()))


def _ray_worker(arguments: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(num_threads())
    timing = _run_bare(arguments["bench"], arguments["started"], 0, 1)
    Path(arguments["folder"], "timing.json").write_text(json.dumps(asdict(timing)))


def _stream_worker(arguments: dict[str, Any]) -> None:
    import ray.train
    import torch

    from ser_ray.training.data import Clips

    bench: Bench = arguments["bench"]
    torch.set_num_threads(num_threads())
    trainer = _BareTrainer(bench, 0, 1)
    mean, std = (
        torch.as_tensor(values, dtype=torch.float32, device=trainer.device)
        for values in (trainer.normalisation.mean, trainer.normalisation.std)
    )
    shard = ray.train.get_dataset_shard("train")
    marks, first, num_clips = [], 0.0, 0
    for epoch in range(bench.recipe.epochs):
        marks.append(trainer.now())
        batches = shard.iter_torch_batches(
            batch_size=bench.recipe.batch_size, device=trainer.device, drop_last=True
        )
        for batch in batches:
            frames = (batch["mel"].float().transpose(1, 2) - mean) / std
            clips = Clips(frames, batch["num_frames"], batch["label"])
            rows = torch.arange(len(clips), device=trainer.device)
            trainer.train_step(*trainer.augment(clips, rows))
            first = first or trainer.now() - arguments["started"]
            if epoch > 0:
                num_clips += len(rows)
    marks.append(trainer.now())
    timing = Timing(num_clips / (marks[-1] - marks[1]), float("nan"), first)
    Path(arguments["folder"], "timing.json").write_text(json.dumps(asdict(timing)))


def measure(bench: Bench, way: str) -> tuple[Timing, int]:
    """Measure one way in a new Python process, so that earlier ways do not change its memory.

    Returns:
        The timing, and the number of processes that the new process started.
    """
    options = asdict(bench) | {"way": way, "started": time.time()}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "timing.json")
        command = [sys.executable, __file__, "one", json.dumps(options), str(output)]
        environment = dict(os.environ)
        if way not in NOT_OURS and start.needs_restart():
            environment[start.TUNABLES] = start.HUGE_PAGES
        with collect_child_ids() as child_ids:
            subprocess.run(command, check=True, env=environment)
        return Timing(**json.loads(output.read_text())), len(child_ids) - 1


@contextmanager
def collect_child_ids() -> Iterator[set[int]]:
    """Yield a set that collects, in the block, the ids of all processes below this one."""
    child_ids: set[int] = set()
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(0.1):
            child_ids.update(child.pid for child in psutil.Process().children(recursive=True))

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield child_ids
    finally:
        ended.set()
        thread.join()


def measure_here(options: dict[str, Any], output: Path) -> None:
    """Measure one way in this process, which `measure` started, and write the timing."""
    way, started = options.pop("way"), options.pop("started")
    bench = Bench(**options | {"recipe": TrainConfig.from_dict(options["recipe"])})
    functions: dict[str, Callable[..., Timing]] = {
        "ours": ours,
        "bare": bare,
        "ours_on_ray": partial(ours, address="local"),
        "ray": ray,
        "ours_ddp": partial(ours, workers=bench.workers),
        "bare_ddp": partial(bare, workers=bench.workers),
        "ingest": partial(ours, ingest="stream"),
        "stream": stream,
    }
    if way not in NOT_OURS:
        start.collect_rarely()
    timing = functions[way](bench, started)
    output.write_text(json.dumps(asdict(timing)))


def main(bench: Bench) -> None:
    """Measure all ways, and print them with their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        if not bench.store:
            bench = replace(bench, store=f"sqlite:///{folder}/mlflow.db")
            print(f"making the MLflow database took {make_store(bench.store):.1f} s")
        compare_ways(bench)


def make_store(uri: str) -> float:
    """Make an MLflow database. Return the seconds that this took, without those of imports."""
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401 - slow to import

    from ser_ray.tracking.store import connect

    began = time.perf_counter()
    connect(uri, create=True)
    return time.perf_counter() - began


def compare_ways(bench: Bench) -> None:
    """Measure the ways in their order, and print the ratios of their means."""
    timings: dict[str, list[Timing]] = {}
    for way in bench.ways:
        timing, processes = measure(bench, way)
        timings.setdefault(way, []).append(timing)
        print(
            f"{way:11} {timing.clips_per_second:7.1f} clips/s  outside {timing.outside:6.1%}  "
            f"first step after {timing.first_step:5.1f} s  {processes:3} processes",
            flush=True,
        )
    for way, other in RATIOS:
        if way in timings and other in timings:
            names = ("clips_per_second", "first_step")
            speed, first = (_mean(timings[way], n) / _mean(timings[other], n) for n in names)
            print(f"{way} / {other}: speed {speed:.2f}, time to the first step {first:.2f}")


def _mean(timings: list[Timing], name: str) -> float:
    return statistics.mean(getattr(timing, name) for timing in timings)


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        measure_here(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)))
