"""Batch passes on Ray: interrupted, and compared with one prediction after the other."""

import json
import os
import signal
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from ser_ray.cluster.connect import cluster
from ser_ray.errors import ConfigError
from ser_ray.features.conditions import simulate
from ser_ray.features.decode import decode
from ser_ray.grouping import in_groups
from ser_ray.inference import batch
from ser_ray.inference import results as results_module
from ser_ray.inference.batch import predict_many, predict_under
from ser_ray.inference.prediction import Prediction, prediction_row, table_schema
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.results import open_results
from ser_ray.storage.paths import filesystem_of
from tests.clips import voice, write_wav
from tests.models import LABELS, make_checkpoint
from tests.processes import family, stalled_processes, stalling
from tests.s3_server import s3_bucket


@pytest.fixture(scope="module")
def predictor(tmp_path_factory) -> Predictor:
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory)
    return Predictor(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Ten voices, a long one, a silent file, a text file and a file that does not exist."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [
        write_wav(folder / f"{seed}.wav", voice(0.6 + seed / 10, 16_000, seed), 16_000)
        for seed in range(10)
    ]
    paths.append(write_wav(folder / "long.wav", voice(5, 16_000), 16_000))
    paths.append(write_wav(folder / "silent.wav", np.zeros(16_000), 16_000))
    (folder / "text.wav").write_text("no sound")
    return [str(path) for path in (*paths, folder / "text.wav", folder / "missing.wav")]


@pytest.fixture(scope="module")
def ray_on_two_cpus():
    """Start Ray with two CPUs, and a GPU in name only, on which the model runs as on a CPU."""
    import ray

    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, address="local", log_to_driver=False)
    with cluster():
        yield
    ray.shutdown()


def table_of(rows: list[dict]) -> pa.Table:
    return pa.Table.from_pylist(rows, table_schema(LABELS))


def rows_of(predictor: Predictor, files: list[str]) -> list[dict]:
    return table_of([prediction_row(predictor.predict(path)) for path in files]).to_pylist()


