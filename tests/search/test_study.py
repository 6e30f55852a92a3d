import io
import json
import re
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import LockLostError, SerRayError, TrackingError
from ser_ray.evaluation import pages
from ser_ray.search import study as module
from ser_ray.search import trial_table
from ser_ray.search.actor import TrialSetup
from ser_ray.search.config import TuneConfig
from ser_ray.search.optuna_study import importance_of, optuna_journal
from ser_ray.search.slots import Slots
from ser_ray.search.study import Study
from ser_ray.search.trial import TrialRecord, trial_rows
from ser_ray.search.trial_table import TrialTable
from ser_ray.shards.read import ShardSet
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.recipe import TrainConfig
from tests.conftest import make_memory_shards

RECIPE = TrainConfig(epochs=3, keep="best")
TRIAL_PAGE = pages.trial_page
TAGS = {
    "kind": "search", "protocol": "speaker-3 fold 1 of 3 (speaker-independent)", "corpus": "table",
}  # fmt: skip


class Server:
    """A tracking server in memory that can be away; it replaces the class `Tracker` in tests."""

    def __init__(self) -> None:
        self.away = False
        self.runs: dict[str, SimpleNamespace] = {}

    def __call__(self, uri: str, run_id: str) -> "Client":
        return Client(self, run_id)

    def start(self, uri, experiment, *, name, params, tags, dataset, run_id):
        self.require()
        run_id = run_id or f"run-{len(self.runs) + 1}"
        run = SimpleNamespace(
            name=name, params=params, tags=dict(tags), points=[], stored=[], status="", files={},
            lines={},
        )  # fmt: skip
        self.runs.setdefault(run_id, run).tags |= tags
        self.runs[run_id].status = "RUNNING"
        return Client(self, run_id)

    def require(self) -> None:
        if self.away:
            raise TrackingError("away")


class Client:
    def __init__(self, server: Server, run_id: str) -> None:
        self.server, self.run_id = server, run_id
        self.waiting: list[tuple[str, int, float, int]] = []
        self.run = server.runs[run_id]
        self._epochs: set[int] = set()

    log_epoch = Tracker.log_epoch

    def log_metrics(self, metrics, step, timestamp_ms):
        self.waiting += [(name, step, value, timestamp_ms) for name, value in metrics.items()]

    def log_scores(self, scores, timestamp_ms):
        self.log_metrics(scores, 0, timestamp_ms)
        self.deliver()

    def describe(self, **lines):
        self.server.require()
        self.run.lines |= lines

    def deliver(self):
        self.server.require()
        # As MLflow does, ignore a metric that the run has: same name, step, value and timestamp.
        new = [point for point in self.waiting if point not in self.run.stored]
        self.run.stored += new
        self.run.points += [point[:3] for point in new]
        self.waiting = []

    def set_tags(self, tags):
        self.server.require()
        self.run.tags |= tags

    def log_files(self, files):
        self.server.require()
        self.run.files |= files

    def finish(self, status):
        self.server.require()
        self.run.status = status

    abandon = Tracker.abandon


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(module, "Tracker", server)
    monkeypatch.setattr(pages, "trial_page", lambda *_, **__: "a page")  # figures take a second
    return server


def open_study(server: Server, storage: Path | str) -> Study:
    folder = RunFolder(str(storage), "search")
    folder.filesystem.create_dir(folder.path, recursive=True)

    def nested_runs(tag: str) -> dict[str, SimpleNamespace]:
        return {
            run.tags[tag]: SimpleNamespace(
                info=SimpleNamespace(run_id=run_id, status=run.status),
                data=SimpleNamespace(tags=run.tags),
            )
            for run_id, run in server.runs.items()
        }

    parent: Any = SimpleNamespace(
        uri="memory", run_id="parent", abandon=lambda error: None, nested_runs=nested_runs,
        finish=lambda status: server.require(),
    )  # fmt: skip
    shards = cast(ShardSet, make_memory_shards(speakers=2, emotions=2))
    setup = TrialSetup(recipe=RECIPE, shards=shards, pretrained={})
    return Study(
        parent, folder, setup, Slots(1, {"CPU": 1.0}), RunConfig(), TAGS, show=lambda trials: None
    )


