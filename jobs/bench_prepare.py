"""Measures how fast `prepare` is, in comparison with simpler programs on the same clips.

`python jobs/bench.py prepare --corpus DIR` prints a table of

- job: `prepare` on Ray Data, including the start of Ray on this machine;
- pool: a ProcessPoolExecutor that writes the same shards with as many processes;
- loop: the functions of `prepare` for each clip in one process, without writing shards. It also
  prints the time of each function;
- chain: soundfile, torchaudio's Resample, Spectrogram, MelScale and a DCT, in one process;
- notebook: librosa.load and three librosa features, in one process.

Each way runs in a new Python process, and its time includes the start of Python. The rate counts
the files after the first shard (or clip), so the start changes only the seconds to the first one.
The table also shows how many further processes ran when the first shard was done. Files on a
network are not measured.
"""

import itertools
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from ser_ray.corpus.manifest import list_corpus
from ser_ray.features.config import FeatureConfig

CONFIG = FeatureConfig()
Mark = Callable[[int], None]
"""Called with the number of files that have just been processed."""


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    corpus: str
    """Folder of the clips."""
    files: int = 0
    """If not 0, prepare this number of links to the clips instead of the clips."""
    processes: int = os.cpu_count() or 1
    """Number of processes of the pool. Ray starts one for each CPU."""
    sample: int = 200
    """Approximate number of clips for the ways with one process."""
    rounds: int = 3
    """Number of measurements of each way. The ways take turns, and the table shows the medians."""
    ways: tuple[str, ...] = ("job", "pool", "loop", "chain", "notebook")
    """The ways to compare."""


@dataclass(frozen=True)
class Timing:
    """A measurement of one way."""

    files: int
    """Number of files."""
    first: float
    """Seconds to the first shard or clip."""
    total: float
    """Seconds for all files."""
    rate: float
    """Files per second after the first shard or clip."""
    megabytes: float
    """Peak memory of the largest process."""
    processes: int
    """Number of further processes when the first shard was done."""


def job(bench: Bench, corpus: str, shards: str, mark: Mark) -> int:
    """Prepare as users do; return the peak memory of the workers in kilobytes."""
    import ray

    from ser_ray.cluster.connect import cluster
    from ser_ray.shards.config import PrepareConfig
    from ser_ray.shards.prepare import prepare

    num_done = 0

    def progress(_: str, done: float, __: float) -> None:
        nonlocal num_done
        mark(int(done) - num_done)
        num_done = int(done)

    def peak() -> int:  # not `_peak_memory`, because Ray's workers cannot import this module
        time.sleep(0.05)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with cluster():
        prepare(PrepareConfig(corpus=corpus, shards=shards), progress=progress)
        peaks = [ray.remote(peak).remote() for _ in range(4 * bench.processes)]
        return int(max(ray.get(peaks)))


def pool(bench: Bench, corpus: str, shards: str, mark: Mark) -> int:
    """Write the same shards without Ray; return the peak memory of the workers in kilobytes."""
    from ser_ray.features.transforms import FeatureExtractor
    from ser_ray.shards.layout import CLIPS, OUTCOMES
    from ser_ray.shards.plan import make_plan
    from ser_ray.shards.write import write_shard

    plan = make_plan(list_corpus(corpus).manifest, CONFIG, 128, {})
    for name in (CLIPS, OUTCOMES):
        Path(shards, name).mkdir()
    extractor = FeatureExtractor(CONFIG)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(bench.processes, mp_context=context) as executor:
        writes = [
            executor.submit(write_shard, shards, number, rows, extractor)
            for number, rows in plan.pending.items()
        ]
        for write in as_completed(writes):
            mark(sum(write.result().values()))
        peaks = [executor.submit(_peak_memory) for _ in range(4 * bench.processes)]
        return max(peak.result() for peak in peaks)


def loop(bench: Bench, corpus: str, shards: str, mark: Mark) -> int:
    """Decode each clip and compute its features."""
    from ser_ray.features.decode import decode
    from ser_ray.features.transforms import FeatureExtractor

    extractor = FeatureExtractor(CONFIG)
    stages = {"decode": 0.0, "waveform": 0.0, "features": 0.0}
    paths = _sample(bench, corpus)
    for path in paths:
        times = [time.perf_counter()]
        samples, sample_rate, _ = decode(path)
        times.append(time.perf_counter())
        waveform = extractor.waveform(samples, sample_rate)
        times.append(time.perf_counter())
        extractor.features(waveform)
        times.append(time.perf_counter())
        for stage, (began, ended) in zip(stages, itertools.pairwise(times), strict=True):
            stages[stage] += (ended - began) / len(paths)
        mark(1)
    shown = ", ".join(f"{stage} {seconds * 1000:.2f}" for stage, seconds in stages.items())
    print(f"milliseconds a clip in the loop: {shown}", flush=True)
    return _peak_memory()


