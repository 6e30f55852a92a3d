"""Shards, plan and reading back without Ray; `test_prepare` tests the complete job."""

import dataclasses
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.corpus.manifest import MANIFEST_SCHEMA, Corpus, list_corpus
from ser_ray.corpus.mistakes import find_mistakes
from ser_ray.corpus.splits import one_clip_per_take
from ser_ray.errors import ConfigError, CorpusError, ShardsError
from ser_ray.features.config import KINDS, FeatureConfig, Kind
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import Sound
from ser_ray.features.sandbox import Sandbox
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.progress import count_files
from ser_ray.shards.card import make_card, write_card
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.digest import same_bytes
from ser_ray.shards.layout import CLIPS, OUTCOMES, clips_name, outcomes_name
from ser_ray.shards.plan import (
    CommittedShard,
    Plan,
    describe_changes,
    make_plan,
    read_committed,
    require_same_corpus,
    restore_times,
    shard_key,
    update_times,
)
from ser_ray.shards.prepare import prepare
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.shards.write import write_shard
from tests.clips import clip_names, six_speakers, small_corpus, voice, write_wav
from tests.processes import stalling

FEATURES = FeatureConfig(max_seconds=2.0)


def segments_of(files: Iterable[int], counts: Mapping[int, int]) -> pa.Table:
    """Rows to decode: the given number of segments of each file."""
    times = [(f"{file:03d}", number) for file in files for number in range(counts.get(file, 1))]
    table = manifest([path for path, _ in times])
    columns = {
        "start": [float(start) for _, start in times],
        "end": [start + 1.0 for _, start in times],
    }
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return table


def manifest(paths: list[str], size: int = 100) -> pa.Table:
    """Rows to decode, with only path and size."""
    columns = {"path": paths, "size": [size] * len(paths)}
    nothing = {name: [None] * len(paths) for name in MANIFEST_SCHEMA.names if name not in columns}
    return pa.table(columns | nothing, MANIFEST_SCHEMA)


def set_folder(folder: Path) -> Path:
    """The folders of an empty shard set."""
    for name in (CLIPS, OUTCOMES):
        (folder / name).mkdir(parents=True)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by its path in it."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def write_shards(corpus: Corpus, target: Path, rows_per_shard: int = 4) -> ShardSet:
    """Write a shard set as the job does, one shard after the other in this process."""
    set_folder(target)
    plan = make_plan(corpus.manifest, FEATURES, rows_per_shard, {})
    for number, rows in plan.pending.items():
        write_shard(str(target), number, rows, FeatureExtractor(FEATURES))
    write_card(str(target), make_card(str(target), corpus, FEATURES, plan.shard_numbers))
    return open_shards(str(target))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return list_corpus(str(small_corpus(tmp_path_factory.mktemp("corpus"))))


@pytest.fixture(scope="module")
def shards(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return write_shards(corpus, tmp_path_factory.mktemp("shards") / "set")


# --- shards and reading back ---


def test_every_file_has_one_outcome(corpus: Corpus, shards: ShardSet) -> None:
    outcomes = shards.outcomes()
    assert outcomes.drop_columns(["digest", "status", "reason", "encoders"]).equals(
        corpus.manifest.drop_columns(["status", "reason"])
    )
    assert shards.card.counts == {"no_audio": 2, "ok": 22, "unreadable": 1}
    assert shards.card.num_files == len(corpus.manifest)
    assert shards.card.num_rows == len(shards.clips()) == 22


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_that_are_read_are_those_that_were_computed(
    shards: ShardSet, kind: Kind
) -> None:
    stored = shards.features(kind)
    extractor = FeatureExtractor(FEATURES)
    clips = shards.clips().to_pylist()
    assert stored.shape == (len(clips), FEATURES.num_bins(kind), FEATURES.num_frames)
    assert stored.dtype == np.float16
    for row, clip in enumerate(clips):
        samples, sample_rate, _ = decode(clip["path"])
        direct = extractor.features(extractor.waveform(samples, sample_rate))[kind]
        assert clip["num_frames"] == direct.shape[1]
        assert clip["duration"] == len(samples) / sample_rate
        assert clip["sample_rate"] == sample_rate
        np.testing.assert_array_equal(stored[row, :, : direct.shape[1]], direct.astype(np.float16))
        assert not stored[row, :, direct.shape[1] :].any()


@pytest.fixture(scope="module")
def mfcc(shards: ShardSet) -> np.ndarray:
    return shards.features("mfcc")


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.integers(0, 21), max_size=30))
def test_any_rows_can_be_read_in_any_order(
    shards: ShardSet, mfcc: np.ndarray, rows: list[int]
) -> None:
    found = shards.features("mfcc", np.array(rows, np.int64))
    np.testing.assert_array_equal(found, mfcc[rows])


