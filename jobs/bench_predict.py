"""Measures how fast the emotion in many files is predicted, in comparison with decoding alone.

`python jobs/bench.py predict --corpus DIR --model MODEL` prints a table of

- decode: files to samples, in one process;
- features: files to the network's input, in one process;
- predict: files to probabilities, in one process with one thread;
- pass: the batch pass of `ser-ray predict DIR --output`, on a Ray cluster with `--cpus` CPUs. The
  model is loaded before the measurement begins.

The rate of the pass counts the files after its first block, so the start of Ray and of its actors
changes only the seconds to the first block. The last column compares the rate of each row with the
rate of decoding. DIR may be in a bucket, and videos in it are measured like all other files.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ser_ray.corpus.audio_files import list_audio
from ser_ray.features.decode import decode
from ser_ray.inference.batch import predict_many
from ser_ray.inference.predictor import Predictor
from ser_ray.tracking.registry import local_model


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    corpus: str
    """Folder of the files. It must have more files than a block of the pass, which has 32."""
    model: str
    """Checkpoint, run id or registered name."""
    files: int = 0
    """Largest number of files; 0 means all files."""
    sample: int = 200
    """Number of files for the rows of one process. If the folder has more files, up to twice as
    many are measured."""
    cpus: int = 2
    """CPUs of the Ray cluster."""


@dataclass(frozen=True)
class Timing:
    """The measurement for one row of the table."""

    files: int
    first: float
    """Seconds to the first file or block."""
    rate: float
    """Files per second after the first file or block."""


def one_by_one(files: list[str], work: Callable[[str], object]) -> Timing:
    """Measure a function that processes one file. The first file is the warm-up."""
    started = time.perf_counter()
    work(files[0])
    first = time.perf_counter()
    for path in files[1:]:
        work(path)
    return Timing(len(files), first - started, (len(files) - 1) / (time.perf_counter() - first))


def batch_pass(files: list[str], predictor: Predictor, cpus: int) -> Timing:
    """Measure a batch prediction, including the start of Ray."""
    import ray

    marks: list[tuple[float, int]] = []

    def mark(_: str, done: float, __: float) -> None:
        marks.append((time.perf_counter() - started, int(done)))

    started = time.perf_counter()
    ray.init(num_cpus=cpus, include_dashboard=False, address="local", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        predict_many(files, predictor, str(Path(folder, "found.parquet")), progress=mark)
    ray.shutdown()
    (first, block), (last, done) = marks[0], marks[-1]
    return Timing(done, first, (done - block) / (last - first))


def main() -> None:
    """Measure every row of the table, and print the table."""
    bench = tyro.cli(Bench, description=__doc__)
    torch.set_num_threads(1)
    files = list_audio([bench.corpus]).files[: bench.files or None]
    sample = files[:: max(1, len(files) // bench.sample)]
    with local_model(bench.model) as checkpoint:
        predictor = Predictor(checkpoint)
    timings = {
        "decode": one_by_one(sample, decode),
        "features": one_by_one(sample, predictor.reader.read),
        "predict": one_by_one(sample, predictor.predict),
        "pass": batch_pass(files, predictor, bench.cpus),
    }
    print(f"{'':10}{'files':>7}{'files/s':>9}{'first, s':>10}{'of decoding':>13}")
    for way, timing in timings.items():
        share = timing.rate / timings["decode"].rate
        print(f"{way:10}{timing.files:7}{timing.rate:9.1f}{timing.first:10.2f}{share:13.0%}")


if __name__ == "__main__":
    main()
