"""Measures how fast clips are encoded, in comparison with torchaudio's network on its own.

`python jobs/bench.py encode --encoder wavlm_base_plus` prints clips per second of

- bare: a loop that only calls torchaudio's network on each padded batch, without masks;
- encoder: `Encoder.encode` on the same clips, which pads, masks and averages.

Both run in one process, in turn; the order changes in each round. They use a GPU if there is one,
and otherwise `--threads` CPU threads. On a CPU, CPU seconds of the process are measured, so that
other work on the machine matters less. The weights are random, which does not change the time. The
clips are noise, as long as RAVDESS clips without their silent ends. Decoding and Ray are not
measured.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from ser_ray.features.bundles import bundle_card
from ser_ray.features.encoder import (
    CONSTRUCTORS,
    ENCODER_RATE,
    MAX_BATCH_SECONDS,
    EncoderWeights,
    batches_by_length,
)

SECONDS = (1.2, 4.0)
"""Length of the shortest and of the longest clip."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    encoder: str = "wavlm_base_plus"
    """Name of a torchaudio bundle, in lower case."""
    clips: int = 64
    """Number of clips in a round."""
    rounds: int = 3
    """Number of measurements of each way. The fastest one is shown."""
    threads: int = 1
    """Number of torch threads on a CPU."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the CPU seconds of a call, or on a GPU the seconds until the GPU is done."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    started = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def main() -> None:
    """Measure both ways and print the table."""
    bench = tyro.cli(Bench, description=__doc__)
    torch.set_num_threads(bench.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = bundle_card(bench.encoder)
    network = CONSTRUCTORS[card.family](**card.arguments).eval()
    weights = EncoderWeights.from_tensors(card, network.state_dict(), "random weights")
    encoder, network = weights.build().to(device), network.to(device)
    rng = np.random.default_rng(0)
    lengths = (rng.uniform(*SECONDS, bench.clips) * ENCODER_RATE).astype(int)
    waves = [rng.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    batches = []
    for rows in batches_by_length(lengths, MAX_BATCH_SECONDS[device.type] * ENCODER_RATE):
        padded = np.zeros((len(rows), lengths[rows[-1]]), np.float32)
        for padded_row, row in zip(padded, rows, strict=True):
            padded_row[: lengths[row]] = waves[row]
        batches.append(torch.from_numpy(padded).to(device))

    @torch.inference_mode()
    def bare() -> None:
        for batch in batches:
            network.extract_features(batch)

    ways = {"bare": bare, "encoder": lambda: encoder.encode(waves)}
    best = dict.fromkeys(ways, float("inf"))
    for number in range(bench.rounds + 1):  # the first round is the warm-up
        for way in sorted(ways, reverse=number % 2 == 1):
            took = seconds_of(ways[way], device)
            best[way] = min(best[way], took) if number else best[way]
    print(f"{bench.encoder} on {device.type}, {bench.clips} clips, {lengths.sum() / 16_000:.0f} s")
    unit = "clips/s" if device.type == "cuda" else "clips per CPU second"
    for way, took in best.items():
        print(f"{way:10}{bench.clips / took:10.2f} {unit}{best['bare'] / took:8.2f} of bare")


if __name__ == "__main__":
    main()
