"""The complete job on Ray: interrupted in any way, it writes the same bytes as uninterrupted."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from ser_ray.errors import CorpusError, ShardsError
from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.progress import Report
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.layout import CARD_NAME, CLIPS, OUTCOMES, clips_name, outcomes_name
from ser_ray.shards.prepare import PrepareSummary, prepare
from ser_ray.shards.read import open_shards
from ser_ray.storage.lock import LOCK_NAME, FolderLock
from tests.clips import clip_names, six_speakers, small_corpus, voice, write_sound, write_wav
from tests.processes import has_ended, wait_for
from tests.s3_server import s3_bucket

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),  # of its own settings
]
FEATURES = FeatureConfig(max_seconds=2.0)
FEW = 2
"""Rows of a shard: the corpus of 25 files makes 13 shards, of which the last holds one."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_bucket("clips") as uri:
        yield uri


@pytest.fixture(scope="module")
def ray_cluster(bucket: str) -> Iterator[None]:
    """Two CPUs whose workers inherit the bucket's credentials."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, address="local", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_corpus(tmp_path_factory.mktemp("corpus"))


def run(
    corpus: Path | str,
    target: Path | str,
    features: FeatureConfig = FEATURES,
    progress: Report | None = lambda *_: None,
) -> PrepareSummary:
    config = PrepareConfig(
        corpus=str(corpus), shards=str(target), rows_per_shard=FEW, features=features
    )
    return prepare(config, progress=progress)


@pytest.fixture(scope="module")
def uninterrupted(
    ray_cluster: None, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The shards of an uninterrupted run."""
    target = tmp_path_factory.mktemp("uninterrupted") / "shards"
    run(corpus, target)
    return target


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file of a shard set, by its path in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def written(folder: Path) -> dict[str, int]:
    """When every file of a shard set was written, by its path in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in found}


def committed_shards(folder: Path) -> list[str]:
    """The paths of all outcomes in a shard set."""
    return [path.relative_to(folder).as_posix() for path in folder.glob(f"{OUTCOMES}/*.parquet")]


def test_a_corpus_becomes_a_shard_set(ray_cluster: None, corpus: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, float, float]] = []
    summary = run(corpus, tmp_path / "shards", progress=lambda *now: seen.append(now))
    assert summary.card.counts == {"no_audio": 2, "ok": 22, "unreadable": 1}
    assert summary.files_done == 25
    assert "25 files: 2 no_audio, 22 ok, 1 unreadable" in str(summary)
    assert [total for _, _, total in seen] == [25] * len(seen)
    assert sorted(done for _, done, _ in seen) == [done for _, done, _ in seen]
    text, done, _ = seen[-1]
    assert (text, done) == ("25 of 25 files, 1 errors", 25)
    shards = open_shards(str(tmp_path / "shards"))
    assert len(shards.clips()) == 22
    for kind in KINDS:
        assert len(shards.features(kind)) == 22
    outcomes = {Path(row["path"]).name: row["status"] for row in shards.outcomes().to_pylist()}
    assert len(outcomes) == 25
    assert outcomes[f"{clip_names(21)[-1]}.wav"] == "unreadable"
    files = [name(number) for number in range(13) for name in (clips_name, outcomes_name)]
    assert set(files_of(tmp_path / "shards")) == {CARD_NAME, *files}, "no lock, no temporary file"


def test_ray_data_reads_the_clips_of_a_set_and_one_part_of_a_fold(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray.data

    target = tmp_path / "shards"
    run(six_speakers(tmp_path / "corpus"), target)
    shards = open_shards(str(target))
    clips, features = shards.clips().to_pandas(), shards.features("mel")
    for part in ("train", "validation", "test"):
        rows = shards.rows_of("speaker-3", 1, part)
        dataset = shards.ray_dataset("mel", protocol="speaker-3", fold=1, part=part)
        found = dataset.take_batch(99)
        order = np.argsort(found["path"])  # the rows come in the order in which the tasks end
        wanted = rows[np.argsort(clips["path"][rows].to_numpy())]
        assert found["path"][order].tolist() == clips["path"][wanted].to_list()
        np.testing.assert_array_equal(found["mel"][order], features[wanted])
    everything = ray.data.read_parquet(str(target / CLIPS)).take_batch(99)
    assert sorted(everything["path"]) == sorted(clips["path"])
    assert shards.to_array("mel", everything["mel"]).shape == features.shape


def test_a_second_run_does_nothing(
    uninterrupted: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(uninterrupted)
    summary = run(corpus, uninterrupted, progress=None)
    assert capsys.readouterr().err == "25 of 25 files are prepared already\n"
    assert summary.files_done == 0
    assert summary.notes == ("25 of 25 files are prepared already",)
    assert written(uninterrupted) == before


def test_a_run_that_was_stopped_by_hand_resumes(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    import ray

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "shards"
    with pytest.raises(KeyboardInterrupt):
        run(corpus, target, progress=stop)
    assert not (target / LOCK_NAME).exists()
    # A shard that was being written when the run stopped may still be committed.
    idle = ray.cluster_resources()["CPU"]
    wait_for("the end of its tasks", lambda: ray.available_resources().get("CPU") == idle)
    with pytest.raises(ShardsError, match="not finished"):
        open_shards(str(target))
    committed = committed_shards(target)
    before = written(target)
    summary = run(corpus, target)
    assert committed
    assert summary.files_done == 25 - sum(len(pq.read_table(target / name)) for name in committed)
    assert all(written(target)[name] == before[name] for name in committed)
    assert files_of(target) == files_of(uninterrupted)


def test_a_run_whose_driver_was_killed_resumes(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    """Its cluster dies with it, and the next run takes over the lock that it leaves."""
    target = tmp_path / "shards"
    program = """