def require_close(found: list[dict], expected: list[dict]) -> None:
    """Compare rows; other batches change the last digits of probabilities."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if isinstance(value, list):
                require_close(one[name], value)
            elif isinstance(value, float):
                assert one[name] == pytest.approx(value, abs=1e-5)
            else:
                assert one[name] == value, (other["path"], name)


@pytest.mark.ray
@pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:ray\..*"
)  # Ray warns of settings that it makes itself
def test_an_interrupted_pass_resumes_and_ends_like_one_file_after_the_other(
    ray_on_two_cpus, predictor, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(batch, "FILES_PER_BLOCK", 4)
    monkeypatch.setattr(batch, "has_gpus", lambda: False)
    output = tmp_path / "found.parquet"
    seen: list[int] = []

    def interrupt(_text, done, _total):
        seen.append(done)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_many(files, predictor, str(output), progress=interrupt)
    assert not output.exists()
    Path(f"{output}.partial", f"{predictor.fingerprint}-a.parquet.tmp").write_text("half a part")
    summary = predict_many(files, predictor, str(output), progress=lambda *_: None)
    assert summary.files_before == seen[-1] > 0
    assert summary.counts == {"ok": 11, "unreadable": 2, "silent": 1}
    assert sum(summary.emotions.values()) == 11
    table = pq.read_table(output)
    assert table.schema.equals(table_schema(LABELS))
    require_close(table.to_pylist(), rows_of(predictor, files))
    assert list(tmp_path.iterdir()) == [output]
    for row in table.slice(11).to_pylist():
        assert row["status"] != "ok"
        assert row["reason"]
        assert row["emotion"] is None


@pytest.mark.ray
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_a_file_that_kills_its_decoder_costs_one_row_where_decoders_run_beside_the_model(
    ray_on_two_cpus, predictor, files, tmp_path
):
    """The process that opens the file is killed while it waits."""
    deadly, ended = write_wav(tmp_path / "deadly.wav", voice()), threading.Event()

    def kill_the_reader() -> None:
        while not ended.wait(0.1):
            for pid in stalled_processes():
                os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill_the_reader, daemon=True)
    output = tmp_path / "found.jsonl"
    listed = [*files[:3], str(deadly), *files[3:]]
    with stalling(deadly):
        killer.start()
        summary = predict_many(listed, predictor, str(output), progress=lambda *_: None)
        ended.set()
        killer.join()
    assert summary.counts == {"ok": 11, "unreadable": 3, "silent": 1}
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert rows.pop(3)["reason"] == "decoding it kills the process"
    require_close(rows, rows_of(predictor, files))


@pytest.mark.ray
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
@pytest.mark.parametrize("on_gpus", [False, True])
def test_killed_actors_of_a_fixed_pool_are_replaced(
    ray_on_two_cpus, predictor, files, tmp_path, monkeypatch, on_gpus
):
    """A dead actor that kept its place in the pool would end the pass or let it wait."""
    monkeypatch.setattr(batch, "FILES_PER_BLOCK", 2)
    monkeypatch.setattr(batch, "has_gpus", lambda: on_gpus)
    killed: list[int] = []

    def kill(_text, done, _total):
        if done and not killed:
            for pid, command in family(os.getpid()).items():
                if command.startswith("ray::MapWorker"):
                    killed.append(pid)
                    os.kill(pid, signal.SIGKILL)

    summary = predict_many(files, predictor, str(tmp_path / "found.jsonl"), progress=kill)
    assert summary.counts == {"ok": 11, "unreadable": 2, "silent": 1}
    assert len(killed) >= 2


@pytest.mark.ray
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
@pytest.mark.parametrize("on_gpus", [False, True])
def test_files_are_scored_as_they_would_be_recorded_under_conditions(
    ray_on_two_cpus, predictor, files, monkeypatch, on_gpus
):
    monkeypatch.setattr(batch, "FILES_PER_BLOCK", 4)
    monkeypatch.setattr(batch, "has_gpus", lambda: on_gpus)
    conditions = ["white-20", "level-minus-20"]
    clips = [(path, None, None) for path in files[:-1]] + [(files[10], 1.0, 2.5)]
    tables = list(predict_under(clips, conditions, predictor))
    found = {(row["condition"], row["clip"]): row for row in pa.concat_tables(tables).to_pylist()}
    assert set(found) == {(name, clip) for name in conditions for clip in range(len(clips))}
    for (name, clip), row in found.items():
        if row["status"] != "ok":
            continue
        path, start, end = clips[clip]
        sound, title = decode(path), Path(path).name
        if start is not None:
            sound = sound._replace(samples=sound.samples[16_000:40_000])
            title = f"{title} from 1"
            assert row["duration"] == end - start
        changed = simulate(name, sound, title)
        expected = predictor.predict_samples(changed.samples, changed.sample_rate, path)
        require_close([row], [prediction_row(expected) | {"condition": name, "clip": clip}])
    statuses = Counter(row["status"] for row in found.values())
    assert statuses == {"ok": 24, "unreadable": 2, "silent": 2}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_formats_hold_the_same_rows_in_the_order_of_the_files(predictor, files, tmp_path, suffix):
    output = tmp_path / f"found.{suffix}"
    rows = {path: prediction_row(predictor.predict(path)) for path in files}
    with open_results(str(output), "model", LABELS) as results:
        results.append(table_of([rows[path] for path in reversed(files)]))
        results.finish(files)
    if suffix == "jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
    elif suffix == "csv":
        options = pyarrow.csv.ConvertOptions(
            null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=True
        )
        found = pyarrow.csv.read_csv(output, convert_options=options).to_pylist()
        for row in found:
            row["timeline"] = json.loads(row["timeline"])
    else:
        found = pq.read_table(output).to_pylist()
    require_close(found, rows_of(predictor, files))


def test_an_interrupted_pass_resumes_only_with_answers_of_the_same_model(tmp_path):
    output = str(tmp_path / "found.csv")
    with suppress(KeyboardInterrupt), open_results(output, "one", LABELS) as results:
        results.append(table_of([{"path": "a", "status": "ok"}]))
        raise KeyboardInterrupt
    with open_results(output, "one", LABELS) as results:
        assert results.is_answered("a")
        assert not results.is_answered("b")
    with open_results(output, "other", LABELS) as results:
        assert not results.is_answered("a")


@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_files_of_a_damaged_chunk_are_predicted_again(kept, tmp_path, caplog):
    output = tmp_path / "found.csv"
    for file in "ab":
        with suppress(KeyboardInterrupt), open_results(str(output), "one", LABELS) as results:
            results.append(table_of([{"path": file, "status": "silent"}]))
            raise KeyboardInterrupt
        chunks = set(Path(f"{output}.partial").glob("*.parquet"))
        if file == "a":
            [first] = chunks
    content = first.read_bytes()
    first.write_bytes(content[: int(kept * len(content))])
    with open_results(str(output), "one", LABELS) as results:
        assert caplog.messages == [f"{first} is damaged, so its files are predicted again"]
        assert not results.is_answered("a")
        assert results.is_answered("b")
        results.append(table_of([{"path": "a", "status": "silent"}]))
        assert results.finish(["a", "b"]) == ({"silent": 2}, {})
    assert not Path(f"{output}.partial").exists()


def test_only_one_pass_writes_a_table(tmp_path):
    output = str(tmp_path / "found.csv")
    with (
        open_results(output, "model", LABELS),
        pytest.raises(ConfigError, match=r"is writing .*found\.csv.*choose another --output"),
        open_results(output, "model", LABELS),
    ):
        pass


def test_parts_whose_rows_alternate_in_the_files_order_are_each_read_once(tmp_path, monkeypatch):
    """Two actors alternate: reading a part for every row would take hours."""
    monkeypatch.setattr(results_module, "SECONDS_PER_CHUNK", -1.0)
    output = tmp_path / "found.jsonl"
    files = [f"{number}.wav" for number in range(40)]
    read = []

    def read_table(path, *arguments, **options):
        read.append(path)
        return original(path, *arguments, **options)

    original = pq.read_table
    monkeypatch.setattr(pq, "read_table", read_table)
    with open_results(str(output), "model", LABELS) as results:
        for actor in range(2):
            rows = [{"path": path, "status": "ok", "emotion": "calm"} for path in files[actor::2]]
            results.append(table_of(rows))
        counts = results.finish(files)
    assert counts == ({"ok": 40}, {"calm": 40})
    assert len(read) == len(set(read)) == 2
    assert [json.loads(line)["path"] for line in output.read_text().splitlines()] == files


def test_a_pass_into_a_bucket_resumes_from_the_bucket(in_tmp, monkeypatch):
    with s3_bucket("kept") as uri:
        output = uri.format("tables/found.csv")
        for known in (False, True):
            with open_results(output, "model", LABELS) as results:
                assert results.is_answered("a") is known
                results.append(table_of([{"path": "a", "status": "silent"}]))
        with open_results(output, "model", LABELS) as results:
            assert results.finish(["a"]) == ({"silent": 1}, {})
        filesystem, path = filesystem_of(output)
        assert b"silent" in filesystem.open_input_file(path).read()
        left = filesystem.get_file_info(fs.FileSelector("kept", recursive=True))
        assert [file.path for file in left if file.is_file] == [path]
    assert list(in_tmp.iterdir()) == []


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_scored(
    predictor, files, in_tmp, monkeypatch
):
    monkeypatch.setattr(batch, "require_kept", lambda output: None)
    (in_tmp / "file").touch()
    with s3_bucket("kept") as uri:
        gone = uri.format("table.csv").replace("kept", "no-such-bucket")
        for output in (str(in_tmp / "file" / "table.csv"), gone):
            with pytest.raises(ConfigError, match=r"cannot be written .* choose another folder"):
                predict_many(files, predictor, output)


def test_relative_names_start_at_the_users_folder(predictor, in_tmp, monkeypatch):
    asked: list[str] = []

    def predict(clips, conditions, predictor):
        asked.extend(path for path, _, _ in clips)
        rows = [prediction_row(Prediction(path=path, status="silent")) for path in asked]
        nothing = pa.nulls(len(rows))
        yield table_of(rows).append_column("condition", nothing).append_column("clip", nothing)

    monkeypatch.setattr(batch, "_predict", predict)
    monkeypatch.setattr(batch, "require_kept", lambda output: None)
    monkeypatch.setattr(batch, "require_shared", lambda *places: None)
    predict_many(["a.wav", "s3://bucket/b.wav"], predictor, "table.csv")
    assert asked == [str(in_tmp / "a.wav"), "s3://bucket/b.wav"]


def test_a_group_ends_with_the_recording_that_makes_it_large():
    windows = {"a": 2, "b": 4, "c": 0, "d": 9, "e": 1}
    assert list(in_groups(windows, windows.__getitem__, 5)) == [["a", "b"], ["c", "d"], ["e"]]


def test_an_output_in_an_unknown_format_is_refused(predictor):
    with pytest.raises(ConfigError, match=r"found\.xlsx: it must end in one of \.parquet"):
        predict_many(["a.wav"], predictor, "found.xlsx")


@pytest.mark.ray
@pytest.mark.filterwarnings(
    r"ignore::DeprecationWarning:ray\..*"
)  # Ray warns of settings that it makes itself
def test_files_that_were_unreachable_are_scored_by_the_same_command(
    ray_on_two_cpus, predictor, files, tmp_path, monkeypatch
):
    monkeypatch.setattr(batch, "has_gpus", lambda: False)
    monkeypatch.setattr(batch, "require_shared", lambda *locations: None)
    mounted, output = tmp_path / "mounted", tmp_path / "found.jsonl"
    asked = [files[0], str(mounted / "voice.wav")]
    first = predict_many(asked, predictor, str(output), progress=lambda *_: None)
    assert first.counts == {"ok": 1, "unreachable": 1}
    away = json.loads(output.read_text().splitlines()[1])
    assert (away["status"], away["reason"]) == ("unreachable", "its folder does not exist")

    mounted.mkdir()
    write_wav(mounted / "voice.wav", voice(0.8, 16_000, 3), 16_000)
    second = predict_many(asked, predictor, str(output), progress=lambda *_: None)
    assert second.counts == {"ok": 2}
    assert second.files_before == 1, "only the other file is scored again"
    assert not list(tmp_path.glob("*.partial"))
