"""Parts, plan and reading back in this process; the whole job on Ray is in test_prepare."""

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from ser_ray.corpus.manifest import MANIFEST_SCHEMA, Corpus, list_corpus
from ser_ray.errors import ShardsError
from ser_ray.features.config import KINDS, FeatureConfig, Kind
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.sandbox import Sandbox
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.card import make_card, write_card
from ser_ray.shards.layout import mark_name, outcomes_name, part_key, part_name, read_key
from ser_ray.shards.part import write_part
from ser_ray.shards.plan import (
    describe_changes,
    make_plan,
    read_plan,
    require_same_corpus,
    write_plan,
)
from ser_ray.shards.progress import Progress, Watch, show
from ser_ray.shards.read import ShardSet, open_shards
from tests.clips import clip_names, small_corpus, voice, write_wav

LOCAL = fs.LocalFileSystem()
FEATURES = FeatureConfig(max_seconds=2.0)


def manifest(paths: list[str], size: int = 100) -> pa.Table:
    """Rows to be decoded of which only path and size are known."""
    columns = {"path": paths, "size": [size] * len(paths)}
    nothing = {name: [None] * len(paths) for name in MANIFEST_SCHEMA.names if name not in columns}
    return pa.table(columns | nothing, MANIFEST_SCHEMA)


def write_shards(corpus: Corpus, target: Path, rows_per_part: int = 4) -> ShardSet:
    """What the job does, one part after the other in this process."""
    target.mkdir()
    plan = make_plan(corpus.manifest, FEATURES, rows_per_part, None)
    for part in plan.parts:
        write_part(LOCAL, str(target), part, plan.rows(part), FeatureExtractor(FEATURES))
    write_card(LOCAL, str(target), make_card(LOCAL, str(target), corpus, plan))
    return open_shards(str(target))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return list_corpus(str(small_corpus(tmp_path_factory.mktemp("corpus"))))


