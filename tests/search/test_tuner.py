import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from mlflow import MlflowClient
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from ser_ray import api
from ser_ray.cli import train as verbs
from ser_ray.cli.train import Tune
from ser_ray.distributed import mlflow_run
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.distributed.train import TrainResult
from ser_ray.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    MismatchError,
    ResourcesError,
    SerRayError,
    ShardsError,
    TrackingError,
)
from ser_ray.evaluation.rendering import as_artifact
from ser_ray.search import actor as trial_module
from ser_ray.search import open_study as open_study_module
from ser_ray.search import tuner as tune_module
from ser_ray.search.actor import TrialSetup, objectives, run_trial
from ser_ray.search.config import SlotConfig, TuneConfig
from ser_ray.search.open_study import open_study
from ser_ray.search.slots import find_slots, require_one_worker, trials_per_node
from ser_ray.search.trial import TrialRecord, best_of
from ser_ray.search.tune_run import (
    LimitedPoints,
    LimitedSearcher,
    ResumableAsha,
    baseline_points,
    fields_outside_space,
    grid_points,
    has_snapshot,
    num_trials,
    tune_folder,
)
from ser_ray.search.tuner import search
from ser_ray.shards.read import open_shards
from ser_ray.tracking.registry import recipe_of_run
from ser_ray.training.loop import fit
from ser_ray.training.metrics import selected_epoch
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import AugmentConfig, Keep, TrainConfig
from tests.mlflow_store import new_store
from tests.processes import end

RECIPE = TrainConfig(
    protocol="speaker-3", weights="none", crop_frames=24, batch_size=8, epochs=4, lr_max=4e-3,
    augment=AugmentConfig(
        noise=0.0, echo=0.0, band_limit=0.0, time_mask_frames=4, mix_style=0.0
    ),
)  # fmt: skip
DIVERGES = 1e18
RESOURCES = {"CPU": 1.0}
SPACE = (f"lr_max=choice(2e-3,4e-3,{DIVERGES})", "feature=choice(mel,mfcc)")


def run_config(folder: Path, **changes: object) -> RunConfig:
    values = {"storage": str(folder), "tracking_uri": new_store(folder)} | changes
    return RunConfig(**values)  # type: ignore[arg-type]