def deliver(study: Study) -> bool:
    """Deliver the records now; returns whether the server took them."""
    try:
        study._deliver()
    except TrackingError:
        return False
    return True


class TuneTrial:
    """What Ray Tune gives its callbacks, and what it keeps of the trial in its snapshots."""

    TERMINATED = "TERMINATED"

    def __init__(self, trial_id: str, **values: object) -> None:
        self.trial_id, self.config, self.status = trial_id, values, "PENDING"
        self.error_file: str | None = None
        self.checkpoint: SimpleNamespace | None = None
        self.last_result: dict[str, Any] = {}
        self.num_reports = 0
        self.progress: dict[str, Any] = {
            "step": 0, "started_ms": 500, "history": [], "learning_rates": [], "times_ms": [],
            "selected_confusion": [],
        }  # fmt: skip

    def epoch(self, study: Study, number: int, val_ua: float, *, done: bool = False) -> None:
        """Report an epoch as `run_trial` does; `done` if the scheduler stops the trial then."""
        row = {"epoch": float(number), "train/loss": 1.0, "train/wa": 0.3}
        row |= {"val/ua": val_ua, "val/wa": val_ua, "val/f1": 0.25, "val/loss": 1.0}
        before, self.num_reports = self.progress, self.num_reports + 1
        times_ms = [*before["times_ms"], 1000 * number + self.num_reports]
        best = max([0.0, *(earlier["val/ua"] for earlier in before["history"])])
        confusion = [[number, 0], [0, 1]] if val_ua > best else before["selected_confusion"]
        self.progress = before | {
            "history": [*before["history"], row], "times_ms": times_ms,
            "learning_rates": [*before["learning_rates"], 0.1, 0.2],
            "selected_confusion": confusion,
        }  # fmt: skip
        self.report(study, self.progress | {"done": done})

    def report(self, study: Study, result: dict[str, Any]) -> None:
        study.on_trial_result(0, [self], self, result)
        self.last_result = result

    def complete(self, study: Study) -> None:
        study.on_trial_complete(0, [self], self)
        self.status = self.TERMINATED


def test_ctrl_c_before_the_first_report_of_a_new_trial_leaves_it_waiting(server, tmp_path):
    study, trial = open_study(server, tmp_path), TuneTrial("new", lr_max=1e-2, lr_ratio=25.0)
    trial.status = trial.TERMINATED  # Ray Tune sets this at its end
    study.on_experiment_end([trial])
    with pytest.raises(KeyboardInterrupt), study:
        raise KeyboardInterrupt
    [record] = study.trials
    assert (record.state, server.runs) == ("waiting", {})


def run(study: Study, folder: Path) -> list[TuneTrial]:
    """Run a trial that is stopped, one that finishes after a lost process, and one that fails."""
    trials = [
        TuneTrial("s", lr_max=1e-2, lr_ratio=25.0),
        TuneTrial("f", lr_max=2e-2, lr_ratio=25.0),
        TuneTrial("x", lr_max=3e-2, lr_ratio=25.0),
    ]
    stopped, finished, failed = trials
    study.on_step_begin(0, [])
    for trial in reversed(trials):
        study.on_trial_start(1, trials, trial)
    stopped.epoch(study, 1, 0.1, done=True)
    stopped.complete(study)
    finished.epoch(study, 1, 0.2)
    after_the_first = finished.progress
    finished.epoch(study, 2, 0.6)
    study.on_trial_start(2, trials, finished)  # resumes from a checkpoint after the first epoch
    finished.progress = after_the_first
    finished.epoch(study, 2, 0.6)
    finished.epoch(study, 3, 0.5, done=True)
    finished.complete(study)
    error = folder / "error.txt"
    error.write_text("Failure # 1\nTraceback\n  File\nValueError: no good\n\n")
    failed.error_file = str(error)
    study.on_trial_error(3, trials, failed)
    failed.status = "ERROR"
    return trials


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def resumed(study: Study, before: Study, trials: list[TuneTrial]) -> Study:
    """Resume the study under a new driver, for which Ray Tune has restored the snapshot."""
    study.set_state(json.loads(json.dumps(before.get_state())))
    study.on_step_begin(0, list(reversed(trials)))  # Ray Tune does not keep their order
    return study


