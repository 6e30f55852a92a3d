"""Measures how busy a search keeps its slots, and how many epochs ASHA saves.

`python jobs/bench.py tune --shards DIR` searches without a scheduler and prints, for every seed,

- start: seconds from the start of a trial to its first step. The first trial of each slot also
  imports torch and reads the shards, so these trials are shown separately;
- busy: share of the time, from the first start to the last end, in which a slot trains an epoch;
- trials per hour, and the same when the recipes are trained one after another in one process with
  as many threads as there are slots;
- asha: the result of ASHA on the same trials in many random orders, as Ray Tune's class decides
  from the recorded scores. It prints the share of all epochs that ASHA trains, how often ASHA finds
  the best UA, and how much lower its UA is on average.

Many slots that read their shards over a network are not measured, and neither is the start of Ray.
"""

import heapq
import logging
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
import tyro
from ray.tune.schedulers import TrialScheduler

from ser_ray.cli.pipeline import SYNTHETIC_RECIPE
from ser_ray.distributed.run_config import RunConfig
from ser_ray.search.actor import OBJECTIVE
from ser_ray.search.config import SlotConfig, TuneConfig
from ser_ray.search.trial import TrialRecord
from ser_ray.search.tune_run import ResumableAsha
from ser_ray.search.tuner import search
from ser_ray.shards.read import open_shards
from ser_ray.training.loop import fit
from ser_ray.training.model import read_pretrained
from ser_ray.training.recipe import TrainConfig

ORDERS = 200
"""Number of random orders in which ASHA receives the trials of one search."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    shards: str
    """The shard set to search on. The synthetic corpus is enough."""
    slots: int = 2
    """Number of concurrent trials, with one CPU each."""
    search: TuneConfig = field(default_factory=lambda: TuneConfig(trials=16, searcher="random"))
    """The space, the searcher and ASHA's settings."""
    recipe: TrainConfig = field(default_factory=lambda: SYNTHETIC_RECIPE)
    seeds: int = 1
    """Number of searches, each with its own seed."""
    alone: int = 4
    """Number of trials that are also trained one after another, which takes long."""


def run_search(bench: Bench, seed: int, folder: Path) -> list[TrialRecord]:
    """Run a search without a scheduler in a new folder."""
    run = RunConfig(storage=str(folder), name=f"{seed}", tracking_uri=f"sqlite:///{folder}/db")
    recipe = replace(bench.recipe, seed=seed)
    config = replace(bench.search, scheduler="none")
    result = search(bench.shards, recipe, run, config, SlotConfig(), show=lambda trials: None)
    return result.trials


def start_seconds(trials: list[TrialRecord], slots: int) -> tuple[list[float], list[float]]:
    """Return the seconds to the first step: of the first trial of each slot, and of the others."""
    ran = sorted((trial for trial in trials if trial.rows), key=lambda trial: trial.started_ms)
    seconds = [
        (trial.times_ms[0] - trial.started_ms) / 1000 - trial.rows[0]["speed/epoch_seconds"]
        for trial in ran
    ]
    return seconds[:slots], seconds[slots:]


def utilisation(trials: list[TrialRecord], slots: int) -> tuple[float, float]:
    """Return the share of the slots' time in which they trained an epoch, and trials per hour."""
    ran = [trial for trial in trials if trial.rows]
    wall = (max(t.times_ms[-1] for t in ran) - min(t.started_ms for t in ran)) / 1000
    training = sum(row["speed/epoch_seconds"] for trial in ran for row in trial.rows)
    return training / wall / slots, len(trials) / wall * 3600


def one_after_another(bench: Bench, recipes: list[TrainConfig]) -> float:
    """Train the same recipes in this process, and return the trials per hour."""
    torch.set_num_threads(bench.slots)
    shards = open_shards(bench.shards)
    pretrained = read_pretrained(bench.recipe.weights, len(shards.card.labels))
    started = time.perf_counter()
    for recipe in recipes:
        fit(recipe, shards, pretrained, lambda epoch, make_snapshot: None)
    return len(recipes) / (time.perf_counter() - started) * 3600


def replay(bench: Bench, trials: list[TrialRecord]) -> tuple[int, float]:
    """Return the number of epochs and the best UA of ASHA if the trials start in this order."""
    scheduler = ResumableAsha(bench.recipe, bench.search)
    scheduler.set_search_properties(OBJECTIVE, "max")
    waiting = [SimpleNamespace(trial_id=str(index)) for index in range(len(trials))]
    for trial in waiting:
        trial.last_result, trial.config = {}, {}
        scheduler.on_trial_add(None, trial)
    running: list[tuple[float, str, int]] = []  # time at which the epoch ends, trial, epoch
    epochs, best = 0, 0.0

    def begin(at: float, name: str, epoch: int) -> None:
        ends = at + trials[int(name)].rows[epoch]["speed/epoch_seconds"]
        heapq.heappush(running, (ends, name, epoch))

    for _ in range(min(bench.slots, len(trials))):
        begin(0.0, waiting.pop(0).trial_id, 0)
    while running:
        now, name, epoch = heapq.heappop(running)
        rows = trials[int(name)].rows[: epoch + 1]
        so_far = max(row["val/ua"] for row in rows)
        epochs, best = epochs + 1, max(best, so_far)
        result = {"epoch": epoch + 1, OBJECTIVE: so_far}
        decision = scheduler.on_trial_result(None, SimpleNamespace(trial_id=name), result)
        if decision != TrialScheduler.STOP and epoch + 1 < len(trials[int(name)].rows):
            begin(now, name, epoch + 1)
        elif waiting:
            begin(now, waiting.pop(0).trial_id, 0)
    return epochs, best


def compare_asha(bench: Bench, trials: list[TrialRecord]) -> str:
    """Describe the results of ASHA on the trials in many orders."""
    scored = [trial for trial in trials if trial.succeeded]
    all_epochs = sum(len(trial.rows) for trial in scored)
    best_ua = max(row["val/ua"] for trial in scored for row in trial.rows)
    shares, losses = [], []
    for seed in range(ORDERS):
        epochs, best = replay(bench, random.Random(seed).sample(scored, len(scored)))
        shares.append(epochs / all_epochs)
        losses.append(best_ua - best)
    reached = sum(loss <= 0 for loss in losses) / ORDERS
    return (
        f"{statistics.mean(shares):.0%} of the epochs, the same best UA {best_ua:.1%} in "
        f"{reached:.0%} of the orders, {statistics.mean(losses) * 100:.1f} points below on average"
    )


def main(bench: Bench) -> None:
    """Run the searches, and print the measurements."""
    logging.getLogger("ray").setLevel(logging.ERROR)
    for seed in range(bench.seeds):
        ray.init(
            num_cpus=bench.slots, include_dashboard=False, address="local", log_to_driver=False
        )
        with tempfile.TemporaryDirectory() as scratch:
            trials = run_search(bench, seed, Path(scratch))
        ray.shutdown()
        first, others = start_seconds(trials, bench.slots)
        busy, an_hour = utilisation(trials, bench.slots)
        print(f"seed {seed}")
        print(f"start of a slot's first trial  {statistics.median(first):6.2f} s")
        print(f"start of the others            {statistics.median(others):6.2f} s (median)")
        print(f"slots busy                     {busy:6.1%}")
        print(f"trials an hour                 {an_hour:6.0f}")
        print(f"asha                           {compare_asha(bench, trials)}", flush=True)
    if bench.alone:
        alone = one_after_another(bench, [trial.recipe for trial in trials[: bench.alone]])
        print(f"one after another, an hour     {alone:6.0f}")


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