def require_all_resources_free() -> None:
    """Wait until actors and placement groups are gone and all CPUs of the cluster are free."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        groups = ray.util.placement_group_table().values()
        free = ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"]
        if free and all(group["state"] == "REMOVED" for group in groups):
            return
        time.sleep(0.2)
    raise AssertionError(f"{ray.available_resources()} free, {ray.util.placement_group_table()}")


def ended(trials: list[TrialRecord]) -> list[TrialRecord]:
    return [trial for trial in trials if trial.ended]


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_with_pruned_and_failed_trials_resumes_and_frees_its_resources(
    two_cpus, shards, tmp_path
):
    config = TuneConfig(trials=8, space=SPACE, grace_epochs=1, reduction=2)
    run = run_config(tmp_path)
    seen: list[list[TrialRecord]] = []

    def interrupt_after_three(trials: list[TrialRecord]) -> None:
        if len(ended(trials)) >= 3 and not seen:
            seen.append([replace(trial, rows=list(trial.rows)) for trial in ended(trials)])
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        search(shards, RECIPE, run, config, SlotConfig(), show=interrupt_after_three)
    require_all_resources_free()
    handler = signal.getsignal(signal.SIGINT)
    result = search(shards, RECIPE, run, config, SlotConfig(), show=lambda trials: None)
    require_all_resources_free()
    assert signal.getsignal(signal.SIGINT) is handler

    trials = {trial.trial_id: trial for trial in result.trials}
    for trial in seen[0]:  # trials that had ended are kept as they were
        assert trials[trial.trial_id].rows == trial.rows
        assert trials[trial.trial_id].state == trial.state
    states = [trial.state for trial in result.trials]
    assert len(states) == 8
    assert "pruned" in states
    assert result.trials[0].recipe == RECIPE
    for trial in result.trials:
        diverging = trial.recipe.lr_max == DIVERGES
        assert (trial.state == "failed") == diverging, trial
        assert diverging == ("is not finite" in trial.problem)
    best = result.best
    scores = [trial.selected["val/ua"] for trial in result.trials if trial.succeeded]
    assert best.selected["val/ua"] == max(scores)

    rows = plain_rows(best.recipe, shards)
    for row, alone in zip(best.rows, rows, strict=False):
        for name in ("train/loss", "val/loss", "val/ua"):
            assert row[name] == pytest.approx(alone[name], rel=1e-4), "a trial is a training"

    assert recipe_of_run(best.run_id, run.tracking_uri) == best.recipe.to_dict()
    check_mlflow(result, run.tracking_uri)


DRIVER = """
import sys
from pathlib import Path
from tests.search import test_tuner as here
here.search_that_is_killed(sys.argv[1], Path(sys.argv[2]), here.show_progress)
"""


def search_that_is_killed(shards: str, folder: Path, show):
    config = TuneConfig(
        trials=3, searcher="random", scheduler="none", space=("feature=choice(mel)",)
    )
    recipe = replace(RECIPE, epochs=8)
    return search(shards, recipe, run_config(folder), config, SlotConfig(), show=show)


def show_progress(trials: list[TrialRecord]) -> None:
    running = [trial.epochs for trial in trials if trial.state == "running"]
    print(len(ended(trials)), max(running, default=0), flush=True)


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_whose_driver_was_killed_resumes_and_loses_no_epoch(two_cpus, shards, tmp_path):
    command = [sys.executable, "-c", DRIVER, shards, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            num_ended, num_epochs = map(int, line.split())
            if num_ended >= 1 and num_epochs >= 2:
                break
        end(driver)
    shown: list[list[TrialRecord]] = []
    result = search_that_is_killed(shards, tmp_path, shown.append)
    assert sorted(trial.number for trial in result.trials) == [1, 2, 3]
    for trial in result.trials:
        assert trial.state == "finished"
        assert [row["epoch"] for row in trial.rows] == list(range(1, 9))
    folder = RunFolder(str(tmp_path), result.name)
    assert has_snapshot(tune_folder(folder, 0)), "Ray Tune would write its copy of the lock back"
    assert not has_snapshot(folder)
    rows = plain_rows(result.best.recipe, shards)
    for row, alone in zip(result.best.rows, rows, strict=True):
        assert row["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-4)

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    parent = client.get_run(result.run_id)
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    assert {run.data.tags["trial.state"] for run in nested} <= {"finished", "lost"}
    assert "RUNNING" not in {run.info.status for run in nested}
    for trial in result.trials:
        curve = client.get_metric_history(trial.run_id, "val/ua")
        assert {point.step: point.value for point in curve} == {
            int(row["epoch"]): row["val/ua"] for row in trial.rows
        }


def plain_rows(recipe: TrainConfig, shards: str) -> list[dict[str, float]]:
    """Train the same recipe in this process, without Ray."""
    rows: list[dict[str, float]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fit(
        recipe,
        open_shards(shards),
        Pretrained("fresh weights", {}),
        lambda epoch, make_snapshot: rows.append(epoch.row),  # type: ignore[union-attr]
    )
    torch.set_num_threads(threads)
    return rows


def check_mlflow(result, uri: str) -> None:
    """The search has a run, and each trial a run nested in it, with its curves and its end."""
    client = MlflowClient(tracking_uri=uri)
    parent = client.get_run(result.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics["selected/ua"] == pytest.approx(result.best.selected["val/ua"])
    page = Path(client.download_artifacts(result.run_id, "report.html")).read_text()
    stored = Path(result.report).read_text()
    assert as_artifact(stored) == page
    for linked in re.findall('href="(trials/[^"]+)"', stored):
        assert result.name in Path(result.location, linked).read_text()
    assert f"{result.best.selected['val/ua']:.1%}" in page
    assert f"ser-ray train --like {result.best.run_id}" in page
    tables = {file.path for file in client.list_artifacts(result.run_id, "tables")}
    plots = {file.path for file in client.list_artifacts(result.run_id, "plots")}
    assert "tables/trials.csv" in tables
    assert {"plots/history.png", "plots/by_lr_max.png", "plots/by_lr_ratio.png"} <= plots
    nested = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{result.run_id}'"
    )
    by_id = {run.info.run_id: run for run in nested}
    assert set(by_id) == {trial.run_id for trial in result.trials}
    status = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
    for trial in result.trials:
        run = by_id[trial.run_id]
        assert run.info.status == status[trial.state]
        assert run.data.tags["trial.state"] == trial.state
        assert float(run.data.params["lr_max"]) == trial.recipe.lr_max
        if trial.rows:
            curve = client.get_metric_history(trial.run_id, "val/ua")
            assert [point.value for point in curve] == [row["val/ua"] for row in trial.rows]
            assert len(client.get_metric_history(trial.run_id, "train/lr")) == sum(
                len(rates) for rates in trial.learning_rates
            )


@pytest.mark.ray
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_hundreds_of_short_trials_end_and_free_their_resources(two_cpus, shards, tmp_path):
    config = TuneConfig(trials=300, space=("lr_max=loguniform(1e-4,1e-2)", "feature=choice(mel)"))
    recipe, run = replace(RECIPE, epochs=1), run_config(tmp_path)
    result = search(shards, recipe, run, config, SlotConfig(), show=lambda trials: None)
    require_all_resources_free()
    assert [trial.problem for trial in result.trials] == [""] * 300
    client = MlflowClient(run.tracking_uri)
    experiment = client.get_experiment_by_name(run.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert [run.info.status for run in runs] == ["FINISHED"] * 301, "the trials' and their parent's"


@pytest.mark.soak
def test_a_grid_without_a_success_says_why(two_cpus, shards, tmp_path):
    config = TuneConfig(
        searcher="grid", space=(f"lr_max=choice({DIVERGES})", "lr_ratio=choice(2)",
                                "feature=choice(mel,mfcc)"),
    )  # fmt: skip
    run = run_config(tmp_path)
    with pytest.raises(SerRayError, match=r"none of 2 trials succeeded.*is not finite"):
        search(shards, RECIPE, run, config, SlotConfig(), show=lambda trials: None)


@pytest.mark.ray
@pytest.mark.parametrize(
    ("slots", "changes"),
    [(SlotConfig(cpus_per_worker=3), {}), (SlotConfig(), {"device": "gpu"})],
)
def test_a_trial_that_can_never_start_is_refused(two_cpus, shards, tmp_path, slots, changes):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    run = RunConfig(storage=str(tmp_path), tracking_uri=store, **changes)
    with pytest.raises(ResourcesError, match="can never start: the cluster's nodes"):
        search(shards, RECIPE, run, TuneConfig(), slots, show=print)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.ray
def test_there_are_as_many_slots_as_trials_fit_on_the_nodes(two_cpus):
    assert find_slots(RunConfig(), SlotConfig()) == (2, {"CPU": 1.0})
    assert find_slots(RunConfig(), SlotConfig(cpus_per_worker=2)) == (1, {"CPU": 2.0})


@pytest.mark.parametrize("workers", ["2", "1..2"])
def test_trials_of_several_workers_are_refused_with_the_way_out(workers):
    with pytest.raises(ConfigError, match=rf"has one worker; .* --workers {workers}$"):
        require_one_worker(RunConfig(workers=workers))


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "room"),
    [
        ({"CPU": 16.0, "GPU": 1.0}, 1, 0.25, 4),
        ({"CPU": 16.0, "GPU": 2.0}, 1, 0.3, 6),  # a share is of a single GPU
        ({"CPU": 16.0, "GPU": 2.0}, 1, 0.1, 16),
        ({"CPU": 16.0, "GPU": 3.0}, 2, 2, 1),
        ({"CPU": 3.0}, 2, 0, 1),
        ({"CPU": 16.0}, 1, 0.25, 0),
    ],
)
def test_the_number_of_trials_that_fit_on_a_node(node, cpus, gpus, room):
    assert trials_per_node(node, cpus, gpus) == room


def test_asha_decides_after_a_restore_as_it_would_without_one():
    curves = {
        "a": [0.2, 0.3, 0.5, 0.6, 0.6, 0.7, 0.7, 0.8, 0.9],
        "b": [0.1],
        "c": [0.3, 0.3, 0.2],
        "d": [0.5, 0.2, 0.6, 0.1],
    }

    config = TuneConfig(grace_epochs=1, space=("epochs=choice(4,27)",))

    def scheduler() -> ASHAScheduler:
        made = ResumableAsha(RECIPE, config)
        made.set_search_properties("best_val_ua", "max")
        return made

    def trial_of(name: str, **last_result: object) -> SimpleNamespace:
        return SimpleNamespace(trial_id=name, last_result=last_result, config={"epochs": 27})

    before, after = scheduler(), scheduler()
    for name, curve in curves.items():
        trial = trial_of(name)
        before.on_trial_add(None, trial)
        rows = [{"val/ua": val_ua} for val_ua in curve]
        for epoch in range(1, len(rows) + 1):
            result = {"epoch": epoch, "best_val_ua": max(curve[:epoch]), "history": rows[:epoch]}
            before.on_trial_result(None, trial, result)
            trial.last_result = result
        if name == "d":  # it diverges after its fourth epoch
            trial.last_result = {"best_val_ua": 0.0, "problem": "diverged", "history": rows}
            before.on_trial_result(None, trial, trial.last_result)
        after.on_trial_add(None, trial)
    decisions = []
    for index in range(40):
        val_ua = 0.05 + index % 13 / 13
        trial = trial_of(f"new {index}")
        for epoch in (1, 3, 9, 10):
            result = {"epoch": epoch, "best_val_ua": val_ua}
            pair = []
            for asha in (before, after):
                if epoch == 1:
                    asha.on_trial_add(None, trial)
                pair.append(asha.on_trial_result(None, trial, result))
            decisions.append(pair)
    assert all(without == restored for without, restored in decisions)
    assert {without for without, _ in decisions} == {"CONTINUE", "STOP"}
    fresh, low = scheduler(), {"epoch": 1, "best_val_ua": 0.05}
    fresh.on_trial_add(None, trial_of("x"))
    assert fresh.on_trial_result(None, trial_of("x"), low) == "CONTINUE"
    after.on_trial_add(None, trial_of("x"))
    assert after.on_trial_result(None, trial_of("x"), low) == "STOP"


def test_the_first_trial_is_the_recipe_if_the_space_contains_it():
    assert baseline_points(RECIPE, TuneConfig(space=SPACE)) == [
        {"lr_max": 4e-3, "lr_ratio": 40.0, "feature": "mel"}
    ]
    assert baseline_points(RECIPE, TuneConfig(space=("feature=choice(mfcc)",))) == []


def test_the_values_that_exclude_the_recipe_from_the_space_are_named():
    assert fields_outside_space(RECIPE, TuneConfig(space=SPACE)) == []
    config = TuneConfig(space=("feature=choice(mfcc)", "epochs=integer(5,9)"))
    assert fields_outside_space(RECIPE, config) == ["feature mel", "epochs 4"]


def test_the_seed_cannot_be_searched_if_it_draws_the_split():
    config, recipe = TuneConfig(space=("seed=choice(0,1)",)), replace(RECIPE, protocol="random")
    with pytest.raises(ConfigError, match=r"seed cannot be searched.*another --protocol"):
        search("nowhere", recipe, RunConfig(), config, SlotConfig(), show=print)


@pytest.mark.parametrize("kind", [LimitedSearcher, LimitedPoints])
def test_a_restored_searcher_uses_the_current_number_of_slots(kind):
    def with_slots(count: int) -> LimitedSearcher | LimitedPoints:
        if kind is LimitedSearcher:
            return LimitedSearcher(Searcher(metric="score", mode="max"), max_concurrent=count)
        return LimitedPoints(max_concurrent=count)

    before, now = with_slots(1), with_slots(4)
    (before.live_trials if kind is LimitedSearcher else before._live_trials).add("running")
    now.set_state(before.get_state())
    assert now.max_concurrent == 4
    assert "running" in (now.live_trials if kind is LimitedSearcher else now._live_trials)


@pytest.fixture
def reports(small_network, monkeypatch) -> list[tuple[dict[str, object], dict[str, bytes]]]:
    """What a trial in this process reports to Ray Tune: metrics and the files of its checkpoint."""
    reports = []

    def report(metrics, checkpoint=None):
        files = {}
        if checkpoint is not None:
            root = Path(checkpoint.path)
            files = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.*")}
        reports.append((metrics, files))

    monkeypatch.setattr(ray_tune, "report", report)
    monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: None)
    monkeypatch.setattr(trial_module, "CHECKPOINT_SECONDS", 0.0)
    return reports


def setup_of(shards: str, **changes: object) -> TrialSetup:
    pretrained = {"none": Pretrained("fresh weights", {})}
    values = {"recipe": RECIPE, "shards": open_shards(shards), "pretrained": pretrained}
    return TrialSetup(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_trial_resumes_with_its_selected_epoch(
    keep: Keep, reports, shards, tmp_path, monkeypatch
):
    """A lost process changes nothing, not even which epoch is selected."""
    kept: list[bytes] = []

    def finish(selected: Path, *_: object) -> None:
        kept.append((selected / "progress.json").read_bytes())

    recipe = replace(RECIPE, keep=keep, lr_max=0.5, pct_start=0.9)  # it gets worse at the end
    setup = setup_of(shards, finish=finish, recipe=recipe)
    run_trial({}, setup, RESOURCES)
    uninterrupted, reports[:] = list(reports), []
    for name, content in uninterrupted[1][1].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    checkpoint = ray_tune.Checkpoint.from_directory(tmp_path)
    monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: checkpoint)
    run_trial({}, setup, RESOURCES)
    assert [metrics["epoch"] for metrics, _ in reports] == [3, 4]
    for (again, _), (alone, _) in zip(reports, uninterrupted[2:], strict=True):
        assert again["best_val_ua"] == alone["best_val_ua"]
        assert again["times_ms"][:2] == uninterrupted[1][0]["times_ms"]
        losses = [metrics["history"][-1]["val/loss"] for metrics in (again, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    rows = uninterrupted[-1][0]["history"]
    expected = selected_epoch(rows, keep) + 1
    assert (expected == 4) is (keep == "last")
    assert [json.loads(progress)["selected"]["epoch"] for progress in kept] == [expected] * 2


def test_the_objective_of_a_trial_ends_with_its_selected_epoch():
    lasts: dict[Keep, float] = {"last": 0.3, "best": 0.6}
    for keep, last in lasts.items():
        recipe = replace(RECIPE, keep=keep, epochs=4)
        rows = [{"val/ua": val_ua} for val_ua in (0.2, 0.6, 0.5, 0.3)]
        assert objectives(rows[:3], recipe) == [0.2, 0.6, 0.6]
        assert objectives(rows, recipe) == [0.2, 0.6, 0.6, last]
        assert objectives([], recipe) == []


def test_a_trial_whose_checkpoint_is_gone_starts_from_the_beginning(
    reports, shards, tmp_path, monkeypatch
):
    gone = ray_tune.Checkpoint.from_directory(tmp_path / "gone")
    monkeypatch.setattr(ray_tune, "get_checkpoint", lambda: gone)
    run_trial({}, setup_of(shards, recipe=replace(RECIPE, epochs=1)), RESOURCES)
    assert [metrics.get("epoch") for metrics, _ in reports] == [1]


@pytest.mark.parametrize("error", [DivergedError, MismatchError, torch.OutOfMemoryError])
def test_a_problem_is_reported_with_the_epochs_before_it(reports, shards, error):
    def finish(*_: object) -> None:
        raise error("no good")

    run_trial({}, setup_of(shards, recipe=replace(RECIPE, epochs=2), finish=finish), RESOURCES)
    last = reports[-1][0]
    assert last["problem"] == f"{error.__name__}: no good"
    assert last["history"] == reports[1][0]["history"]
    assert [len(report["history"]) for report, _ in reports] == [1, 2, 2]
    assert "epoch" not in last


@pytest.mark.parametrize("error", [ShardsError, CheckpointError, TrackingError, OSError])
def test_an_error_that_the_recipe_did_not_cause_fails_the_process_of_the_trial(
    reports, shards, error
):
    """Ray Tune then retries the trial; it does not retry a trial that reports a problem."""

    def finish(*_: object) -> None:
        raise error("the storage does not answer")

    setup = setup_of(shards, recipe=replace(RECIPE, epochs=1), finish=finish)
    with pytest.raises(error, match="does not answer"):
        run_trial({}, setup, RESOURCES)
    assert not [metrics for metrics, _ in reports if "problem" in metrics]


@pytest.mark.parametrize(
    ("space", "read"),
    [
        (("weights=choice(none)",), {("none", "mel")}),
        (("weights=choice(none,imagenet)",), {("none", "mel"), ("imagenet", "mel")}),
        (("feature=choice(tiny)",), {("mine.pth", "tiny")}),  # heads on encoders read no weights
        (("feature=choice(mel,mfcc)",), {("mine.pth", "mel")}),
    ],
)
def test_a_search_reads_only_the_weights_with_which_trials_begin(
    space, read, shards, tmp_path, monkeypatch
):
    asked: list[tuple[str, str]] = []

    def read_weights(recipe: TrainConfig, *_: object) -> Pretrained:
        asked.append((recipe.weights, recipe.feature))
        return Pretrained(recipe.weights, {})

    def stop(*arguments: Any, **_: object) -> None:
        setups.append(arguments[5])
        raise KeyboardInterrupt

    setups: list[TrialSetup] = []
    monkeypatch.setattr(tune_module, "read_initial_weights", read_weights)
    monkeypatch.setattr(tune_module, "open_study", stop)
    monkeypatch.setattr(tune_module, "search_name", lambda *_: "search")
    recipe = replace(RECIPE, weights="mine.pth")
    config = TuneConfig(space=("feature=choice(mel)", *space))
    with pytest.raises(KeyboardInterrupt):
        search(shards, recipe, run_config(tmp_path), config, SlotConfig(), show=print)
    assert set(asked) == read
    assert setups[0].pretrained.keys() == {weights for weights, _ in read}


def test_a_study_keeps_its_run_and_refuses_another_recipe(shards, tmp_path, monkeypatch):
    """It also checks that its tracking store is not in a folder that Ray deletes after the job."""
    kept: list[str] = []
    monkeypatch.setattr(mlflow_run, "require_kept", kept.append)
    monkeypatch.setattr(open_study_module, "cluster", lambda address, **_: nullcontext())
    run = run_config(tmp_path)

    def start(recipe: TrainConfig) -> str:
        with open_study(
            "search", "label", RunFolder(run.storage, "search"), run, SlotConfig(),
            setup_of(shards, recipe=recipe), settings={}, varied_fields=set(), show=print,
        ) as opened:  # fmt: skip
            return opened.parent.run_id

    assert start(RECIPE) == start(RECIPE)
    assert kept == [f"sqlite:///{tmp_path}/mlflow.db"] * 2
    with pytest.raises(CheckpointError, match="recipe differs: epochs is 4 instead of 9"):
        start(replace(RECIPE, epochs=9))


@pytest.mark.parametrize("refit", [False, True])
def test_the_verb_prints_the_best_and_how_to_train_it(monkeypatch, refit):
    row = {"epoch": 3.0, "val/ua": 0.5, "val/wa": 0.6, "val/loss": 1.0}
    best = TrialRecord("a", 2, {}, RECIPE, rows=[row], state="finished", run_id="0123456789abcdef")
    result = tune_module.TuneResult(
        name="search", label="validation, speaker-3, table", best=best,
        trials=[best, TrialRecord("b", 3, {}, RECIPE, state="failed")], run_id="parent",
        tracking_uri="http://host:5000", location="s3://b/runs/search?region=x",
        train_command="ser-ray x",
    )  # fmt: skip
    card: Any = SimpleNamespace(
        trained_on="table", split={"label": "speaker-3"}, corpus="table", config=RECIPE
    )
    fitted = TrainResult(
        name="like-0123456789ab", checkpoint="s3://b/runs/like/selected", card=card, run_id="refit",
        tracking_uri="http://host:5000", history=[row], selected=row, undelivered="",
        report="s3://b/runs/like/report.html",
    )  # fmt: skip
    trained: list[tuple[TrainConfig, RunConfig]] = []

    def train(shards: str, recipe: TrainConfig, run_config: RunConfig, *, address: str) -> object:
        trained.append((recipe, run_config))
        return fitted

    monkeypatch.setattr(verbs, "say_training", lambda *_: None)
    monkeypatch.setattr(tune_module, "search", lambda *_, **__: result)
    monkeypatch.setattr(api, "train", train)
    outcome = Tune(search=TuneConfig(trials=2, refit=refit), recipe=RECIPE).run()
    assert "2 trials: 1 finished, 1 failed" in outcome.text
    assert "UA 50.0%, WA 60.0% in epoch 3 (validation, speaker-3, table)" in outcome.text
    assert "s3://b/runs/search/report.html?region=x" in outcome.text
    if not refit:
        assert outcome.next_step == "train it     ser-ray x"
        assert not trained
        return
    assert "checkpoint   s3://b/runs/like/selected" in outcome.text
    assert outcome.data["refit"]["name"] == "like-0123456789ab"
    assert [(recipe, run.name) for recipe, run in trained] == [(RECIPE, "like-0123456789ab")]


def test_a_grid_has_one_trial_for_each_point_and_one_for_the_recipe():
    config = TuneConfig(searcher="grid", space=("feature=choice(mel,mfcc)",))
    assert num_trials(RECIPE, config) == 3 * 3 * 2 + 1
    assert num_trials(RECIPE, TuneConfig(trials=5)) == 5


def test_a_grid_that_contains_the_recipe_begins_with_it():
    space = ("feature=choice(mfcc,mel)", "lr_max=choice(2e-3,4e-3)", "lr_ratio=choice(40)")
    config = TuneConfig(searcher="grid", space=space)
    assert num_trials(RECIPE, config) == 2 * 2 * 1
    assert grid_points(RECIPE, config)[0] == {"lr_max": 4e-3, "lr_ratio": 40.0, "feature": "mel"}


def test_the_best_trial_did_not_fail():
    row = {"epoch": 1.0, "val/ua": 0.5, "val/loss": 1.0}
    trials = [
        TrialRecord("a", 1, {}, RECIPE, rows=[row], state="pruned"),
        TrialRecord("b", 2, {}, RECIPE, rows=[row | {"val/loss": 0.9}], state="finished"),
        TrialRecord("c", 3, {}, RECIPE, rows=[row | {"val/ua": 0.9}], state="failed", problem="no"),
        TrialRecord("e", 5, {}, RECIPE, rows=[row | {"val/ua": 0.8}], state="pruned"),
        TrialRecord("d", 4, {}, RECIPE, state="failed", problem="no"),
    ]
    assert best_of(trials).number == 2
    with pytest.raises(SerRayError, match="none of 1 trials succeeded; the first failed with: no"):
        best_of(trials[4:])