def test_a_study_records_how_every_trial_ended(server, tmp_path):
    study = open_study(server, tmp_path)
    run(study, tmp_path)
    stopped, finished, failed = study.trials
    assert [trial.number for trial in (stopped, finished, failed)] == [1, 2, 3]
    assert (stopped.state, stopped.recipe.lr_max) == ("pruned", 1e-2)
    assert (failed.state, failed.problem) == ("failed", "ValueError: no good")
    assert finished.state == "finished"
    assert [row["epoch"] for row in finished.rows] == [1, 2, 3]
    assert finished.selected["epoch"] == 2
    assert finished.selected_confusion == [[2, 0], [0, 1]]
    last = replace(finished, recipe=replace(finished.recipe, keep="last"))
    assert last.selected["epoch"] == 3


def test_a_study_whose_folder_was_taken_over_leaves_it_to_the_other_process(
    server, tmp_path, monkeypatch
):
    def refuse() -> None:
        raise LockLostError("process 1 on elsewhere is training under this name")

    study = open_study(server, tmp_path)
    deleted: list[str] = []
    abandoned: list[BaseException] = []
    monkeypatch.setattr(study.folder, "delete", deleted.append)
    monkeypatch.setattr(study.parent, "abandon", abandoned.append)
    trials = run(study, tmp_path)
    trials[1].checkpoint = SimpleNamespace(path=f"{study.folder.path}/search-0/f/checkpoint")
    monkeypatch.setattr(study.folder, "check_lock", refuse)
    with pytest.raises(LockLostError):
        study.on_experiment_end(trials)
    with pytest.raises(LockLostError), study:
        study.on_step_begin(4, trials)
    assert (deleted, abandoned) == ([], [])


def test_a_server_that_answers_again_gets_everything_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "trial_page", TRIAL_PAGE)
    server.away = True
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    assert not deliver(study)
    server.away = False
    assert deliver(study)
    assert deliver(study)
    again = resumed(open_study(server, tmp_path), study, trials)
    assert deliver(again)
    assert [run.status for run in server.runs.values()] == ["KILLED", "FINISHED", "FAILED"]
    finished = server.runs["run-2"]
    assert finished.tags["mlflow.parentRunId"] == "parent"
    assert finished.tags["trial.state"] == "finished"
    assert (finished.name, finished.tags["kind"]) == ("002 mel 2.0e-2", "trial")
    assert finished.lines["Validation"].startswith("UA 60.0%, WA 60.0% (speaker-3 fold 1 of 3")
    assert finished.lines["Again"].startswith("`ser-ray train --like run-2 --shards ")
    assert finished.params["lr_max"] == 2e-2
    assert finished.params["search"] == {"lr_ratio": 25.0}
    assert set(finished.params) == {*TrainConfig().to_dict(), "search"}
    assert [point for point in finished.points if point[0] == "val/ua"] == [
        ("val/ua", 1, 0.2), ("val/ua", 2, 0.6), ("val/ua", 3, 0.5),
    ]  # fmt: skip
    assert [step for name, step, _ in finished.points if name == "train/lr"] == list(range(6))
    assert ("selected/ua", 0, 0.6) in finished.points
    assert server.runs["run-3"].lines["Result"] == "failed after 0 epochs: ValueError: no good"
    reports = [run.files["report.html"] for run in server.runs.values()]
    assert "60.0%" in reports[1]
    assert "epoch 2, validation, speaker-3 fold 1 of 3 (speaker-independent)" in reports[1]
    assert "Trial 2 of search: finished" in reports[1]
    assert "Trial 3 of search: failed. ValueError: no good" in reports[2]