def test_a_row_out_of_range_is_an_index_error(shards: ShardSet) -> None:
    with pytest.raises(IndexError, match="22"):
        shards.features("mel", np.array([3, 22]))


def test_reading_one_kind_reads_only_its_bytes(shards: ShardSet, tmp_path: Path) -> None:
    """The same features are read after the bytes of the other kinds were overwritten."""
    set_folder(tmp_path)
    for number in shards.card.shard_numbers:
        path = Path(shards.uri) / clips_name(number)
        data = bytearray(path.read_bytes())
        group = pq.ParquetFile(path).metadata.row_group(0)
        for column in (group.column(i) for i in range(group.num_columns)):
            if column.path_in_schema in ("spectrogram", "mfcc"):
                start = column.data_page_offset
                data[start : start + column.total_compressed_size] = bytes(
                    column.total_compressed_size
                )
        (tmp_path / clips_name(number)).write_bytes(data)
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
    set_folder(tmp_path / "set")
    write_shard(str(tmp_path / "set"), 0, manifest([str(twin)]), FeatureExtractor(FEATURES))
    clip = pq.read_table(tmp_path / "set" / clips_name(0), columns=["content"])
    assert clip["content"].to_pylist() == [first["content"]]


def test_parts_have_the_same_bytes_when_written_again(
    corpus: Corpus, shards: ShardSet, tmp_path: Path
) -> None:
    again = write_shards(corpus, tmp_path / "again")
    assert files_of(Path(again.uri)) == files_of(Path(shards.uri))


def test_the_fingerprint_depends_on_the_clips_and_not_on_their_location(
    corpus: Corpus, shards: ShardSet, tmp_path: Path
) -> None:
    elsewhere = shutil.copytree(corpus.root, tmp_path / "elsewhere")
    moved = write_shards(list_corpus(str(elsewhere)), tmp_path / "moved", rows_per_shard=7)
    assert moved.card.fingerprint == shards.card.fingerprint
    samples = (voice(0.7, seed=99) * 20_000).astype(np.int16)
    write_wav(next(elsewhere.rglob("*.wav")), samples)
    changed = write_shards(list_corpus(str(elsewhere)), tmp_path / "changed")
    assert changed.card.fingerprint != shards.card.fingerprint


def test_a_clip_that_hangs_or_kills_the_process_is_unreadable(tmp_path: Path) -> None:
    good = write_wav(tmp_path / "good.wav", voice())
    stuck = write_wav(tmp_path / "stuck.wav", voice())
    with stalling(stuck), Sandbox(seconds_per_clip=1.0) as sandbox:
        with pytest.raises(ClipError, match="not decoded after 1 s"):
            sandbox.decode(str(stuck), max_seconds=9)
        threading.Timer(0.2, sandbox.process.kill).start()
        with pytest.raises(ClipError, match="kills the process"):
            sandbox.decode(str(stuck), max_seconds=9)
        samples, *_ = sandbox.decode(str(good), max_seconds=9)
        sandbox.process.kill()  # between two clips
        sandbox.process.wait()
        again, *_ = sandbox.decode(str(good), max_seconds=9)
    np.testing.assert_array_equal(again, samples)
    np.testing.assert_array_equal(samples, decode(str(good))[0])