import sys
import ray
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.prepare import prepare
ray.init(num_cpus=1, include_dashboard=False, address="local", log_to_driver=False)
corpus, shards, rows_per_shard, max_seconds = sys.argv[1:]
features = FeatureConfig(max_seconds=float(max_seconds))
prepare(
    PrepareConfig(
        corpus=corpus, shards=shards, rows_per_shard=int(rows_per_shard), features=features
    )
)
"""
    arguments = [str(corpus), str(target), str(FEW), str(FEATURES.max_seconds)]
    driver = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL
    )
    try:
        while len(committed := committed_shards(target)) < 2:
            assert driver.poll() is None, "the driver ended before it could be killed"
            time.sleep(0.002)
    finally:
        processes = psutil.Process(driver.pid).children(recursive=True)
        # Ray's agents write no shards, and notice only after a minute that their node is gone.
        cluster = [process for process in processes if not process.name().endswith("Agent")]
        driver.kill()
        driver.wait()
    assert (target / LOCK_NAME).exists()
    assert len(committed) < 13
    wait_for("the end of the killed driver's cluster", lambda: all(map(has_ended, cluster)))
    summary = run(corpus, target)
    assert 0 < summary.files_done < 25
    assert files_of(target) == files_of(uninterrupted)


def test_a_run_survives_killed_workers(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    import ray

    present = tmp_path / "present"
    present.mkdir()

    @ray.remote
    def worker() -> int:
        (present / str(os.getpid())).touch()
        while len(list(present.iterdir())) < 2:  # so that no process does both tasks
            time.sleep(0.01)
        return os.getpid()

    workers = set(ray.get([worker.remote() for _ in range(2)]))

    def kill_one(*_: object) -> None:
        if workers:
            os.kill(workers.pop(), signal.SIGKILL)
            # A worker that is killed while it writes leaves such a file.
            (target / f"{clips_name(3)}.0badc0de.tmp").touch()

    target = tmp_path / "shards"
    summary = run(corpus, target, progress=kill_one)
    assert not workers, "both workers were killed, one after the other"
    assert summary.files_done == 25
    assert files_of(target) == files_of(uninterrupted)


def test_only_what_changed_is_done(
    uninterrupted: Path, ray_cluster: None, corpus: Path, tmp_path: Path
) -> None:
    here = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    target = tmp_path / "shards"
    run(here, target)
    before = written(target)
    names = [f"{name}.wav" for name in clip_names(26)]
    for name in names[21:]:
        write_wav(here / name, voice(seed=1))
    write_wav(here / "Actor_01" / names[0], voice(0.9, seed=2))
    (here / "Actor_01" / names[19]).unlink()
    summary = run(here, target)
    assert summary.notes == (
        "5 files have no outcome yet",
        "1 file is no longer listed",
        "1 file has changed",
        "22 of 29 files are prepared already",
    )
    after = written(target)
    same = {name for name in after if after[name] == before.get(name)}
    assert len([name for name in same if name.startswith(OUTCOMES)]) == 11
    assert summary.files_done == 7
    shards = open_shards(str(target))
    assert shards.card.num_files == 29
    paths = {Path(path).name for path in shards.outcomes()["path"].to_pylist()}
    assert set(names[21:]) <= paths
    assert names[19] not in paths


def test_lost_or_damaged_shards_are_written_again(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(uninterrupted, tmp_path / "shards"))
    (target / clips_name(3)).unlink()
    (target / outcomes_name(5)).write_bytes(b"PAR1 half a file")
    (target / f"{clips_name(7)}.0badc0de.tmp").touch()
    (target / "mine.tmp").touch()
    summary = run(corpus, target)
    assert summary.notes[-1] == "21 of 25 files are prepared already"
    (target / "mine.tmp").unlink()
    assert files_of(target) == files_of(uninterrupted)


def test_other_settings_compute_all_features_again(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(uninterrupted, tmp_path / "shards"))
    features = dataclasses.replace(FEATURES, num_mels=96, num_mfcc=13)
    summary = run(corpus, target, features)
    assert summary.notes == (
        "num_mels was 64 and is 96: all features are computed again",
        "num_mfcc was 40 and is 13: all features are computed again",
        "0 of 25 files are prepared already",
    )
    assert summary.files_done == 25
    assert open_shards(str(target)).features("mel").shape[1] == 96
    run(corpus, target)
    assert files_of(target) == files_of(uninterrupted), "and back again"


def test_files_that_are_not_included_are_counted(
    ray_cluster: None, corpus: Path, tmp_path: Path
) -> None:
    config = PrepareConfig(
        corpus=str(corpus), shards=str(tmp_path), include=("av",), features=FEATURES
    )
    counts = prepare(config, progress=lambda *_: None).card.counts
    assert counts == {"excluded": 23, "ok": 2}


def test_a_second_run_at_the_same_time_is_refused(uninterrupted: Path, corpus: Path) -> None:
    before = files_of(uninterrupted)
    lock = FolderLock(str(uninterrupted), ShardsError, activity="", advice="")
    with lock, pytest.raises(ShardsError, match=f"process {os.getpid()} .* is writing these"):
        run(corpus, uninterrupted)
    assert files_of(uninterrupted) == before


def test_a_full_disk_is_reported_and_the_next_run_resumes(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    """A folder at the path of a shard makes writing the shard fail, as a full disk does."""
    target = tmp_path / "shards"
    (target / clips_name(4)).mkdir(parents=True)
    with pytest.raises(ShardsError, match=r"clips/shard-00004.parquet: .*give the same"):
        run(corpus, target)
    assert not (target / outcomes_name(4)).exists()
    (target / clips_name(4)).rmdir()
    run(corpus, target)
    assert files_of(target) == files_of(uninterrupted)


@pytest.mark.parametrize("name", ["shard-00000.parquet", "mine.wav"])
def test_files_of_other_programs_are_kept(corpus: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / CLIPS).mkdir()
    (tmp_path / CLIPS / name).write_text("mine")
    with pytest.raises(ShardsError, match=rf"holds clips/{name}, which is not part.*another fol"):
        run(corpus, tmp_path)
    assert (tmp_path / CLIPS / name).read_text() == "mine"


def test_a_foreign_file_among_the_clips_is_kept(
    uninterrupted: Path, corpus: Path, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(uninterrupted, tmp_path / "shards"))
    (target / CLIPS / "mine.wav").write_text("mine")
    with pytest.raises(ShardsError, match=r"holds clips/mine.wav, which is not part of a shard"):
        run(corpus, target)


def test_a_corpus_without_one_clip_is_an_error(ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("path,label,speaker\ntext.wav,joy,x\n")
    (tmp_path / "text.wav").write_text("no sound")
    with pytest.raises(CorpusError, match=r"none of its 1 files became a clip; .*text.wav is unre"):
        run(tmp_path / "table.csv", tmp_path / "shards")


def test_a_table_of_clips_in_any_format_becomes_a_shard_set(
    ray_cluster: None, tmp_path: Path
) -> None:
    """Its labels are its own, and its paths are relative to it."""
    formats = {
        "a.mp3": ("libmp3lame", "mp3"),
        "b.flac": ("flac", "flac"),
        "c.ogg": ("libopus", "ogg"),
        "d.m4a": ("aac", "mp4"),
        "e.webm": ("libopus", "webm"),
        "f.wav": ("pcm_s16le", "wav"),
    }
    lines = ["path,label,speaker"]
    for number, (name, (codec, container)) in enumerate(formats.items()):
        write_sound(tmp_path / "clips" / name, voice(), codec, container)
        lines.append(f"clips/{name},{'joy' if number % 2 else 'fear'},speaker {number}")
    (tmp_path / "table.csv").write_text("\n".join([*lines, "clips/gone.wav,joy,x"]))
    summary = run(tmp_path / "table.csv", tmp_path / "shards")
    assert summary.card.counts == {"ok": 6, "unreadable": 1}
    assert summary.card.labels == ("fear", "joy")
    clips = open_shards(str(tmp_path / "shards")).clips()
    assert clips["emotion"].to_pylist() == ["fear", "joy"] * 3
    assert clips["num_frames"].to_pylist() == pytest.approx([41] * 6, abs=2)


def test_from_a_bucket_to_a_bucket(uninterrupted: Path, corpus: Path, bucket: str) -> None:
    import pyarrow.fs

    from ser_ray.storage.paths import filesystem_of

    filesystem, folder = filesystem_of(bucket.format("corpus"))
    pyarrow.fs.copy_files(str(corpus), folder, destination_filesystem=filesystem)
    summary = run(bucket.format("corpus"), bucket.format("shards"))
    local, remote = open_shards(str(uninterrupted)), open_shards(bucket.format("shards"))
    assert summary.card.counts == local.card.counts
    assert remote.card.fingerprint == local.card.fingerprint
    for kind in KINDS:
        np.testing.assert_array_equal(remote.features(kind), local.features(kind))
    assert run(bucket.format("corpus"), bucket.format("shards")).files_done == 0
