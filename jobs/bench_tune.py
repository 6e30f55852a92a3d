"""How well a search uses its slots, and what ASHA saves.

`python jobs/bench.py tune --shards DIR` prints

- start: seconds from the moment a trial's process is ready for it to its first step, of the first
  trial of every slot (which imports torch and reads the shards) and of the others;
- busy: share of the slots' time, from the first start to the last end, spent in epochs;
- trials an hour, against the same recipes trained one after another in one process that has all
  the CPUs;
- for every seed, epochs and best validation UA of a search with ASHA and without.

What the figures do not say: how it is where many slots read their shards over a network. The time
to start Ray itself is left out on both sides.
"""

import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import ray
import torch
import tyro

from ser_ray.shards.read import open_shards
from ser_ray.training.config import RunConfig, TrainConfig
from ser_ray.training.loop import fit
from ser_ray.training.model import read_pretrained
from ser_ray.training.search_config import SlotConfig, TuneConfig
from ser_ray.training.study import TrialLog
from ser_ray.training.tune import TuneResult, search

Scheduler = Literal["asha", "none"]
SCHEDULERS: tuple[Scheduler, ...] = ("none", "asha")
RECIPE = TrainConfig(weights="none", crop_frames=64, epochs=12, lr_max=4e-3)


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    shards: str
    """The shard set to search on; the stand-in corpus's is enough."""
    slots: int = 2
    """Trials at once, with one CPU each."""
    search: TuneConfig = field(default_factory=lambda: TuneConfig(trials=12))
    recipe: TrainConfig = field(default_factory=lambda: RECIPE)
    seeds: int = 1
    """Searches with ASHA and without, to compare the two."""


def run_search(bench: Bench, seed: int, scheduler: Scheduler, folder: Path) -> TuneResult:
    """Search once, on a fresh record."""
    run = RunConfig(
        storage=str(folder), name=f"{scheduler}-{seed}", tracking_uri=f"sqlite:///{folder}/db"
    )
    recipe = replace(bench.recipe, seed=seed)
    config = replace(bench.search, scheduler=scheduler)
    return search(bench.shards, recipe, run, config, SlotConfig(), show=lambda trials: None)


def starts(trials: list[TrialLog], slots: int) -> tuple[list[float], list[float]]:
    """Seconds to the first step: of every slot's first trial, and of the others."""
    ran = sorted((trial for trial in trials if trial.rows), key=lambda trial: trial.started_ms)
    seconds = [
        (trial.times_ms[0] - trial.started_ms) / 1000 - trial.rows[0]["epoch_seconds"]
        for trial in ran
    ]
    return seconds[:slots], seconds[slots:]


def busy(trials: list[TrialLog], slots: int) -> float:
    """Share of the slots' time in which an epoch was running."""
    ran = [trial for trial in trials if trial.rows]
    wall = max(t.ended_ms for t in ran) - min(t.started_ms for t in ran)
    return sum(row["epoch_seconds"] for trial in ran for row in trial.rows) * 1000 / wall / slots


def trials_an_hour(trials: list[TrialLog]) -> float:
    """From the first start to the last end."""
    wall = max(t.ended_ms for t in trials) - min(t.started_ms for t in trials)
    return len(trials) / wall * 3.6e6


def one_after_another(bench: Bench, recipes: list[TrainConfig]) -> float:
    """Trials an hour of the same trainings in this process."""
    torch.set_num_threads(bench.slots)
    shards = open_shards(bench.shards)
    pretrained = read_pretrained(bench.recipe.weights, len(shards.card.labels))
    started = time.perf_counter()
    for recipe in recipes:
        fit(recipe, shards, pretrained, lambda epoch, take: None)
    return len(recipes) / (time.perf_counter() - started) * 3600


def epochs_of(trials: list[TrialLog]) -> int:
    """Epochs trained in all."""
    return sum(len(trial.rows) for trial in trials)


def main(bench: Bench) -> None:
    """Measure and print."""
    ray.init(num_cpus=bench.slots, include_dashboard=False, address="local", log_to_driver=False)
    with tempfile.TemporaryDirectory() as scratch:
        full = run_search(bench, 0, "none", Path(scratch))
        first, others = starts(full.trials, bench.slots)
        print(f"start of a slot's first trial  {statistics.median(first):6.2f} s")
        print(f"start of the others            {statistics.median(others):6.2f} s (median)")
        print(f"slots busy                     {busy(full.trials, bench.slots):6.1%}")
        print(f"trials an hour                 {trials_an_hour(full.trials):6.0f}")
        for seed, scheduler in itertools.product(range(bench.seeds), SCHEDULERS):
            done = seed == 0 and scheduler == "none"
            result = full if done else run_search(bench, seed, scheduler, Path(scratch))
            print(
                f"seed {seed}, {scheduler:4}: best UA {result.best.best['val_ua']:6.1%} in "
                f"{epochs_of(result.trials):4d} epochs"
            )
        ray.shutdown()
        alone = one_after_another(bench, [trial.recipe for trial in full.trials])
        print(f"one after another, an hour     {alone:6.0f}")


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
