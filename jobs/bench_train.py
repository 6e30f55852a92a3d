"""Measures how fast training is, compared with a bare PyTorch loop and with Ray's usual patterns.

`python jobs/bench.py train --shards DIR` measures these ways in one run, on the clips of one fold:

- ours: `train` with one worker in one process, with its validation, checkpoints and reports;
- bare: a PyTorch loop with the same arithmetic and nothing else;
- ours_on_ray: ours with `--address local`, as one worker of Ray Train;
- ray: the bare loop in a worker of Ray Train. ours_on_ray / ray shows the cost of this project, and
  ray / bare the cost of Ray's processes if the training uses all CPUs;
- ours_ddp, bare_ddp: both with several workers. The bare workers are plain processes that use gloo,
  or NCCL with `--device gpu`, where every worker has a GPU;
- ingest: ours with `--ingest stream`, which reads the training clips again in every epoch;
- stream: the pattern of Ray's examples, `iter_torch_batches` over a Ray Data shard in every epoch.

Each way runs in a new Python process. Clips per second are measured in the training steps after the
first epoch. The start and the warm-up change only the seconds to the first step. `outside` is the
share of these epochs that is neither training step nor validation. `processes` counts the processes
besides the first, checked ten times per second. Every `ours` makes a new MLflow database, which a
second training in the same folder does not. Workers on several nodes are not measured.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import psutil
import tyro

from ser_ray.training.recipe import TrainConfig

RATIOS = (
    ("ours", "bare"),
    ("ours_on_ray", "ray"),
    ("ours", "ours_on_ray"),
    ("ours_ddp", "bare_ddp"),
    ("ours", "stream"),
    ("ingest", "ours"),
    ("ingest", "stream"),
)


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    shards: str
    """Shard set to train on."""
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(weights="none", epochs=3))
    """The recipe. The first epoch does not count."""
    device: Literal["cpu", "gpu"] = "cpu"
    """The device of every worker."""
    workers: int = 2
    """Number of workers of ours_ddp and bare_ddp."""
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
    """Share of these epochs that is neither step nor validation; NaN if unknown."""
    first_step: float
    """Seconds from the command to the end of the first step, or of the first epoch's reading."""


def ours(
    bench: Bench,
    started: float,
    workers: int = 1,
    ingest: Literal["resident", "stream"] = "resident",
    address: str = "",
) -> Timing:
    """Train as users do."""
    from ser_ray.distributed.run_config import RunConfig
    from ser_ray.distributed.train import train

    ends = [time.time()]
    with tempfile.TemporaryDirectory() as folder:
        run = RunConfig(
            workers=str(workers),
            device=bench.device,
            ingest=ingest,
            storage=folder,
            tracking_uri=f"sqlite:///{folder}/mlflow.db",
        )
        result = train(
            bench.shards, bench.recipe, run, address=address,
            on_epoch=lambda row: ends.append(time.time()),
        )  # fmt: skip
    rows = result.history
    steps = bench_steps(bench)
    in_steps = [steps[1] / row["speed/clips_per_second"] for row in rows]
    wall = ends[-1] - ends[1]
    outside = 1 - sum(row["speed/epoch_seconds"] for row in rows[1:]) / wall
    first = ends[1] - rows[0]["speed/epoch_seconds"] + in_steps[0] / steps[0] - started
    return Timing(steps[1] * (len(rows) - 1) / sum(in_steps[1:]), outside, first)


def bench_steps(bench: Bench) -> tuple[int, int]:
    """Return the steps of an epoch, and the number of clips in them."""
    from ser_ray.shards.read import open_shards
    from ser_ray.training.data import steps_per_epoch
    from ser_ray.training.parts import select_rows

    rows = len(select_rows(open_shards(bench.shards).clips(), bench.recipe).train)
    steps = steps_per_epoch(rows, bench.recipe.batch_size)
    return steps, steps * bench.recipe.batch_size