def test_the_run_of_a_fold_says_that_it_belongs_to_a_cross_validation(server, tmp_path):
    study, trial = open_study(server, tmp_path), TuneTrial("r", fold=1, seed=2)
    study.tags = TAGS | {"kind": "cross-validation"}
    study.on_trial_start(0, [trial], trial)
    assert deliver(study)
    recorded = server.runs["run-1"]
    assert (recorded.name, recorded.tags["kind"]) == ("fold 1 seed 2", "fold")
    assert recorded.lines["Run"] == "trial 1 of the cross-validation search"


def test_epochs_that_a_server_missed_are_delivered_by_the_next_driver(server, tmp_path):
    study, trial = open_study(server, tmp_path), TuneTrial("r", lr_max=1e-2)
    study.on_step_begin(0, [trial])
    study.on_trial_start(0, [trial], trial)
    trial.epoch(study, 1, 0.2)
    assert deliver(study)
    server.away = True
    trial.epoch(study, 2, 0.3)
    assert not deliver(study)
    server.away = False
    again = resumed(open_study(server, tmp_path), study, [trial])
    again.on_trial_start(0, [trial], trial)
    assert deliver(again)
    points = [point for point in server.runs["run-1"].points if point[0] == "val/ua"]
    assert points == [("val/ua", 1, 0.2), ("val/ua", 2, 0.3)]


def test_a_resumed_study_has_the_records_of_the_killed_driver(server, tmp_path):
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    running = TuneTrial("r", lr_max=4e-2)
    study.on_step_begin(4, [*trials, running])
    study.on_trial_start(4, trials, running)
    running.epoch(study, 1, 0.4)
    assert deliver(study)
    again = resumed(open_study(server, tmp_path), study, [*trials, running])
    known = {trial.trial_id: trial for trial in study.trials}
    assert [trial.trial_id for trial in again.trials] == ["s", "f", "x", "r"]
    for trial in again.trials[:2]:
        assert trial == known[trial.trial_id]
    for trial in again.trials[2:]:  # these are trained again
        assert trial.state == "waiting"
        assert trial.rows == known[trial.trial_id].rows
        assert trial.run_id == known[trial.trial_id].run_id


def test_a_study_whose_state_is_older_than_the_snapshot_derives_how_trials_ended(server, tmp_path):
    """A driver that is killed between two files of one snapshot leaves an older state."""
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    again = open_study(server, tmp_path)
    again.on_experiment_end(trials[:2])  # all had ended, so Ray Tune makes no step
    assert [trial.state for trial in again.trials] == ["pruned", "finished"]
    assert [trial.rows for trial in again.trials] == [trial.rows for trial in study.trials[:2]]
    with again:
        again.deliver_all(2)


def test_a_driver_elsewhere_reads_the_records_of_a_study_that_ended(server, in_tmp, monkeypatch):
    storage = f"memory://{in_tmp}"
    study = open_study(server, storage)
    run(study, in_tmp)
    with study:
        assert "study" in thread_names()
        study.deliver_all(3)
        study.finish()
    assert "study" not in thread_names()
    assert not open_study(server, in_tmp / "other").has_ended
    (in_tmp / "elsewhere").mkdir()
    monkeypatch.chdir(in_tmp / "elsewhere")
    again = open_study(server, storage)
    assert again.has_ended
    assert again.trials == study.trials
    assert [trial.run_id for trial in again.trials] == ["run-1", "run-2", "run-3"]
    server.runs.clear()  # as if on another tracking server, which gets everything
    again = open_study(server, storage)
    with again:
        again.deliver_all(3)
    assert [run.status for run in server.runs.values()] == ["KILLED", "FINISHED", "FAILED"]


