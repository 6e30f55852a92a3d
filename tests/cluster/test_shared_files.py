"""Files that other nodes cannot see, and outputs that Ray would delete."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ser_ray.cluster import shared_files
from ser_ray.cluster.connect import JOB_CONFIG
from ser_ray.cluster.shared_files import one_of_each_folder, require_kept
from ser_ray.errors import ResourcesError
from ser_ray.inference import batch
from ser_ray.shards import prepare
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.read import open_shards
from ser_ray.storage.paths import absolute
from tests.clips import voice, write_wav


def test_one_file_of_every_folder_is_checked_up_to_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [f"/{folder}/{name}.wav" for name in "ab" for folder in range(9)]
    assert one_of_each_folder([]) == []
    assert one_of_each_folder([*files, "s3://bucket/a.wav"]) == files[:9]
    assert one_of_each_folder(["/packed/a.parquet#audio=000000007"]) == ["/packed/a.parquet"]
    monkeypatch.setattr(shared_files, "MAX_FOLDERS", 4)
    assert one_of_each_folder(files) == [files[0], files[3], files[6]]


def test_two_threads_may_check_one_folder(tmp_path: Path) -> None:
    with shared_files._marker_in(tmp_path) as one:
        with shared_files._marker_in(tmp_path) as other:
            assert one.exists()
            assert other.exists()
        assert one.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that other machines do not see, so that `require_shared` refuses what is in it."""
    own = tmp_path / "own"

    def refuse(*locations: str) -> None:
        for location in locations:
            if Path(location).is_relative_to(own):
                raise ResourcesError(f"{location}: is on this machine")

    for module in (prepare, batch):
        monkeypatch.setattr(module, "require_shared", refuse)
    monkeypatch.setattr(batch, "require_kept", lambda location: None)
    monkeypatch.setattr(prepare, "cluster", contextlib.nullcontext)
    return own


def some_clips(*folders: Path) -> list[str]:
    for folder in folders:
        folder.mkdir()
    sound = voice(0.6, 16_000)
    return [str(write_wav(folder / "a.wav", sound, 16_000)) for folder in folders]


def test_clips_that_only_this_machine_has_are_refused_even_if_their_table_is_shared(
    refused: Path, tmp_path: Path
) -> None:
    table, shards = tmp_path / "table.csv", tmp_path / "shards"
    clips = some_clips(tmp_path / "shared", refused)
    rows = [f"{clip},joy,{speaker}" for speaker, clip in enumerate(clips)]
    table.write_text("\n".join(["path,label,speaker", *rows]))
    with pytest.raises(ResourcesError, match=clips[1]):
        prepare.prepare(PrepareConfig(corpus=str(table), shards=str(shards)))
    assert not list(shards.rglob("*.parquet"))


def test_files_to_score_that_only_this_machine_has_are_refused_even_if_the_first_is_shared(
    refused: Path, tmp_path: Path
) -> None:
    clips = some_clips(tmp_path / "shared", refused)
    predictor: Any = SimpleNamespace(fingerprint="a model", labels=("calm",))
    with pytest.raises(ResourcesError, match=clips[1]):
        batch.predict_many(clips, predictor, str(tmp_path / "found.csv"))


def test_a_store_inside_the_code_copy_of_a_job_is_refused(in_tmp, monkeypatch):
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}
    monkeypatch.setenv(JOB_CONFIG, json.dumps(job))
    for inside in ("sqlite:///out/mlflow.db", f"sqlite:///{in_tmp}/mlflow.db", "out"):
        with pytest.raises(ResourcesError, match="is inside the copy of the code"):
            require_kept(inside)
    for kept in (f"sqlite:///{in_tmp.parent}/mlflow.db", "http://host:5000", "s3://bucket/runs"):
        require_kept(kept)


def test_in_a_job_a_relative_path_is_refused_before_shards_are_missed(in_tmp, monkeypatch):
    monkeypatch.setenv(JOB_CONFIG, json.dumps({"runtime_env": {"working_dir": "gcs://code.zip"}}))
    with pytest.raises(ResourcesError, match="shards is inside the copy of the code"):
        open_shards(absolute("shards"))
    with pytest.raises(ResourcesError, match="shards is inside the copy of the code"):
        prepare.prepare(PrepareConfig(corpus="/nowhere", shards="shards"))
    assert list(in_tmp.iterdir()) == []
