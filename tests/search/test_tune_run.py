"""These tests fail when an upgrade of Ray moves what `tune_run` relies on."""

from pathlib import Path

import pytest
from ray import tune
from ray.tune.experiment import Trial

from ser_ray.distributed import placement
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.search import tune_run
from ser_ray.search.tune_run import RetryFailed, has_snapshot


@pytest.mark.ray
def test_a_snapshot_is_found_once_ray_tune_has_stored_one(tmp_path, monkeypatch):
    import ray

    monkeypatch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    folder = RunFolder(str(tmp_path), "study")
    assert not has_snapshot(folder)
    Path(folder.path).mkdir()
    assert not has_snapshot(folder)
    ray.init(num_cpus=1, include_dashboard=False, address="local", logging_level="ERROR")
    try:
        tune.run(
            lambda values: tune.report({"score": values["value"]}),
            name=folder.name, storage_path=folder.root, config={"value": 1}, verbose=0,
        )  # fmt: skip
    finally:
        ray.shutdown()
    assert has_snapshot(folder)


def restored(**result: object) -> Trial:
    trial = Trial("trial", stub=True)
    trial.set_status(Trial.TERMINATED)
    trial.run_metadata.last_result = result
    return trial


def test_a_trial_that_reported_a_problem_is_queued_again():
    scheduler = RetryFailed()
    failed, finished = restored(problem="diverged"), restored(epoch=4)
    for trial in (failed, finished):
        scheduler.on_trial_add(None, trial)
    assert (failed.status, finished.status) == ("PENDING", "TERMINATED")


def test_the_last_result_of_a_trial_is_what_it_reported():
    assert restored(epoch=4).last_result["epoch"] == 4
    assert "epoch" not in restored().last_result  # a trial that has reported nothing yet


def test_a_search_that_waits_for_room_says_so_every_minute(monkeypatch, caplog):
    now = 0.0
    monkeypatch.setattr(placement, "monotonic", lambda: now)
    monkeypatch.setattr(tune_run, "placement_groups", lambda: {"other"})
    monkeypatch.setattr(placement, "placement_groups", lambda *, with_room: {"other"})
    monkeypatch.setattr(placement, "free_resources", lambda: "0 CPUs, 0 GPUs")
    callback = tune_run.RoomCallback({"CPU": 2.0, "GPU": 0.5})
    for _ in range(6):
        now += placement.START_SECONDS
        callback.on_step_end(iteration=0, trials=[])
    assert len(caplog.messages) == 3
    assert "waiting for room for a trial with 2 CPUs, 0.5 GPUs since" in caplog.text