def test_a_failed_trial_that_is_trained_again_is_recorded_again(server, tmp_path):
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    assert deliver(study)
    failed = trials[2]
    again = resumed(open_study(server, tmp_path), study, trials)
    again.on_trial_start(0, trials, failed)
    for number in (1, 2, 3):
        failed.epoch(again, number, 0.7, done=number == 3)
    failed.complete(again)
    assert deliver(again)
    assert again.trials[2].state == "finished"
    recorded = server.runs["run-3"]
    assert recorded.status == "FINISHED"
    assert recorded.tags["trial.state"] == "finished"
    assert (recorded.lines["Result"], recorded.lines["Validation"][:8]) == ("", "UA 70.0%")
    assert len(server.runs) == 3


def test_a_study_does_not_end_before_its_trials_are_recorded(server, tmp_path):
    server.away = True
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    with pytest.raises(SerRayError, match=r"only 3 of 4 trials have ended.*resumes"), study:
        study.deliver_all(4)
    again = open_study(server, tmp_path)
    again.set_state(study.get_state())
    again.on_experiment_end(trials[:2])
    with pytest.raises(TrackingError, match="away"), again:
        again.deliver_all(2)
    server.away = False
    last = open_study(server, tmp_path)
    last.set_state(again.get_state())
    last.on_experiment_end(trials[:2])
    with last:
        last.deliver_all(2)
    assert [run.status for run in server.runs.values()] == ["KILLED", "FINISHED"]


def test_runs_of_trials_that_ray_tune_forgot_end_as_lost(server, tmp_path):
    study = open_study(server, tmp_path)
    trials = run(study, tmp_path)
    state = study.get_state()
    forgotten = TuneTrial("gone", lr_max=4e-2)
    study.on_step_begin(1, [*trials, forgotten])
    study.on_trial_start(1, trials, forgotten)
    assert deliver(study)
    again = open_study(server, tmp_path)
    again.set_state(state)
    again.on_step_begin(0, trials)
    assert deliver(again)
    assert [trial.trial_id for trial in again.trials] == ["s", "f", "x"]
    lost = server.runs["run-4"]
    assert (lost.status, lost.tags["trial.state"]) == ("KILLED", "lost")


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ValueError, "FAILED")],
)
def test_the_run_of_a_study_that_an_error_ends_is_killed_or_failed(
    server, tmp_path, monkeypatch, error, status
):
    study = open_study(server, tmp_path)
    ends: list[str] = []
    monkeypatch.setattr(study.parent, "finish", ends.append, raising=False)
    abandon = partial(Tracker.abandon, study.parent)
    monkeypatch.setattr(study.parent, "abandon", abandon, raising=False)
    with pytest.raises(error), study:
        raise error
    assert ends == [status]
    assert "study" not in thread_names()


def test_no_run_of_a_study_that_is_stopped_is_left_running(server, tmp_path):
    stopped = pytest.raises(KeyboardInterrupt)
    with stopped, open_study(server, tmp_path) as study:
        run(study, tmp_path)
        running = TuneTrial("r", lr_max=4e-2)
        study.on_trial_start(9, [running], running)
        raise KeyboardInterrupt
    statuses = sorted(found.status for found in server.runs.values())
    assert statuses == ["FAILED", "FINISHED", "KILLED", "KILLED"]  # the scheduler stopped one too