def chain(bench: Bench, corpus: str, shards: str, mark: Mark) -> int:
    """Compute the features with the functions of soundfile and torchaudio."""
    import soundfile
    import torch
    from torchaudio.functional import create_dct
    from torchaudio.transforms import MelScale, Resample, Spectrogram

    torch.set_num_threads(1)
    resample = Resample(48_000, CONFIG.sample_rate)
    spectrogram = Spectrogram(CONFIG.window_length, hop_length=CONFIG.hop_length)
    bins, rate = CONFIG.num_bins("spectrogram"), CONFIG.sample_rate
    mel = MelScale(CONFIG.num_mels, rate, CONFIG.f_min, rate / 2, bins)
    cosines = create_dct(CONFIG.num_mfcc, CONFIG.num_mels, "ortho")
    for path in _sample(bench, corpus):
        samples, _ = soundfile.read(path, dtype="float32", always_2d=True)
        power = spectrogram(resample(torch.from_numpy(samples.mean(axis=1))))
        decibels = [10 * torch.log10(p.clamp(min=1e-10)) for p in (power, mel(power))]
        _ = cosines.T @ decibels[1]
        mark(1)
    return _peak_memory()


def notebook(bench: Bench, corpus: str, shards: str, mark: Mark) -> int:
    """Compute each feature from the samples with librosa, as notebooks do."""
    import librosa

    rate, length, hop = CONFIG.sample_rate, CONFIG.window_length, CONFIG.hop_length
    mels, coefficients = CONFIG.num_mels, CONFIG.num_mfcc
    for path in _sample(bench, corpus):
        samples, _ = librosa.load(path, sr=rate)
        librosa.amplitude_to_db(abs(librosa.stft(samples, n_fft=length, hop_length=hop)))
        librosa.power_to_db(
            librosa.feature.melspectrogram(
                y=samples, sr=rate, n_fft=length, hop_length=hop, n_mels=mels
            )
        )
        librosa.feature.mfcc(y=samples, sr=rate, n_fft=length, hop_length=hop, n_mfcc=coefficients)
        mark(1)
    return _peak_memory()


WAYS = {"job": job, "pool": pool, "loop": loop, "chain": chain, "notebook": notebook}


def _sample(bench: Bench, corpus: str) -> list[str]:
    paths = list_corpus(corpus).manifest["path"].to_pylist()
    return paths[:: max(1, len(paths) // bench.sample)]


def _peak_memory() -> int:
    """Return the peak memory of this process in kilobytes."""
    time.sleep(0.05)  # so that each worker runs at least one of these calls
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(way: str, bench: Bench, corpus: str, started: float) -> Timing:
    """Measure one way in this new process. `started` is the time at which it was requested."""
    marks: list[tuple[float, int]] = []
    children: list[psutil.Process] = []

    def mark(count: int) -> None:
        marks.append((time.time() - started, count))
        if len(marks) == 1:
            children.extend(psutil.Process().children(recursive=True))

    with tempfile.TemporaryDirectory() as shards:
        worker_peak = WAYS[way](bench, corpus, shards, mark)
        total = time.time() - started
    files = sum(count for _, count in marks)
    (first, first_files), (last, _) = marks[0], marks[-1]
    megabytes = max(worker_peak, _peak_memory()) / 1024
    rate = (files - first_files) / (last - first)
    return Timing(files, first, total, rate, megabytes, len(children))


def make_links(corpus: str, files: int, folder: Path) -> str:
    """Make a corpus of links to the clips of another corpus, and return the path of its table."""
    rows = list_corpus(corpus).manifest.to_pylist()
    lines = ["path,label,speaker"]
    for number in range(files):
        row = rows[number % len(rows)]
        link = folder / f"{number:06d}{Path(row['path']).suffix}"
        link.symlink_to(row["path"])
        lines.append(f"{link},{row['emotion']},{row['speaker']}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return str(folder / "table.csv")


def main() -> None:
    """Measure all ways, and print the medians."""
    bench = tyro.cli(Bench, description=__doc__)
    timings: dict[str, list[Timing]] = {way: [] for way in bench.ways}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as links:
        corpus = bench.corpus
        if bench.files:
            corpus = make_links(bench.corpus, bench.files, Path(links))
        for _ in range(bench.rounds):
            for way in bench.ways:
                with ProcessPoolExecutor(1, mp_context=context) as fresh:
                    run = fresh.submit(measure, way, bench, corpus, time.time())
                    timings[way].append(run.result())
    heads = ("files", "files/s", "first, s", "total, s", "peak, MB", "processes")
    print(f"{'':10}" + "".join(f"{head:>10}" for head in heads))
    for way, runs in timings.items():
        rate, first, total, peak, processes = (
            statistics.median(getattr(run, name) for run in runs)
            for name in ("rate", "first", "total", "megabytes", "processes")
        )
        times = f"{rate:10.0f}{first:10.1f}{total:10.1f}"
        print(f"{way:10}{runs[0].files:10}{times}{peak:10.0f}{processes:10.0f}")
    if {"job", "pool"} <= timings.keys():
        ratio = statistics.median(run.total for run in timings["job"]) / statistics.median(
            run.total for run in timings["pool"]
        )
        print(f"job / pool: {ratio:.1f} of the time")


if __name__ == "__main__":
    main()