def test_a_full_disk_leaves_nothing_half_written(corpus: Corpus, tmp_path: Path) -> None:
    """A process that may write files of up to 200 kB fails in its second shard."""
    program = """
import pickle, resource, sys
from ser_ray.shards.write import write_shard
rows, extractor, folder = pickle.loads(sys.stdin.buffer.read())
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
write_shard(folder, 0, rows.slice(0, 1), extractor)
try:
    write_shard(folder, 1, rows.slice(1), extractor)
except OSError as error:
    print(error)
"""
    # Noise does not compress.
    for number, name in enumerate(clip_names(12)):
        noise = np.random.default_rng(number).normal(0, 0.1, 48_000).astype(np.float32)
        write_wav(tmp_path / "corpus" / f"{name}.wav", noise)
    rows = list_corpus(str(tmp_path / "corpus")).manifest
    target = set_folder(tmp_path / "shards")
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps((rows, FeatureExtractor(FEATURES), str(target))),
        capture_output=True,
        check=True,
    )
    assert b"File too large" in done.stdout, done.stderr
    assert set(files_of(target)) == {clips_name(0), outcomes_name(0)}


# --- the plan ---


def numbered(numbers: Iterable[int]) -> pa.Table:
    return manifest([f"{number:05d}" for number in sorted(numbers)])


def paths_of(rows: pa.Table) -> list[str]:
    return rows["path"].to_pylist()


def committed_by(
    plan: Plan, features: FeatureConfig, numbers: Iterable[int]
) -> dict[int, CommittedShard]:
    """Return what `read_committed` would return after some shards of a plan were written."""
    return {
        number: CommittedShard(
            plan.pending[number].drop_columns(["status", "reason"]),
            shard_key(plan.pending[number], features),
            features,
        )
        for number in numbers
    }


@settings(deadline=None)
@given(num_files=st.integers(1, 3000), rows_per_shard=st.integers(1, 300))
def test_parts_hold_every_file_once(num_files: int, rows_per_shard: int) -> None:
    plan = make_plan(numbered(range(num_files)), FEATURES, rows_per_shard, {})
    sizes = [len(rows) for rows in plan.pending.values()]
    assert plan.shard_numbers == list(plan.pending) == list(range(len(sizes)))
    assert sum(sizes) == plan.num_pending == plan.num_files == num_files
    assert max(sizes) <= rows_per_shard
    assert min(sizes[:-1], default=max(sizes)) == max(sizes)
    paths = [path for rows in plan.pending.values() for path in paths_of(rows)]
    assert paths == sorted(paths)


@settings(deadline=None)
@given(data=st.data(), num_files=st.integers(1, 200), rows_per_shard=st.integers(1, 9))
def test_an_interrupted_run_continues_with_the_shards_it_would_have_written(
    data: st.DataObject, num_files: int, rows_per_shard: int
) -> None:
    listed = numbered(range(num_files))
    first = make_plan(listed, FEATURES, rows_per_shard, {})
    written = data.draw(st.sets(st.sampled_from(first.shard_numbers)))
    second = make_plan(
        listed, FEATURES, rows_per_shard, committed_by(first, FEATURES, sorted(written))
    )
    assert second.kept == sorted(written)
    assert second.shard_numbers == first.shard_numbers
    assert all(rows.equals(first.pending[number]) for number, rows in second.pending.items())


@settings(deadline=None)
@given(
    old=st.sets(st.integers(0, 60), min_size=1),
    new=st.sets(st.integers(0, 60), min_size=1),
    rows_per_shard=st.integers(1, 9),
)
def test_only_shards_that_lost_a_file_are_written_again(
    old: set[int], new: set[int], rows_per_shard: int
) -> None:
    """Files of other shards may be added and removed."""
    before = make_plan(numbered(old), FEATURES, rows_per_shard, {})
    committed = committed_by(before, FEATURES, before.shard_numbers)
    after = make_plan(numbered(new), FEATURES, rows_per_shard, committed)
    listed = set(paths_of(numbered(new)))
    complete = [number for number, rows in before.pending.items() if set(paths_of(rows)) <= listed]
    assert after.kept == complete
    assert not set(after.kept) & set(after.pending)
    kept = [path for number in after.kept for path in paths_of(before.pending[number])]
    pending = [path for rows in after.pending.values() for path in paths_of(rows)]
    assert sorted([*kept, *pending]) == sorted(listed)
    assert all(len(rows) <= rows_per_shard for rows in after.pending.values())


