"""How fast many files are predicted, against decoding them and doing nothing else.

`python jobs/bench.py predict --corpus DIR --model MODEL` prints a table of

- decode: files to samples, in one process;
- features: and to the network's input, in one process;
- predict: and to probabilities, in one process with one thread;
- pass: `ser-ray predict DIR --output`, on a Ray cluster of as many CPUs as are asked for.

The rate of the pass is that of the files after its first block, so that starting Ray and the actors
shows only in the seconds to the first one. What the figures do not say: how it is with files that
come over a network, and with videos, where finding the sound takes longer than decoding it.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ser_ray.features.decode import decode
from ser_ray.inference.batch import predict_many
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import list_audio
from ser_ray.shards.progress import Progress
from ser_ray.tracking.registry import local_checkpoint


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    corpus: str
    """Folder of the files."""
    model: str
    """Checkpoint, run id or registered name."""
    files: int = 0
    """At most so many of the files; 0 for all."""
    sample: int = 200
    """Files for the ways of one process."""
    cpus: int = 2
    """CPUs of Ray."""


@dataclass(frozen=True)
class Timing:
    """One way, measured."""

    files: int
    first: float
    """Seconds to the first file or block."""
    rate: float
    """Files a second after it."""


def one_by_one(files: list[str], work: Callable[[str], object]) -> Timing:
    """Measure a function on one file after the other; the first warms up."""
    started = time.perf_counter()
    work(files[0])
    first = time.perf_counter()
    for path in files[1:]:
        work(path)
    return Timing(len(files), first - started, (len(files) - 1) / (time.perf_counter() - first))


def whole_pass(files: list[str], predictor: Predictor, cpus: int) -> Timing:
    """Measure the pass from the start of Ray on."""
    import ray

    marks: list[tuple[float, int]] = []

    def mark(progress: Progress) -> None:
        marks.append((time.perf_counter() - started, progress.done))

    started = time.perf_counter()
    ray.init(num_cpus=cpus, include_dashboard=False, address="local", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        predict_many(files, predictor, str(Path(folder, "found.parquet")), progress=mark)
    ray.shutdown()
    (first, block), (last, done) = marks[0], marks[-1]
    return Timing(done, first, (done - block) / (last - first))


def main() -> None:
    """Measure every way and print the table."""
    bench = tyro.cli(Bench, description=__doc__)
    torch.set_num_threads(1)
    files = list_audio([bench.corpus])[: bench.files or None]
    sample = files[:: max(1, len(files) // bench.sample)]
    with local_checkpoint(bench.model) as checkpoint:
        predictor = Predictor(checkpoint)
    timings = {
        "decode": one_by_one(sample, decode),
        "features": one_by_one(sample, predictor.reader.read),
        "predict": one_by_one(sample, predictor.predict),
        "pass": whole_pass(files, predictor, bench.cpus),
    }
    print(f"{'':10}{'files':>7}{'files/s':>9}{'first, s':>10}{'of decoding':>13}")
    for way, timing in timings.items():
        share = timing.rate / timings["decode"].rate
        print(f"{way:10}{timing.files:7}{timing.rate:9.1f}{timing.first:10.2f}{share:13.0%}")


if __name__ == "__main__":
    main()
