"""The time and memory that a long list of clips costs the driver of `prepare`.

`python jobs/bench.py plan --clips 1000000` prints the time and the driver's memory at the first
part, every tenth of the way and at the end: listing and planning come before the first part, the
card after the last. The listed files do not exist, so nothing is decoded: every row goes through
the job and comes out as unreadable. The figures say nothing about the time to list a bucket, or
about the decoding itself (`bench.py prepare`).
"""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import tyro

from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.prepare import prepare
from ser_ray.shards.progress import Progress

SPEAKERS = 1000
EMOTIONS = ("neutral", "happy", "sad", "angry")


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    clips: int = 1_000_000
    rows_per_part: int = 128
    processes: int = 2


def write_table(bench: Bench, path: Path) -> None:
    """Write a table of clips that do not exist, in pieces, to save memory."""
    schema = pa.schema(dict.fromkeys(("path", "label", "speaker"), pa.string()))
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, bench.clips, 10_000):
            rows = [
                {
                    "path": f"clips/speaker-{n % SPEAKERS:04d}/utterance-{n:09d}.flac",
                    "label": EMOTIONS[n % len(EMOTIONS)],
                    "speaker": f"speaker-{n % SPEAKERS:04d}",
                }
                for n in range(first, min(first + 10_000, bench.clips))
            ]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def main(bench: Bench) -> None:
    """Measure and print."""
    ray.init(
        num_cpus=bench.processes, include_dashboard=False, address="local", log_to_driver=False
    )
    process, started, shown = psutil.Process(), 0.0, -1

    def say(what: str) -> None:
        used = process.memory_info().rss >> 20
        print(f"{what:14} {time.perf_counter() - started:7.1f} s  {used:6d} MB", flush=True)

    def progress(now: Progress) -> None:
        nonlocal shown
        tenth = 10 * now.done // bench.clips
        if tenth > shown:
            shown = tenth
            say(f"{now.done} rows")

    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch, "table.parquet")
        write_table(bench, table)
        started = time.perf_counter()
        say("before")
        config = PrepareConfig(
            corpus=str(table), shards=f"{scratch}/shards", rows_per_part=bench.rows_per_part
        )
        prepare(config, progress=progress)
        say("with its card")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak           {peak:17d} MB")


if __name__ == "__main__":
    main(tyro.cli(Bench, config=(tyro.conf.OmitArgPrefixes,)))