def test_checkpoints_of_ended_trials_are_deleted_only_when_the_study_ends(server, tmp_path):
    """Trials that Ctrl-C interrupted keep theirs."""
    names = ["ended", "before", "gone", "interrupted"]
    trials = [TuneTrial(name) for name in names]
    study = open_study(server, tmp_path)
    kept = {name: Path(study.folder.path, name, "checkpoint_000000") for name in names}
    for trial in trials:
        kept[trial.trial_id].mkdir(parents=True)
        trial.checkpoint = SimpleNamespace(path=str(kept[trial.trial_id]))
    kept["gone"].rmdir()
    # It ended under an earlier driver, with a report as all ended trials have.
    trials[1].status, trials[1].last_result = "TERMINATED", {"problem": "no good"}
    study.on_step_begin(0, trials)
    for trial in (trials[0], trials[2]):
        trial.complete(study)
    assert kept["ended"].exists()
    for trial in trials:
        trial.status = "TERMINATED"  # Ray Tune sets this on interrupted trials as well
    study.on_experiment_end(trials)
    assert [name for name in names if kept[name].exists()] == ["interrupted"]


def test_a_log_gets_a_line_at_every_start_and_end(server, tmp_path):
    study = open_study(server, tmp_path)
    run(study, tmp_path)
    output = io.StringIO()
    with TrialTable(Console(file=output, width=200), 3, "SPEAKER-DEPENDENT") as table:
        table(study.trials)
        table(study.trials)
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert "trial   1 pruned" in lines[0]
    assert "validation UA 10.0% SPEAKER-DEPENDENT after 1 of 3 epochs" in lines[0]
    assert "after 0 epochs: ValueError: no good" in lines[2]


def test_a_log_gets_a_line_about_running_trials_from_time_to_time(server, tmp_path, monkeypatch):
    running = TrialRecord("r", 1, {"seed": 0}, RECIPE, rows=[], state="running")
    output = io.StringIO()
    with TrialTable(Console(file=output, width=200), 1) as table:
        table([running])
        running.rows.append({"epoch": 1.0, "val/ua": 0.25, "val/loss": 1.0})
        table([running])
        monkeypatch.setattr(trial_table, "LOG_SECONDS", 0.0)
        table([running])
    assert output.getvalue().splitlines() == [
        "trial   1 running   seed 0",
        "trial   1 running   seed 0  validation UA 25.0% after 1 of 3 epochs",
    ]


def test_a_terminal_gets_a_table(server, tmp_path):
    study = open_study(server, tmp_path)
    run(study, tmp_path)
    output = io.StringIO()
    with TrialTable(Console(file=output, width=120, force_terminal=True), 3) as table:
        table(study.trials)
    text = output.getvalue()
    assert all(
        word in text for word in ("pruned", "finished", "failed", "60.0%", "3/3", "2.00e-02")
    )
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert {line.split()[1] for line in plain.splitlines() if "best" in line} == {"finished"}


def test_a_table_has_a_column_for_each_searched_name_and_says_how_long_it_will_take(monkeypatch):
    now = iter([0.0, 0.0, 60.0])
    monkeypatch.setattr(trial_table, "time", SimpleNamespace(monotonic=lambda: next(now)))
    records = [
        TrialRecord(str(number), number, {"weight_decay": 0.1}, RECIPE, state="running")
        for number in (1, 2)
    ]
    table = TrialTable(Console(file=io.StringIO(), force_terminal=True), 4)
    table(records)
    table([replace(records[0], state="finished"), records[1]])  # a quarter of it in a minute
    found = table.table()
    assert [column.header for column in found.columns] == [
        "trial", "state", "weight_decay", "epoch", "val UA", "",
    ]  # fmt: skip
    assert "about 3:00 left" in str(found.caption)


def test_a_search_of_four_names_fits_on_a_terminal_of_80_columns():
    row = {"epoch": 1.0, "val/ua": 0.5, "val/loss": 1.0}
    values = {"lr_max": 0.1, "lr_ratio": 20.0, "feature": "spectrogram", "weight_decay": 0.01}
    output = io.StringIO()
    table = TrialTable(Console(file=output, no_color=True, width=80), 2)
    failed = TrialRecord("2", 2, values, RECIPE, state="failed", problem="ValueError: no good")
    table([TrialRecord("1", 1, values, RECIPE, rows=[row], state="finished"), failed])
    table.console.print(table.table())
    shown = output.getvalue().splitlines()[-4:]
    assert shown[0].split() == ["trial", "state", *values, "epoch", "val", "UA"]
    assert shown[1].split()[-5:] == ["spectrogram", "1.00e-02", "1/3", "50.0%", "best"]
    assert shown[2].split()[-3:] == ["1.00e-02", "0/3", "ValueErr…"]


