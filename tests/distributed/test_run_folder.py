"""A run's folder without Ray: from which checkpoint it resumes, what it keeps, what it refuses."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from pyarrow import fs

from ser_ray.distributed import mlflow_run
from ser_ray.distributed.mlflow_run import start_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RAY_LIST, RECORD, RunFolder
from ser_ray.errors import CheckpointError, LockLostError
from ser_ray.features.config import FeatureConfig
from ser_ray.shards.read import open_shards
from ser_ray.storage.lock import FolderLock
from ser_ray.tracking.run_metadata import NOTE, run_tags
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.checkpoint import (
    MODEL,
    PROGRESS,
    SELECTED,
    STATE,
    Progress,
    Snapshot,
    checkpoint_name,
)
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import Normalisation
from ser_ray.training.recipe import TrainConfig
from tests.mlflow_store import new_store
from tests.shard_files import write_shard_files

NUM_BINS = FeatureConfig().num_bins(TrainConfig().feature)
CARD = CheckpointCard(
    labels=("happy", "sad"),
    config=TrainConfig(),
    features=FeatureConfig(),
    normalisation=Normalisation(np.zeros(NUM_BINS), np.ones(NUM_BINS)),
    corpus="table",
    shards_fingerprint="f00d",
    split={"label": "speaker-3, fold 0"},
    initial_weights="fresh weights",
)


def snapshot(epoch: int, selected: int, step: int = 0) -> Snapshot:
    progress = asdict(
        Progress(
            epoch=epoch,
            step=step,
            learning_rates=[0.1] * (10 * epoch + step),
            selected={"epoch": float(selected)} if selected else {},
            history=[{"epoch": number + 1.0} for number in range(epoch)],
            times_ms=list(range(epoch)),
        )
    )
    weights = {"w": torch.full((3,), float(epoch))}
    return Snapshot(CARD, weights, {"moment": torch.ones(3)}, progress)


def folder_of(storage: str, *snapshots: Snapshot) -> RunFolder:
    folder = RunFolder(storage, "run")
    for item in snapshots:
        item.store(folder.filesystem, f"{folder.path}/{item.name}")
    return folder


def names(folder: RunFolder) -> set[str]:
    found = folder.filesystem.get_file_info(fs.FileSelector(folder.path))
    return {entry.base_name for entry in found if entry.base_name.startswith("checkpoint-")}


def test_a_folder_that_cannot_be_made_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (RunFolder(str(tmp_path / "file"), "run"), RunFolder(str(tmp_path), "n" * 300)):
        with pytest.raises(CheckpointError, match=r"lock\.json: cannot be .*choose another folder"):
            folder.lock().__enter__()


def test_a_run_of_a_notebook_names_no_command_to_give_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/ipykernel_launcher.py", "-f", "kernel.json"])
    shards = open_shards(write_shard_files(tmp_path / "a"))
    run, folder = RunConfig(tracking_uri=new_store(tmp_path)), RunFolder(str(tmp_path), "run")
    tags = run_tags("search", "loso fold 1", shards)
    with start_run(folder, run, shards, tags, {}, "a search", {}) as tracker:
        found = tracker.read().data.tags
    assert "**Run**: a search" in found[NOTE]
    assert "kernel.json" not in str(found)


@pytest.mark.parametrize("place", [Tracker.describe, Tracker.log_files, RunFolder.update_record])
@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), "KILLED"), (CheckpointError("no"), "FAILED")]
)
def test_a_run_that_cannot_be_described_is_closed_and_resumed_by_the_next_call(
    place: Any, error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_run, "provenance", dict)
    uri, name = new_store(tmp_path), place.__name__
    owner = RunFolder if place is RunFolder.update_record else Tracker
    folder, shards = RunFolder(str(tmp_path), "run"), open_shards(write_shard_files(tmp_path / "a"))

    def start() -> str:
        tags = {"command": "ser-ray train", "kind": "training"}
        run = RunConfig(tracking_uri=uri)
        return start_run(folder, run, shards, tags, {}, "one training", {"recipe": 1}).run_id

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(type(error)):
            start()
    client = MlflowClient(uri)
    experiments = [item.experiment_id for item in client.search_experiments()]
    [run] = client.search_runs(experiments)
    assert run.info.status == status
    if owner is Tracker:
        assert folder.record()["run_id"] == start() == run.info.run_id
        assert client.get_run(run.info.run_id).info.status == "RUNNING"


@pytest.mark.parametrize("text", ['{"run_id": "f0', "[]"])
def test_a_damaged_record_is_an_error_with_the_way_out(text: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RECORD).write_text(text)
    with pytest.raises(CheckpointError, match=r"is not a run's record .* delete the folder"):
        RunFolder(str(tmp_path), "run").record()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path}"


def test_a_run_resumes_from_the_newest_checkpoint_and_keeps_the_selected_one(storage: str) -> None:
    made = [snapshot(1, 1), snapshot(2, 2), snapshot(3, 2), snapshot(4, 2), snapshot(4, 2, step=7)]
    folder = folder_of(storage, *made)
    newest = folder.newest()
    assert newest is not None
    assert newest.name == "checkpoint-000004-000007"
    assert newest.selected == checkpoint_name(2)
    with folder.filesystem.open_output_stream(f"{folder.path}/{RAY_LIST}") as file:
        file.write(b'{"cut')
    folder.tidy(newest)
    assert names(folder) == {newest.name, newest.selected}
    assert folder.filesystem.get_file_info(f"{folder.path}/{RAY_LIST}").type.name == "NotFound"


def test_nothing_is_deleted_once_another_process_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(lock: FolderLock) -> None:
        raise LockLostError("another process is training under this name")

    folder = folder_of(str(tmp_path), snapshot(1, 1), snapshot(2, 2), snapshot(3, 2))
    newest = folder.newest()
    assert newest is not None
    with folder.lock():
        monkeypatch.setattr(FolderLock, "require_held", refuse)
        with pytest.raises(LockLostError, match="another process"):
            folder.tidy(newest)
        with pytest.raises(LockLostError, match="another process"):
            folder.keep_selected(newest, {}, tmp_path)
    assert names(folder) == {checkpoint_name(epoch) for epoch in (1, 2, 3)}


def test_a_checkpoint_to_which_a_dying_worker_still_writes_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(str(tmp_path), snapshot(1, 1), snapshot(2, 2), snapshot(3, 2))
    newest, late = folder.newest(), tmp_path / "run" / checkpoint_name(1)
    refusals: list[str] = []
    really = folder.filesystem

    class Written:
        """The storage, to which the worker adds a file just before the folder itself goes."""

        def __getattr__(self, name: str) -> object:
            return getattr(really, name)

        def delete_dir(self, path: str) -> None:
            if Path(path) == late and len(refusals) < 3:
                (late / "more").write_bytes(b"x")
                refusals.append(path)
                late.rmdir()  # what the storage does last, and is refused
            really.delete_dir(path)

    monkeypatch.setattr(folder, "filesystem", Written())
    folder.tidy(newest)
    assert len(refusals) == 3
    assert names(folder) == {checkpoint_name(2), checkpoint_name(3)}


@pytest.mark.parametrize("lacking", [MODEL, STATE, PROGRESS])
@pytest.mark.parametrize("harm", ["gone", "cut short"])
def test_an_incomplete_checkpoint_is_skipped(
    tmp_path: Path, lacking: str, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(str(tmp_path), snapshot(1, 1), snapshot(2, 2))
    file = tmp_path / "run" / checkpoint_name(2) / lacking
    content = file.read_bytes()
    file.unlink()
    if harm == "cut short":
        file.write_bytes(content[: len(content) // 2])
    newest = folder.newest()
    assert newest is not None
    assert newest.name == checkpoint_name(1)
    assert f"{checkpoint_name(2)} is incomplete and is skipped" in caplog.text


def test_a_checkpoint_whose_selected_one_is_incomplete_is_skipped(tmp_path: Path) -> None:
    folder = folder_of(str(tmp_path), snapshot(1, 1), snapshot(2, 2), snapshot(3, 2))
    (tmp_path / "run" / checkpoint_name(2) / MODEL).unlink()
    newest = folder.newest()
    assert newest is not None
    assert newest.name == checkpoint_name(1)


def test_without_a_complete_checkpoint_the_training_begins(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path), "run").newest() is None
    folder = folder_of(str(tmp_path), snapshot(1, 1))
    (tmp_path / "run" / checkpoint_name(1) / STATE).unlink()
    assert folder.newest() is None


def test_a_checkpoint_replaces_what_an_interruption_left(storage: str) -> None:
    folder = folder_of(storage, snapshot(1, 1))
    stray = f"{folder.path}/{checkpoint_name(1)}/stray"
    with folder.filesystem.open_output_stream(stray) as file:
        file.write(b"half")
    folder_of(storage, snapshot(1, 1))
    assert folder.filesystem.get_file_info(stray).type.name == "NotFound"
    assert folder.newest() is not None


def test_a_stored_checkpoint_is_read_back(tmp_path: Path) -> None:
    folder_of(str(tmp_path), snapshot(2, 1, step=5))
    found = Snapshot.read(tmp_path / "run" / checkpoint_name(2, 5))
    assert (found.progress["epoch"], found.progress["step"]) == (2, 5)
    assert torch.equal(found.weights["w"], torch.full((3,), 2.0))
    assert torch.equal(found.state["moment"], torch.ones(3))
    assert found.card.to_json() == CARD.to_json()


def test_a_selected_checkpoint_resumes_no_training(tmp_path: Path) -> None:
    folder = folder_of(str(tmp_path), snapshot(1, 1))
    newest = folder.newest()
    assert newest is not None
    (tmp_path / "model").mkdir()
    folder.keep_selected(newest, {}, tmp_path / "model")
    for model in (tmp_path / "model", tmp_path / "run" / SELECTED):
        with pytest.raises(CheckpointError, match="a model without the state of its training"):
            Snapshot.read(model)


def test_the_selected_checkpoint_gets_a_fixed_name(storage: str, tmp_path: Path) -> None:
    folder = folder_of(storage, snapshot(1, 1), snapshot(2, 1))
    newest = folder.newest()
    assert newest is not None
    local = tmp_path / "selected"
    local.mkdir()
    folder.keep_selected(newest, {"run_id": "abc"}, local)
    assert json.loads(folder.selected_card().to_json()) == json.loads(CARD.to_json())
    assert json.loads((local / "run.json").read_text()) == {"run_id": "abc"}


def test_another_recipe_under_the_name_is_refused_and_the_difference_named(storage: str) -> None:
    folder = RunFolder(storage, "run")

    def identity(lr_max: float) -> dict:
        return {"labels": ("a", "b"), "config": TrainConfig(lr_max=lr_max).to_dict()}

    folder.require_same(identity(0.1))
    folder.update_record(identity=identity(0.1))
    folder.require_same(identity(0.1))
    with pytest.raises(CheckpointError, match=r"config differs: lr_max is 0\.1 instead of 0\.2"):
        folder.require_same(identity(0.2))
