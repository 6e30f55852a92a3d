"""Measures how fast a training step can be on a device, as the floor for `train`.

`python jobs/bench.py floor --shards DIR` repeats one step (augmentation, forward and backward pass,
AdamW, learning rate) on clips in the memory of the device, for every batch size in these ways:

- eager: as in `train`, without its counts and reports;
- default, reduce-overhead, max-autotune: augmentation, network and loss are compiled with this mode
  of `torch.compile`;
- graph: one CUDA graph of the complete step is replayed. Its learning rate is read from the memory
  of the device, and the momentum and the weight of mixup stay constant.

The first steps of each way, which compile or capture, are timed separately. A way that the device
or torch cannot run is printed with its reason. Validation, checkpoints and reports are not
measured.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from ser_ray.shards.read import open_shards
from ser_ray.training.augment import Augment
from ser_ray.training.data import load_fold
from ser_ray.training.model import FRESH, build_network, supports_bfloat16
from ser_ray.training.recipe import TrainConfig

Way = Literal["eager", "default", "reduce-overhead", "max-autotune", "graph"]
WARM_UP_STEPS = 4
"""Steps before the time is taken. torch compiles and tunes in the first ones."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    shards: str
    """Shard set to train on."""
    recipe: TrainConfig = field(default_factory=lambda: TrainConfig(weights="none"))
    """The recipe of all ways; `batch_sizes` replaces its batch size."""
    device: Literal["cpu", "cuda"] = "cuda"
    batch_sizes: tuple[int, ...] = (32, 128, 512)
    steps: int = 200
    """Number of steps whose time is taken."""
    ways: tuple[Way, ...] = ("eager", "default", "reduce-overhead", "max-autotune", "graph")
    """The ways to compare, in this order."""


class Step:
    """A training step on resident clips."""

    def __init__(self, bench: Bench, batch_size: int, way: Way) -> None:
        self.device = torch.device(bench.device)
        recipe = replace(bench.recipe, batch_size=batch_size)
        shards = open_shards(bench.shards)
        data = load_fold(shards, recipe, self.device)
        num_labels, self.clips = len(data.labels), data.train
        self.network = build_network(recipe, FRESH, num_labels, self.device, None).train()
        self.augment = Augment(
            recipe, shards.card.features, num_labels, data.normalisation, self.device
        )
        bins = len(data.normalisation.std)
        self.autocast = supports_bfloat16(self.device, bins, recipe.crop_frames)
        self.smoothing = recipe.label_smoothing
        # AdamW in a graph reads its learning rate from the memory of the device.
        is_graph = way == "graph"
        rate = torch.tensor(recipe.lr_min, device=self.device) if is_graph else recipe.lr_min
        self.optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=rate,
            weight_decay=recipe.weight_decay,
            fused=True,
            capturable=is_graph,
        )
        self.rows = torch.zeros(batch_size, dtype=torch.long, device=self.device)
        self.draw_rows()
        self.loss: Callable[[Tensor], Tensor] = self.loss_of
        if way not in ("eager", "graph"):
            self.loss = torch.compile(self.loss_of, mode=way)

    def draw_rows(self) -> None:
        """Choose the clips of the next batch."""
        self.rows.copy_(torch.randint(len(self.clips), (len(self.rows),), device=self.device))

    def loss_of(self, rows: Tensor) -> Tensor:
        """Augment a batch, and return its mean loss."""
        features, targets = self.augment(self.clips, rows)
        features = features.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return F.cross_entropy(self.network(features), targets, label_smoothing=self.smoothing)

    def update(self) -> None:
        """Update the weights once with the chosen clips."""
        self.optimiser.zero_grad(set_to_none=True)
        self.loss(self.rows).backward()
        self.optimiser.step()

    def captured(self) -> Callable[[], None]:
        """Capture `update` in a CUDA graph, and return the function that replays it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm-up, as torch requires before a capture
            for _ in range(WARM_UP_STEPS):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        return graph.replay


def measure(bench: Bench, batch_size: int, way: Way) -> tuple[float, float]:
    """Return the seconds of the first steps, and the seconds of one later step."""
    began, step = time.perf_counter(), Step(bench, batch_size, way)
    update = step.captured() if way == "graph" else step.update

    def run(num_steps: int) -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            step.draw_rows()
            update()
        if bench.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run(WARM_UP_STEPS)
    first_steps = time.perf_counter() - began
    return first_steps, run(bench.steps) / bench.steps


def main(bench: Bench) -> None:
    """Measure all ways, and print a table."""
    if bench.device == "cuda" and not torch.cuda.is_available():
        sys.exit("this machine has no GPU: give --device cpu")
    print(f"torch {torch.__version__}, {bench.device}")
    print("| batch | way | first steps | ms per step | steps/s | clips/s |")
    print("|--:|---|--:|--:|--:|--:|")
    for batch_size in bench.batch_sizes:
        for way in bench.ways:
            try:
                first, seconds = measure(bench, batch_size, way)
            except RuntimeError as error:  # also those of torch's compilers
                reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
                print(f"| {batch_size} | {way} | {reason} | | | |", flush=True)
                continue
            print(
                f"| {batch_size} | {way} | {first:.1f} s | {1000 * seconds:.2f} | "
                f"{1 / seconds:.0f} | {batch_size / seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
