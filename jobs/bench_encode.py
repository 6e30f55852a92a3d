"""Measures how fast clips are encoded, compared with torchaudio's network on the same batches.

`python jobs/bench.py encode --encoder wavlm_base_plus` prints clips per second of

- bare: a loop over the batches that only calls the network of torchaudio, without masks;
- encoder: `Encoder.encode`, which pads, masks and averages.

Both run in one process and take turns; the order changes in each round. They use a GPU if there is
one, and otherwise `--threads` CPU threads. On a CPU, the seconds are CPU seconds of the process, so
other work on the machine matters less. The weights are random, which does not change the time. The
clips are noise, with lengths like those of RAVDESS without silent ends. Decoding and Ray are not
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
    BUILDERS,
    ENCODER_RATE,
    PADDED_SECONDS,
    EncoderWeights,
    batches_by_length,
)

SECONDS = (1.2, 4.0)
"""Shortest and longest clip."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    encoder: str = "wavlm_base_plus"
    """Bundle of torchaudio, in lower case."""
    clips: int = 64
    """Number of clips in a round."""
    rounds: int = 3
    """Number of times that each way is measured; the fastest counts."""
    threads: int = 1
    """Number of torch's threads on a CPU."""


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the CPU seconds of a call, or on a GPU the seconds until its work is done."""
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
    network = BUILDERS[card.family](**card.arguments).eval()
    weights = EncoderWeights.fitting(card, network.state_dict(), "random weights")
    encoder, network = weights.build().to(device), network.to(device)
    rng = np.random.default_rng(0)
    lengths = (rng.uniform(*SECONDS, bench.clips) * ENCODER_RATE).astype(int)
    waves = [rng.normal(0, 0.1, length).astype(np.float32) for length in lengths]
    batches = []
    for rows in batches_by_length(lengths, PADDED_SECONDS[device.type] * ENCODER_RATE):
        padded = np.zeros((len(rows), lengths[rows[-1]]), np.float32)
        for place, row in zip(padded, rows, strict=True):
            place[: lengths[row]] = waves[row]
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