def bare(bench: Bench, started: float, workers: int = 1) -> Timing:
    """Train in plain processes. Several processes use gloo, or NCCL on GPUs."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        arguments = (bench, started, workers, folder)
        torch.multiprocessing.spawn(_bare_worker, arguments, nprocs=workers)
        return Timing(**json.loads(Path(folder, "timing.json").read_text()))


def _bare_worker(rank: int, bench: Bench, started: float, workers: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max((os.cpu_count() or 1) // workers, 1))
    if workers > 1:
        if bench.device == "gpu":
            torch.cuda.set_device(rank)
        backend = "nccl" if bench.device == "gpu" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{folder}/meet", rank=rank, world_size=workers
        )
    timing = _run_bare(bench, started, rank, workers)
    if rank == 0:
        Path(folder, "timing.json").write_text(json.dumps(asdict(timing)))
    if workers > 1:
        dist.destroy_process_group()


def _run_bare(bench: Bench, started: float, rank: int, workers: int) -> Timing:
    import torch

    learner = _Learner(bench, rank, workers)
    marks = []
    first = 0.0
    for _ in range(bench.recipe.epochs):
        order = torch.randperm(len(learner.clips)).to(learner.device)
        marks.append(learner.now())
        for step in range(learner.steps):
            rows = order[step * bench.recipe.batch_size :][: bench.recipe.batch_size]
            learner.learn(*learner.augment(learner.clips, rows))
            first = first or learner.now() - started
    marks.append(learner.now())
    clips = learner.steps * bench.recipe.batch_size * (bench.recipe.epochs - 1)
    return Timing(clips / (marks[-1] - marks[1]), 0.0, first)


class _Learner:
    """A network with its optimiser and schedule, to compute steps without the package's loop."""

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
        """Return the time after the device has finished all steps so far."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.time()

    def learn(self, batch: Any, targets: Any) -> None:
        """Make one step."""
        import torch
        import torch.nn.functional as F

        own = slice(self.rank, None, self.workers)
        batch = batch[own].contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(
                self.network(batch), targets[own], label_smoothing=self.config.label_smoothing
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

    torch.set_num_threads(os.cpu_count() or 1)
    timing = _run_bare(arguments["bench"], arguments["started"], 0, 1)
    Path(arguments["folder"], "timing.json").write_text(json.dumps(asdict(timing)))


def _stream_worker(arguments: dict[str, Any]) -> None:
    import ray.train
    import torch

    from ser_ray.training.data import Clips

    bench: Bench = arguments["bench"]
    torch.set_num_threads(os.cpu_count() or 1)
    learner = _Learner(bench, 0, 1)
    mean, std = (
        torch.as_tensor(values, dtype=torch.float32, device=learner.device)
        for values in (learner.normalisation.mean, learner.normalisation.std)
    )
    shard = ray.train.get_dataset_shard("train")
    marks, first, clips = [], 0.0, 0
    for epoch in range(bench.recipe.epochs):
        marks.append(learner.now())
        batches = shard.iter_torch_batches(
            batch_size=bench.recipe.batch_size, device=learner.device, drop_last=True
        )
        for batch in batches:
            frames = (batch["mel"].float().transpose(1, 2) - mean) / std
            resident = Clips(frames, batch["num_frames"], batch["label"])
            rows = torch.arange(len(resident), device=learner.device)
            learner.learn(*learner.augment(resident, rows))
            first = first or learner.now() - arguments["started"]
            clips += len(rows) if epoch else 0
    marks.append(learner.now())
    timing = Timing(clips / (marks[-1] - marks[1]), float("nan"), first)
    Path(arguments["folder"], "timing.json").write_text(json.dumps(asdict(timing)))


def measure(bench: Bench, way: str) -> tuple[Timing, int]:
    """Measure one way in a new Python process, so that the others do not add to its memory.

    Returns:
        The timing, and the number of processes that the first one started.
    """
    order = asdict(bench) | {"way": way, "started": time.time()}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, __file__, "one", json.dumps(order), str(answer)]
        with processes_seen() as seen:
            subprocess.run(command, check=True)
        return Timing(**json.loads(answer.read_text())), len(seen) - 1


@contextmanager
def processes_seen() -> Iterator[set[int]]:
    """Yield the ids of the processes below this one that are seen in the block."""
    seen: set[int] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.1):
            seen.update(each.pid for each in psutil.Process().children(recursive=True))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def one(order: dict[str, Any], answer: Path) -> None:
    """Run one way in the process that `measure` started."""
    way, started = order.pop("way"), order.pop("started")
    bench = Bench(**order | {"recipe": TrainConfig.from_dict(order["recipe"])})
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
    timing = functions[way](bench, started)
    answer.write_text(json.dumps(asdict(timing)))


def train(bench: Bench) -> None:
    """Measure all ways and print them with their ratios."""
    found: dict[str, Timing] = {}
    for way in bench.ways:
        timing, processes = measure(bench, way)
        found[way] = timing
        print(
            f"{way:11} {timing.clips_per_second:7.1f} clips/s  outside {timing.outside:6.1%}  "
            f"first step after {timing.first_step:5.1f} s  {processes:3} processes",
            flush=True,
        )
    for way, against in RATIOS:
        if way in found and against in found:
            ratio = found[way].clips_per_second / found[against].clips_per_second
            start = found[way].first_step / found[against].first_step
            print(f"{way} / {against}: {ratio:.2f} of the speed, first step after {start:.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        train(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)))
