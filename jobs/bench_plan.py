"""Measures the time and the driver's memory that `prepare` needs for a long list of clips.

`python jobs/bench.py plan --clips 1000000` prints the time and the driver's memory at the first
shard, every tenth of the way and at the end: listing and planning come before the first shard, the
card after the last. With `--sets 4` the clips are four corpora, which are then opened as one. The
clips are segments of 1000 files of one second each. All but the first segment of a file are beyond
its end, so hardly anything is decoded: every row goes through the job and gets an outcome. The
figures say nothing about the time to list a bucket, or about the decoding itself (`bench.py
prepare`).
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
"""In hertz."""
EMOTIONS = ("neutral", "happy", "sad", "angry")


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    clips: int = 1_000_000
    rows_per_part: int = 128
    processes: int = 2
    sets: int = 1


def write_corpus(path: Path, clips: int) -> None:
    """Write a table of segments, in pieces, to save memory, and their files."""
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
    """Prepare the table, and print the measurements."""
    ray.init(
        num_cpus=bench.processes, include_dashboard=False, address="local", log_to_driver=False
    )
    process, started, shown = psutil.Process(), 0.0, -1

    def say(what: str) -> None:
        used = process.memory_info().rss >> 20
        print(f"{what:14} {time.perf_counter() - started:7.1f} s  {used:6d} MB", flush=True)

    size = bench.clips // bench.sets

    def progress(_: str, done: float, __: float) -> None:
        nonlocal shown
        tenth = 10 * int(done) // size
        if tenth > shown:
            shown = tenth
            say(f"{done} rows")

    with tempfile.TemporaryDirectory() as scratch:
        tables = [Path(scratch, f"corpus-{n}", "table.parquet") for n in range(bench.sets)]
        for table in tables:
            table.parent.mkdir()
            write_corpus(table, size)
        started = time.perf_counter()
        say("before")
        locations = [f"{scratch}/set-{n}" for n in range(bench.sets)]
        for table, shards in zip(tables, locations, strict=True):
            shown = -1
            config = PrepareConfig(
                corpus=str(table), shards=shards, rows_per_part=bench.rows_per_part
            )
            prepare(config, progress=progress)
            say("with its card")
        say(f"opened {open_corpora(locations).clips().num_rows}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak           {peak:17d} MB")


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