def test_a_table_that_is_too_long_for_the_screen_shows_the_best_trial():
    row = {"epoch": 1.0, "val/ua": 0.5, "val/loss": 1.0}
    records = [
        TrialRecord(str(number), number, {}, RECIPE, rows=[row], state="pruned")
        for number in range(1, 9)
    ]
    worse = row | {"val/ua": 0.25}
    records.append(TrialRecord("9", 9, {}, RECIPE, rows=[worse], state="finished"))
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, no_color=True, width=80, height=9)
    table = TrialTable(console, 10)
    table(records)
    console.print(table.table())
    (best,) = (line for line in output.getvalue().splitlines() if "best" in line)
    assert "finished" in best


def test_the_name_that_determines_the_score_has_the_highest_importance():
    dimensions = TuneConfig(
        space=("lr_max=loguniform(1e-4,1e-2)", "lr_ratio=choice(10)", "feature=choice(mel,mfcc)")
    ).dimensions
    trials = []
    for index in range(24):
        lr_max = 1e-4 * 100 ** (index / 23)
        values = {"lr_max": lr_max, "lr_ratio": 10.0, "feature": ("mel", "mfcc")[index % 2]}
        row = {"epoch": 1.0, "val/ua": index / 24, "val/wa": 0.0, "val/loss": 1.0}
        trials.append(
            TrialRecord(str(index), index + 1, values, RECIPE, rows=[row], state="finished")
        )
    importance = importance_of(trials, dimensions)
    assert importance["lr_max"] > 0.9
    assert sum(importance.values()) == pytest.approx(1.0)
    assert importance_of(trials[:3], dimensions) == {}


def test_optuna_reads_the_search_from_the_file_that_is_kept(server, tmp_path):
    study = open_study(server, tmp_path)
    run(study, tmp_path)
    dimensions = TuneConfig(
        space=("lr_max=loguniform(1e-4,1e-1)", "lr_ratio=choice(10)", "feature=choice(mel)")
    ).dimensions
    trials = [
        replace(trial, values=trial.values | {"lr_ratio": 10.0, "feature": "mel"})
        for trial in study.trials
    ]
    journal = tmp_path / "optuna.journal"
    journal.write_text(optuna_journal("a search", trials, dimensions))
    storage = JournalStorage(JournalFileBackend(str(journal)))
    read = optuna.load_study(study_name="a search", storage=storage)
    found = [(t.user_attrs["trial"], t.state.name, t.params["lr_max"]) for t in read.trials]
    assert sorted(found) == [(1, "PRUNED", 1e-2), (2, "COMPLETE", 2e-2), (3, "FAIL", 3e-2)]
    assert read.best_value == 0.6
    assert read.best_trial.intermediate_values == {1: 0.2, 2: 0.6, 3: 0.5}


def test_every_row_of_the_table_has_the_same_columns(server, tmp_path):
    study = open_study(server, tmp_path)
    run(study, tmp_path)
    rows = trial_rows(study.trials)
    assert len({tuple(row) for row in rows}) == 1
    assert json.loads(json.dumps(rows))[1]["selected/ua"] == 0.6


def test_a_searched_number_of_epochs_is_kept_beside_the_completed_ones(server, tmp_path):
    study, trial = open_study(server, tmp_path), TuneTrial("e", epochs=40)
    study.on_trial_start(1, [trial], trial)
    trial.epoch(study, 1, 0.3, done=True)
    (row,) = trial_rows(study.trials)
    assert (row["epochs"], row["completed"]) == (40, 1)
