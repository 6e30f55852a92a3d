"""Measures the time and the driver's memory that `prepare` needs for a long list of clips.

`python jobs/bench.py plan --clips 1000000` prints the time and the driver's memory at the first
shard, after each tenth of the clips of a corpus, and at the end. Listing and planning precede the
first shard. The card is written after the last one. With `--sets 4`, the clips are split into four
corpora, whose shard sets are then opened as one.

The clips are segments of 1000 files, and each file lasts one second. Only the first segment of a
file is inside the file, but every row is processed and gets an outcome. Of a million clips, a shard
has segments of only one file, so it decodes one second of sound. The listing of a bucket is not
measured. `bench.py prepare` measures decoding.
"""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import soundfile
import tyro

from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.corpora import open_corpora
from ser_ray.shards.prepare import prepare

SPEAKERS = 1000
RATE = 16_000
"""Sample rate of the files in hertz."""
EMOTIONS = ("neutral", "happy", "sad", "angry")


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    clips: int = 1_000_000
    """Number of clips of all sets."""
    rows_per_shard: int = 128
    """Largest number of clips in a shard."""
    processes: int = 2
    """CPUs of the Ray cluster."""
    sets: int = 1
    """Number of shard sets."""


def write_corpus(path: Path, clips: int) -> None:
    """Write the files, and a table of their segments: 10,000 rows at a time, to save memory."""
    rng = np.random.default_rng(0)
    for n in range(min(SPEAKERS, clips)):
        noise = rng.normal(0, 0.1, RATE).astype(np.float32)
        soundfile.write(path.parent / f"speaker-{n:04d}.wav", noise, RATE)
    schema = pa.schema(
        dict.fromkeys(("path", "label", "speaker"), pa.string())
        | dict.fromkeys(("start", "end"), pa.float64())
    )
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, clips, 10_000):
            rows = [
                {
                    "path": f"speaker-{n % SPEAKERS:04d}.wav",
                    "label": EMOTIONS[n % len(EMOTIONS)],
                    "speaker": f"speaker-{n % SPEAKERS:04d}",
                    "start": n // SPEAKERS,
                    "end": n // SPEAKERS + 0.9,
                }
                for n in range(first, min(first + 10_000, clips))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def main(bench: Bench) -> None:
    """Prepare the shard sets, and print the measurements."""
    ray.init(
        num_cpus=bench.processes, include_dashboard=False, address="local", log_to_driver=False
    )
    process, started, tenths_shown = psutil.Process(), 0.0, -1

    def show(stage: str) -> None:
        megabytes = process.memory_info().rss >> 20
        print(f"{stage:14} {time.perf_counter() - started:7.1f} s  {megabytes:6d} MB", flush=True)

    size = bench.clips // bench.sets

    def progress(_: str, done: float, __: float) -> None:
        nonlocal tenths_shown
        tenths = 10 * int(done) // size
        if tenths > tenths_shown:
            tenths_shown = tenths
            show(f"{done} rows")

    with tempfile.TemporaryDirectory() as scratch:
        tables = [Path(scratch, f"corpus-{n}", "table.parquet") for n in range(bench.sets)]
        for table in tables:
            table.parent.mkdir()
            write_corpus(table, size)
        started = time.perf_counter()
        show("before")
        locations = [f"{scratch}/set-{n}" for n in range(bench.sets)]
        for table, shards in zip(tables, locations, strict=True):
            tenths_shown = -1
            config = PrepareConfig(
                corpus=str(table), shards=shards, rows_per_shard=bench.rows_per_shard
            )
            prepare(config, progress=progress)
            show("card written")
        show(f"opened {open_corpora(locations).clips().num_rows}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak           {peak:17d} MB")


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