@pytest.fixture(scope="module")
def shards(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(corpus, tmp_path_factory.mktemp("shards") / "set")


# --- parts and reading back ---


def test_every_file_has_one_outcome(corpus: Corpus, shards: ShardSet) -> None:
    outcomes = shards.outcomes()
    assert outcomes.drop_columns(["status", "reason"]).equals(
        corpus.manifest.drop_columns(["status", "reason"])
    )
    assert shards.card.counts == {"no_audio": 2, "ok": 22, "unreadable": 1}
    assert shards.card.num_files == len(corpus.manifest)
    assert shards.card.num_clips == len(shards.clips()) == 22


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_is_computed(shards: ShardSet, kind: Kind) -> None:
    stored = shards.features(kind)
    extractor = FeatureExtractor(FEATURES)
    clips = shards.clips().to_pylist()
    assert stored.shape == (len(clips), FEATURES.num_bins(kind), FEATURES.num_frames)
    assert stored.dtype == np.float16
    for row, clip in enumerate(clips):
        samples, sample_rate = decode(clip["path"])
        direct = extractor.features(extractor.waveform(samples, sample_rate))[kind]
        assert clip["num_frames"] == direct.shape[1]
        assert clip["duration"] == len(samples) / sample_rate
        assert clip["sample_rate"] == sample_rate
        np.testing.assert_array_equal(stored[row, :, : direct.shape[1]], direct.astype(np.float16))
        assert not stored[row, :, direct.shape[1] :].any()


@settings(deadline=None)
@given(rows=st.lists(st.integers(0, 21), max_size=30))
def test_any_rows_in_any_order(shards: ShardSet, rows: list[int]) -> None:
    found = shards.features("mfcc", np.array(rows, np.int64))
    np.testing.assert_array_equal(found, shards.features("mfcc")[rows])


def test_a_row_that_is_not_there(shards: ShardSet) -> None:
    with pytest.raises(IndexError, match="22"):
        shards.features("mel", np.array([3, 22]))


def test_reading_one_kind_reads_its_bytes_alone(shards: ShardSet, tmp_path: Path) -> None:
    """The other kinds' bytes are overwritten, and nobody notices."""
    for part in shards.card.parts:
        path = Path(shards.uri) / part_name(part)
        data = bytearray(path.read_bytes())
        group = pq.ParquetFile(path).metadata.row_group(0)
        for column in (group.column(i) for i in range(group.num_columns)):
            if column.path_in_schema in ("spectrogram", "mfcc"):
                start = column.data_page_offset
                data[start : start + column.total_compressed_size] = bytes(
                    column.total_compressed_size
                )
        (tmp_path / path.name).write_bytes(data)
    damaged = dataclasses.replace(shards, uri=str(tmp_path))
    np.testing.assert_array_equal(damaged.features("mel"), shards.features("mel"))
    assert damaged.clips().equals(shards.clips())


def test_equal_sound_has_equal_content(corpus: Corpus, shards: ShardSet, tmp_path: Path) -> None:
    contents = shards.clips()["content"].to_pylist()
    assert contents[0] == contents[1], "both videos have the same sound"
    assert len(set(contents)) == len(contents) - 1
    twin = tmp_path / "twin.wav"
    first = shards.clips().to_pylist()[-1]
    twin.write_bytes(Path(first["path"]).read_bytes() + b"junk" + bytes(6))
    (tmp_path / "set").mkdir()
    write_part(LOCAL, str(tmp_path / "set"), 0, manifest([str(twin)]), FeatureExtractor(FEATURES))
    clip = pq.read_table(tmp_path / "set" / part_name(0), columns=["content"])
    assert clip["content"].to_pylist() == [first["content"]]


def test_parts_are_the_same_bytes_again(corpus: Corpus, shards: ShardSet, tmp_path: Path) -> None:
    again = write_shards(corpus, tmp_path / "again")
    for path in sorted(Path(shards.uri).iterdir()):
        assert path.read_bytes() == (Path(again.uri) / path.name).read_bytes(), path.name


def test_the_fingerprint_is_of_the_data(corpus: Corpus, shards: ShardSet, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(corpus.root, tmp_path / "elsewhere")
    moved = write_shards(list_corpus(str(elsewhere)), tmp_path / "moved", rows_per_part=7)
    assert moved.card.fingerprint == shards.card.fingerprint
    samples = (voice(0.7, seed=99) * 20_000).astype(np.int16)
    write_wav(next(elsewhere.rglob("*.wav")), samples)
    changed = write_shards(list_corpus(str(elsewhere)), tmp_path / "changed")
    assert changed.card.fingerprint != shards.card.fingerprint


def test_a_part_after_a_crash_is_made_in_a_sandbox(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark that nobody took away makes the difference; the bytes are the same."""
    rows, extractor = corpus.manifest.slice(0, 6), FeatureExtractor(FEATURES)
    for name in ("direct", "sandboxed"):
        (tmp_path / name).mkdir()
    write_part(LOCAL, str(tmp_path / "direct"), 0, rows, extractor)
    (tmp_path / "sandboxed" / mark_name(0)).touch()
    monkeypatch.setattr("ser_ray.shards.part.time_limited", None)
    write_part(LOCAL, str(tmp_path / "sandboxed"), 0, rows, extractor)
    for folder in ("direct", "sandboxed"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert names == {part_name(0), outcomes_name(0)}
    for name in names:
        direct, sandboxed = (tmp_path / folder / name for folder in ("direct", "sandboxed"))
        assert direct.read_bytes() == sandboxed.read_bytes()


def test_a_clip_that_stalls_or_kills(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to waits for ever."""
    good = write_wav(tmp_path / "good.wav", voice())
    stuck = tmp_path / "stuck.wav"
    os.mkfifo(stuck)
    with Sandbox(seconds_per_clip=1.0) as sandbox:
        with pytest.raises(ClipError, match="not decoded after 1 s"):
            sandbox.decode(str(stuck), max_seconds=9)
        threading.Timer(0.2, sandbox.process.kill).start()
        with pytest.raises(ClipError, match="kills the process"):
            sandbox.decode(str(stuck), max_seconds=9)
        samples, _ = sandbox.decode(str(good), max_seconds=9)
        sandbox.process.kill()  # between two clips
        sandbox.process.wait()
        again, _ = sandbox.decode(str(good), max_seconds=9)
    np.testing.assert_array_equal(again, samples)
    np.testing.assert_array_equal(samples, decode(str(good))[0])


def test_a_first_attempt_that_stalls_ends_its_process(tmp_path: Path) -> None:
    program = """
import sys
from ser_ray.features.sandbox import time_limited
good, stuck = sys.argv[1:]
with time_limited(0.5) as read:
    read(good, max_seconds=9)
print("left in time", flush=True)
with time_limited(0.5) as read:
    read(good, max_seconds=9)
    read(stuck, max_seconds=9)
"""
    good, stuck = write_wav(tmp_path / "good.wav", voice()), tmp_path / "stuck.wav"
    os.mkfifo(stuck)
    command = [sys.executable, "-c", program, str(good), str(stuck)]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"left in time\n")
    assert b"Timeout" in done.stderr
    assert b"in _decode" in done.stderr or b"in decode" in done.stderr, "it says where it was"


def test_a_full_disk_leaves_nothing_half_written(corpus: Corpus, tmp_path: Path) -> None:
    """A process that may write files of up to 200 kB fails in its second part."""
    program = """
import pickle, resource, sys
from pyarrow import fs
from ser_ray.shards.part import write_part
rows, extractor, folder = pickle.loads(sys.stdin.buffer.read())
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
write_part(fs.LocalFileSystem(), folder, 0, rows.slice(0, 1), extractor)
try:
    write_part(fs.LocalFileSystem(), folder, 1, rows.slice(1), extractor)
except OSError as error:
    print(error)
"""
    # Noise does not compress.
    for number, name in enumerate(clip_names(12)):
        noise = np.random.default_rng(number).normal(0, 0.1, 48_000).astype(np.float32)
        write_wav(tmp_path / "corpus" / f"{name}.wav", noise)
    rows = list_corpus(str(tmp_path / "corpus")).manifest
    target = tmp_path / "shards"
    target.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((rows, FeatureExtractor(FEATURES), str(target))),
        capture_output=True,
        check=True,
    )
    assert b"File too large" in done.stdout, done.stderr
    assert {path.name for path in target.iterdir()} == {part_name(0), outcomes_name(0)}


# --- the plan ---


@settings(deadline=None)
@given(num_files=st.integers(1, 3000), rows_per_part=st.integers(1, 300))
def test_parts_hold_every_file_once(num_files: int, rows_per_part: int) -> None:
    plan = make_plan(
        manifest([f"{n:05d}" for n in range(num_files)]), FEATURES, rows_per_part, None
    )
    sizes = [len(plan.rows(part)) for part in plan.parts]
    assert plan.parts == list(range(len(sizes)))
    assert sum(sizes) == num_files
    assert max(sizes) <= rows_per_part
    assert min(sizes[:-1], default=max(sizes)) == max(sizes)
    paths = [path for part in plan.parts for path in plan.rows(part)["path"].to_pylist()]
    assert paths == sorted(paths)


@settings(deadline=None)
@given(
    old=st.sets(st.integers(0, 60), min_size=1),
    new=st.sets(st.integers(0, 60), min_size=1),
    rows_per_part=st.integers(1, 9),
)
def test_only_what_changed_is_done_again(old: set[int], new: set[int], rows_per_part: int) -> None:
    """Parts that lost no file keep their key, whatever else came or went."""
    before = make_plan(manifest([f"{n:02d}" for n in sorted(old)]), FEATURES, rows_per_part, None)
    after = make_plan(manifest([f"{n:02d}" for n in sorted(new)]), FEATURES, rows_per_part, before)
    assert sorted(after.files["path"].to_pylist()) == [f"{n:02d}" for n in sorted(new)]
    for part in before.parts:
        listed = {int(path) for path in before.rows(part)["path"].to_pylist()}
        if listed <= new:
            assert after.key(part) == before.key(part)
        elif listed & new:
            assert after.key(part) != before.key(part)
        else:
            assert part not in after.parts
    came = [part for part in after.parts if part not in before.parts]
    assert all(part > max(before.parts) for part in came)
    assert sum(len(after.rows(part)) for part in came) == len(new - old)


def test_keys_follow_sizes_and_features() -> None:
    plan = make_plan(manifest(["a", "b"]), FEATURES, 2, None)
    bigger = make_plan(manifest(["a", "b"], size=101), FEATURES, 2, plan)
    other = make_plan(manifest(["a", "b"]), dataclasses.replace(FEATURES, num_mels=96), 2, plan)
    assert len({p.key(part) for p in (plan, bigger, other) for part in p.parts}) == 6


def test_another_corpus_does_not_take_the_place_of_one() -> None:
    before = make_plan(manifest(["a", "b"]), FEATURES, 2, None)
    require_same_corpus(before, make_plan(manifest(["b", "c"]), FEATURES, 2, before), "out")
    with pytest.raises(ShardsError, match=r"^out: holds the shards of another corpus, 2 files "):
        require_same_corpus(before, make_plan(manifest(["c"]), FEATURES, 2, before), "out")


def test_what_changed_is_said() -> None:
    before = make_plan(manifest(["a", "b", "c"]), FEATURES, 2, None)
    features = dataclasses.replace(FEATURES, num_mels=96)
    sizes = [101, 100, 100]
    now = manifest(["b", "c", "d"]).set_column(1, "size", pa.array(sizes, pa.int64()))
    assert describe_changes(before, make_plan(now, features, 2, before)) == [
        "num_mels was 64 and is 96: all features are made again",
        "1 file came since the last run",
        "1 file went since the last run",
        "1 file changed since the last run",
    ]
    assert describe_changes(before, before) == []


def test_a_plan_is_read_as_written(tmp_path: Path) -> None:
    plan = make_plan(manifest(["a", "b", "c"]), FEATURES, 2, None)
    assert read_plan(LOCAL, str(tmp_path)) is None
    write_plan(LOCAL, str(tmp_path), plan)
    found = read_plan(LOCAL, str(tmp_path))
    assert found is not None
    assert found.features == FEATURES
    assert found.files.equals(plan.files)
    assert [found.key(part) for part in found.parts] == [plan.key(part) for part in plan.parts]


# --- opening ---


def test_no_shards(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="there are no shards; make them with `ser-ray prepare`"):
        open_shards(str(tmp_path / "nowhere"))


def test_unfinished_shards(corpus: Corpus, tmp_path: Path) -> None:
    plan = make_plan(corpus.manifest, FEATURES, 4, None)
    write_plan(LOCAL, str(tmp_path), plan)
    with pytest.raises(ShardsError, match="not finished; give the same"):
        open_shards(str(tmp_path))


def test_damaged_shards_are_named_with_the_way_out(corpus: Corpus, tmp_path: Path) -> None:
    shards = write_shards(corpus, tmp_path / "shards")
    first, second, third, fourth, *_ = np.flatnonzero(shards.card.clips).tolist()
    for name in (part_name(first), outcomes_name(second)):
        (tmp_path / "shards" / name).write_bytes(b"")
    path = tmp_path / "shards" / part_name(third)
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # its footer is whole
    path.write_bytes(content)
    for read in (shards.clips, shards.outcomes, lambda: shards.features("mel")):
        with pytest.raises(ShardsError, match=r"part-.*: cannot be read .* delete it, and the sam"):
            read()
    (tmp_path / "shards" / part_name(first)).unlink()
    with pytest.raises(ShardsError, match=r"part-.*: cannot be read"):
        shards.features("mel", np.arange(shards.card.num_clips))
    keys = [read_key(LOCAL, str(tmp_path / "shards"), part) for part in (first, second, fourth)]
    assert [key is None for key in keys] == [True, True, False]


def test_a_file_is_no_folder_of_shards(tmp_path: Path) -> None:
    (tmp_path / "table.csv").touch()
    with pytest.raises(ShardsError, match=r"table.csv: cannot be read"):
        open_shards(str(tmp_path / "table.csv"))


def test_a_part_with_a_file_that_could_not_be_read_is_done_again(
    corpus: Corpus, tmp_path: Path
) -> None:
    rows = corpus.manifest.slice(0, 2)
    gone = str(tmp_path / "gone.wav")
    rows = rows.set_column(0, "path", pa.array([rows["path"][0].as_py(), gone]))
    result = write_part(LOCAL, str(tmp_path), 0, rows, FeatureExtractor(FEATURES))
    assert result.counts == {"ok": 1, "unreadable": 1}
    assert read_key(LOCAL, str(tmp_path), 0) is None
    shutil.copy(corpus.manifest["path"][1].as_py(), gone)
    assert write_part(LOCAL, str(tmp_path), 0, rows, FeatureExtractor(FEATURES)).counts == {"ok": 2}
    assert read_key(LOCAL, str(tmp_path), 0) == part_key(rows, FEATURES)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"schema_version": 99}', "version 99"), ("{}", "not the card"), ("{", "not the card")],
)
def test_a_card_that_does_not_fit(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ShardsError, match=message):
        open_shards(str(tmp_path))


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "plan.parquet").write_text("not a table")
    with pytest.raises(ShardsError, match="no plan that this version reads"):
        read_plan(LOCAL, str(tmp_path))