@settings(deadline=None)
@given(
    counts=st.dictionaries(st.integers(0, 30), st.integers(1, 30)),
    rows_per_shard=st.integers(1, 12),
)
def test_a_file_is_in_one_shard_with_all_its_segments(
    counts: dict[int, int], rows_per_shard: int
) -> None:
    listed = segments_of(range(31), counts)
    plan = make_plan(listed, FEATURES, rows_per_shard, {})
    assert pa.concat_tables(plan.pending.values()).equals(listed)
    assert all(len(rows) <= rows_per_shard for rows in plan.pending.values())
    num_shards = Counter(path for rows in plan.pending.values() for path in {*paths_of(rows)})
    for file in range(31):
        assert num_shards[f"{file:03d}"] == -(-counts.get(file, 1) // rows_per_shard)
    committed = committed_by(plan, FEATURES, plan.shard_numbers[::2])
    again = make_plan(listed, FEATURES, rows_per_shard, committed)
    assert (again.kept, again.shard_numbers) == (plan.shard_numbers[::2], plan.shard_numbers)
    assert all(rows.equals(plan.pending[number]) for number, rows in again.pending.items())


def test_a_shard_is_kept_only_for_the_same_rows_and_features() -> None:
    listed, other = manifest(["a", "b"]), dataclasses.replace(FEATURES, num_mels=96)
    plan = make_plan(listed, FEATURES, 2, {})
    committed = committed_by(plan, FEATURES, plan.shard_numbers)
    excluded = listed.set_column(
        listed.column_names.index("status"), "status", pa.array(["excluded", None])
    )
    assert make_plan(listed, FEATURES, 2, committed).kept == [0, 1]
    assert make_plan(excluded, FEATURES, 2, committed).kept == [1]
    assert make_plan(manifest(["a", "b"], size=101), FEATURES, 2, committed).kept == []
    assert make_plan(listed, other, 2, committed).kept == []
    unfinished = {0: dataclasses.replace(committed[0], key=""), 1: committed[1]}
    assert make_plan(listed, FEATURES, 2, unfinished).kept == [1]


def test_the_shards_of_another_corpus_are_not_replaced() -> None:
    plan = make_plan(manifest(["a", "b"]), FEATURES, 2, {})
    committed = committed_by(plan, FEATURES, plan.shard_numbers)
    require_same_corpus(committed, manifest(["b", "c"]), "out")
    require_same_corpus({}, manifest(["c"]), "out")
    with pytest.raises(ShardsError, match=r"^out: holds the shards of 2 files "):
        require_same_corpus(committed, manifest(["c"]), "out")


def test_changes_since_the_last_run_are_described() -> None:
    before = make_plan(manifest(["a", "b", "c", "e"]), FEATURES, 1, {})
    committed = committed_by(before, FEATURES, before.shard_numbers)
    features = dataclasses.replace(FEATURES, num_mels=96)
    sizes = [101, 100, 100, 100]
    now = manifest(["b", "c", "d", "f"]).set_column(1, "size", pa.array(sizes, pa.int64()))
    plan = make_plan(now, features, 1, committed)
    assert describe_changes(committed, features, plan) == (
        "num_mels was 64 and is 96: all features are computed again",
        "2 files have no outcome yet",
        "2 files are no longer listed",
        "1 file has changed",
        "0 of 4 files are prepared already",
    )
    same = manifest(["a", "b", "c", "e"])
    plan = make_plan(same, FEATURES, 1, committed)
    assert describe_changes(committed, FEATURES, plan) == ("4 of 4 files are prepared already",)
    assert describe_changes({}, FEATURES, plan) == ()


def test_what_is_committed_is_read_back(corpus: Corpus, shards: ShardSet) -> None:
    committed = read_committed(shards.uri)
    assert tuple(committed) == shards.card.shard_numbers
    assert {shard.features for shard in committed.values()} == {FEATURES}
    files = pa.concat_tables(shard.files for shard in committed.values())
    assert files.drop_columns("digest").equals(corpus.manifest.drop_columns(["status", "reason"]))
    assert make_plan(corpus.manifest, FEATURES, 4, committed).pending == {}


def test_a_file_has_changed_if_its_bytes_have_and_not_its_time(tmp_path: Path) -> None:
    """All times change, and the bytes of one file do; sizes stay."""
    names = [f"{name}.wav" for name in clip_names(4)]
    for number, name in enumerate(names):
        samples = (voice(0.6, seed=number) * 20_000).astype(np.int16)
        write_wav(tmp_path / "corpus" / name, samples)
    shards = write_shards(list_corpus(str(tmp_path / "corpus")), tmp_path / "shards", 1)
    replaced = tmp_path / "corpus" / names[2]
    write_wav(replaced, (voice(0.6, seed=9) * 20_000).astype(np.int16))
    for path in (tmp_path / "corpus").iterdir():
        os.utime(path, ns=(1, 1))
    listed = list_corpus(str(tmp_path / "corpus")).manifest
    committed = read_committed(shards.uri)
    restored = restore_times(listed, committed)
    plan = make_plan(restored, FEATURES, 1, committed)
    assert [path for rows in plan.pending.values() for path in paths_of(rows)] == [str(replaced)]
    assert "1 file has changed" in describe_changes(committed, FEATURES, plan)
    kept = {number: committed[number] for number in plan.kept}
    update_times(shards.uri, listed, restored, kept)
    again = read_committed(shards.uri)
    assert make_plan(listed, FEATURES, 1, again).kept == plan.kept, "no bytes are compared again"


def test_copies_with_different_sound_are_conflicts(tmp_path: Path) -> None:
    name, other = (f"{name}.wav" for name in clip_names(2))
    samples = (voice(0.6) * 20_000).astype(np.int16)
    for place, sound in {"": samples, "a/": samples[::-1], "a/b/": samples}.items():
        write_wav(tmp_path / f"{place}{name}", sound)
        write_wav(tmp_path / f"{place}{other}", samples)
    tagged = (tmp_path / "a" / other).read_bytes() + b"LIST" + bytes([4, 0, 0, 0]) + b"INFO"
    (tmp_path / "a" / other).write_bytes(tagged)  # other bytes, the same sound
    shards = write_shards(list_corpus(str(tmp_path)), tmp_path.parent / "conflict-shards")
    assert shards.card.counts == {"conflict": 1, "duplicate": 3, "ok": 2}
    rows = {row["path"]: row for row in shards.outcomes().to_pylist()}
    found = rows[str(tmp_path / "a" / name)]
    kept = tmp_path / name
    assert found["status"] == "conflict"
    assert found["reason"] == (
        f"differs in sound from {kept}, which has the same file name and is used"
    )
    assert find_mistakes(shards.outcomes()) == [f"{found['path']} {found['reason']}"]


def test_a_copy_that_cannot_be_read_is_an_outcome_and_the_others_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{name}.wav" for name in clip_names(2)]
    samples = (voice(0.6) * 20_000).astype(np.int16)
    for place, sound in {"": samples, "a/": samples[::-1]}.items():
        for name in names:
            write_wav(tmp_path / f"{place}{name}", sound)
    locked, other = (str(tmp_path / "a" / name) for name in names)

    def same(one: str, other: str) -> bool:
        if locked in (one, other):
            raise PermissionError(13, "Permission denied", locked)
        return same_bytes(one, other)

    monkeypatch.setattr("ser_ray.shards.write.same_bytes", same)
    shards = write_shards(list_corpus(str(tmp_path)), tmp_path.parent / "locked-shards")
    rows = {row["path"]: row for row in shards.outcomes().to_pylist()}
    assert shards.card.counts == {"conflict": 1, "ok": 2, "unreadable": 1}
    assert rows[other]["status"] == "conflict"
    assert (rows[locked]["status"], rows[locked]["reason"]) == (
        "unreadable", f"cannot be compared with {tmp_path / names[0]}: Permission denied",
    )  # fmt: skip


def test_segments_are_clips_and_their_file_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment equals a file that was cut; one beyond the end of its file is an outcome."""
    samples = (voice(3.0) * 20_000).astype(np.int16)
    write_wav(tmp_path / "long.wav", samples)
    write_wav(tmp_path / "cut.wav", samples[24_000:72_000])
    times = {
        "": None,
        "0.5,1.5": None,
        "2.5,3.2": "0.20 s of the segment are after the end of the file",
    }
    beyond = "the segment is from 2.50 s to 9.00 s, and the file ends at 3.00 s"
    lines = [f"long.wav,{given or ','},x,1" for given in [*times, "2.5,9", "4,"]]
    header = "file,start,end,emotion,speaker"
    (tmp_path / "t.csv").write_text("\n".join([header, *lines, "cut.wav,,,x,2"]))
    decoded: list[str] = []

    def count(path: str, *, max_seconds: float) -> Sound:
        decoded.append(Path(path).name)
        return decode(path, max_seconds=max_seconds)

    own = SimpleNamespace(decode=count)
    monkeypatch.setattr("ser_ray.shards.write.sandbox", lambda: own)
    corpus = list_corpus(str(tmp_path / "t.csv"))
    shards = write_shards(corpus, tmp_path / "shards", 16)
    assert sorted(decoded) == ["cut.wav", "long.wav"]
    found = {(row["start"], row["end"]): row for row in shards.outcomes().to_pylist()[1:]}
    assert found[2.5, 9.0]["status"] == found[4.0, None]["status"] == "beyond_end"
    assert found[2.5, 9.0]["reason"] == beyond
    assert found[2.5, 3.2]["reason"] == times["2.5,3.2"]
    assert shards.card.counts == {"beyond_end": 2, "ok": 4}
    assert len({row["digest"] for row in found.values()}) == 1
    table = shards.clips().to_pylist()
    place = {(Path(row["path"]).name, row["start"]): n for n, row in enumerate(table)}
    rows = np.array([place["cut.wav", None], place["long.wav", 0.5]])
    whole, segment = shards.clips().take(rows).to_pylist()
    assert segment["content"] == whole["content"]
    assert segment["duration"] == 1.0
    both = shards.features("mel", rows)
    np.testing.assert_array_equal(both[0], both[1])


def test_a_long_clip_becomes_windows_that_count_once(tmp_path: Path) -> None:
    """Windows of equal length cover the sound from end to end; one without sound is left out."""
    samples = (voice(5.0) * 20_000).astype(np.int16)
    write_wav(tmp_path / "long.wav", samples)
    write_wav(tmp_path / "short.wav", samples[:48_000])
    pause = np.zeros(3 * 48_000, np.int16)
    write_wav(tmp_path / "pause.wav", np.concatenate([samples[:60_000], pause, samples[:60_000]]))
    names = ["long", "pause", "short"]
    rows = [f"{name}.wav,x,{name}" for name in names]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,speaker", *rows]))
    shards = write_shards(list_corpus(str(tmp_path / "t.csv")), tmp_path / "shards")
    assert shards.card.counts == {"ok": 3}
    assert shards.card.num_rows == 6
    clips = shards.clips()
    assert clips["speaker"].to_pylist() == ["long"] * 3 + ["pause"] * 2 + ["short"]
    assert clips["window"].to_pylist() == [0, 1, 2, 0, 1, 0]
    assert len(set(clips["take"].to_pylist())) == len(set(clips["content"].to_pylist())) == 3
    assert clips["duration"].to_pylist()[:3] == [5.0] * 3
    thirds = [samples[n * 80_000 : (n + 1) * 80_000] for n in range(3)]
    extract = FeatureExtractor(FEATURES)
    for row, third in enumerate(thirds):
        alone = extract.features(extract.waveform(third, 48_000))["mel"]
        stored = shards.features("mel", np.array([row]))[0, :, : alone.shape[1]]
        assert clips["num_frames"][row].as_py() == alone.shape[1]
        np.testing.assert_allclose(stored, alone, atol=0.1)
    assert list(one_clip_per_take(clips)) == [0, 3, 5]


def test_files_that_a_table_names_and_that_do_not_exist_are_listed(tmp_path: Path) -> None:
    """Before Ray starts: if all are missing, or a folder of some, which may not be mounted."""
    write_wav(tmp_path / "clips" / "0.wav", voice(0.6))
    config = PrepareConfig(corpus=str(tmp_path / "t.csv"), shards=str(tmp_path / "shards"))
    for names in (["gone.wav", "clips/1.wav"], ["clips/0.wav", "disk/1.wav"]):
        rows = "".join(f"{name},x,1,0,1\n{name},x,1,1,2\n" for name in names)
        (tmp_path / "t.csv").write_text(f"path,label,speaker,start,end\n{rows}")
        lost = [str(tmp_path / name) for name in names if name != "clips/0.wav"]
        with pytest.raises(CorpusError, match=f"{len(lost)} of 2 files do not exist: ") as caught:
            prepare(config)
        assert all(path in str(caught.value) for path in lost)
        assert "at the nearest of the four folders above it that has one" in str(caught.value)
        listing = tmp_path / "shards" / "missing.csv"
        assert str(listing) in str(caught.value)
        assert sorted(pandas.read_csv(listing)["path"]) == sorted(lost)


# --- opening ---


def test_a_folder_without_shards_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ShardsError, match="there are no shards; make them with `ser-ray prepare`"):
        open_shards(str(tmp_path / "nowhere"))
    made = tmp_path / "synthetic-shards" / "card.json"
    made.parent.mkdir()
    made.write_text("{}")
    with pytest.raises(ShardsError, match=f"`ser-ray prepare`, or use {made.parent}$"):
        open_shards(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("nosuch://a/b", "no filesystem opens this location"),
        ("s3://user:hidden@a/b", "must not have a password"),
    ],
)
def test_a_location_that_cannot_be_opened_is_not_called_damaged(location: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        open_shards(location)
    assert "delete it" not in str(raised.value)
    assert "hidden" not in str(raised.value)


def test_unfinished_shards_are_an_error(tmp_path: Path) -> None:
    set_folder(tmp_path)
    with pytest.raises(ShardsError, match="not finished; give the same"):
        open_shards(str(tmp_path))


def test_damaged_shards_are_named_with_the_way_out(corpus: Corpus, tmp_path: Path) -> None:
    shards = write_shards(corpus, tmp_path / "shards")
    first, second, third, fourth, *_ = np.flatnonzero(shards.card.shard_sizes).tolist()
    for name in (clips_name(first), outcomes_name(second)):
        (tmp_path / "shards" / name).write_bytes(b"")
    path = tmp_path / "shards" / clips_name(third)
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)  # its footer is intact
    path.write_bytes(content)
    for read in (shards.clips, shards.outcomes, lambda: shards.features("mel")):
        with pytest.raises(ShardsError, match=r"shard-.*: cannot be read .* delete it and run"):
            read()
    with pytest.raises(OSError, match=rf"{clips_name(third)} is damaged .*, so delete it"):
        make_card(str(tmp_path / "shards"), corpus, FEATURES, [third])
    (tmp_path / "shards" / clips_name(first)).unlink()
    with pytest.raises(ShardsError, match=r"shard-.*: cannot be read"):
        shards.features("mel", np.arange(shards.card.num_rows))
    committed = read_committed(str(tmp_path / "shards"))
    assert [number in committed for number in (first, second, fourth)] == [False, False, True]


def test_a_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "table.csv").touch()
    with pytest.raises(ShardsError, match=r"table.csv: cannot be read"):
        open_shards(str(tmp_path / "table.csv"))


def test_a_shard_with_a_file_that_could_not_be_read_is_done_again(
    corpus: Corpus, tmp_path: Path
) -> None:
    rows = corpus.manifest.slice(0, 2)
    gone = str(tmp_path / "gone.wav")
    rows = rows.set_column(0, "path", pa.array([rows["path"][0].as_py(), gone]))
    set_folder(tmp_path / "set")
    for counts, kept in (({"ok": 1, "unreadable": 1}, []), ({"ok": 2}, [0])):
        written = write_shard(str(tmp_path / "set"), 0, rows, FeatureExtractor(FEATURES))
        assert written == counts
        committed = read_committed(str(tmp_path / "set"))
        assert make_plan(rows, FEATURES, 2, committed).kept == kept
        shutil.copy(corpus.manifest["path"][1].as_py(), gone)


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"schema_version": 99}', "version 99"), ("{}", "not the card"), ("{", "not the card")],
)
def test_a_card_of_another_version_or_a_damaged_one_is_an_error(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(ShardsError, match=message):
        open_shards(str(tmp_path))


# --- other readers ---


def test_other_libraries_see_clips_and_nothing_else(corpus: Corpus, tmp_path: Path) -> None:
    shards = write_shards(corpus, tmp_path / "shards")
    folder = f"{shards.uri}/{CLIPS}"
    for table in (pa.dataset.dataset(folder).to_table(), pq.read_table(folder)):
        assert table.drop_columns(list(KINDS)).equals(shards.clips())
    frame = pandas.read_parquet(folder)
    assert frame["path"].to_list() == shards.clips()["path"].to_pylist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_feature_column_of_any_library_becomes_an_array(shards: ShardSet, kind: Kind) -> None:
    table = pa.dataset.dataset(f"{shards.uri}/{CLIPS}").to_table(columns=[kind])
    series = pandas.read_parquet(f"{shards.uri}/{CLIPS}", columns=[kind])[kind]
    expected = shards.features(kind)
    plain = table[kind].cast(pa.large_binary())
    for column in (table[kind], plain, series, series.to_numpy(), series.to_list()):
        np.testing.assert_array_equal(shards.to_array(kind, column), expected)
    np.testing.assert_array_equal(shards.to_array(kind, table[kind][3:7]), expected[3:7])
    for nothing in (table[kind][:0], series[:0]):
        assert shards.to_array(kind, nothing).shape == (0, *expected.shape[1:])


def test_a_part_of_a_fold_is_a_torch_dataset(tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    shards = write_shards(list_corpus(str(six_speakers(tmp_path / "c"))), tmp_path / "shards")
    clips = shards.clips().to_pandas()
    features, seen = shards.features("mel"), []
    for part in ("train", "validation", "test"):
        rows = shards.rows_of("speaker-3", 1, part)
        dataset = shards.torch_dataset("mel", protocol="speaker-3", fold=1, part=part)
        feature, label, num_frames = next(iter(DataLoader(dataset, batch_size=99)))
        np.testing.assert_array_equal(feature.numpy(), features[rows])
        assert [shards.card.labels[i] for i in label] == clips["emotion"][rows].to_list()
        assert num_frames.tolist() == clips["num_frames"][rows].to_list()
        seen.append(set(clips["speaker"][rows]))
    assert [len(speakers) for speakers in seen] == [3, 1, 2]
    assert len(set.union(*seen)) == 6, "no speaker is in two parts"


# --- watching ---


def test_progress_adds_up() -> None:
    seen: list[tuple[str, float, float]] = []
    with count_files(100, 30, lambda *now: seen.append(now)) as add:
        add({"ok": 8, "unreadable": 2})
        add({"ok": 30, "no_audio": 5, "silent": 1, "duplicate": 3, "excluded": 1})
    assert seen == [
        ("40 of 100 files, 2 errors", 40, 100),
        ("80 of 100 files, 3 errors", 80, 100),
    ]