# --- watching ---


def test_progress_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten files a second once the first part, at whose return the clock starts, is there."""
    clock = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("ser_ray.shards.progress.time.monotonic", lambda: next(clock))
    watch = Watch(total=100, committed=30)
    first = watch.add({"ok": 8, "unreadable": 2})
    assert (first.done, first.errors, first.seconds_left) == (40, 2, None)
    watch.add({"ok": 20})
    last = watch.add({"ok": 10, "no_audio": 5, "silent": 1, "duplicate": 3, "excluded": 1})
    assert (last.done, last.total, last.errors, last.rate) == (80, 100, 3, 10.0)
    assert last.seconds_left == 2.0
    assert str(last) == "80 of 100 files, 3 errors, 10 files/s, 0:02 left"


def test_a_log_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000, 1100))
    monkeypatch.setattr("ser_ray.shards.progress.time.monotonic", lambda: next(clock))
    with show(None) as report:
        for done in range(1, 26):
            report(Progress(done, 25, 0, 1.0))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of")[0] for line in lines] == ["1", "11", "21", "25"]


def test_a_terminal_gets_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with show(None) as report:
        report(Progress(25, 25, 1, 9.0))
    text = capsys.readouterr().err
    assert "━━━" in text
    assert "25 of 25 files, 1 errors" in text
