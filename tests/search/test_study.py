import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import SerRayError, TrackingError
from ser_ray.search import display
from ser_ray.search import study as module
from ser_ray.search.display import TrialTable
from ser_ray.search.outcome import importance_of, trial_rows
from ser_ray.search.space import TuneConfig
from ser_ray.search.study import Study
from ser_ray.search.study_journal import StudyJournal
from ser_ray.search.trial_journal import JournalCallback
from ser_ray.search.trial_log import TrialLog
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.config import TrainConfig

RECIPE = TrainConfig(epochs=3, keep="best")
TAGS = {"protocol": "speaker-3 fold 1 of 3 (speaker-independent)", "corpus": "table"}


class Server:
    """A tracking server in memory, which can be away."""

    def __init__(self) -> None:
        self.away = False
        self.runs: dict[str, SimpleNamespace] = {}

    def start(self, uri, experiment, *, name, params, tags, run_id):
        self.require()
        run_id = run_id or f"run-{len(self.runs) + 1}"
        run = SimpleNamespace(
            name=name, params=params, tags=dict(tags), points=[], status="", files={}
        )
        self.runs.setdefault(run_id, run)
        return Client(self, run_id)

    def require(self) -> None:
        if self.away:
            raise TrackingError("away")


class Client:
    def __init__(self, server: Server, run_id: str) -> None:
        self.server, self.run_id = server, run_id
        self.waiting: list[tuple[str, int, float]] = []
        self.run = server.runs[run_id]

    def log_metrics(self, metrics, step, timestamp_ms):
        self.waiting += [(name, step, value) for name, value in metrics.items()]

    log_epoch = Tracker.log_epoch

    def deliver(self):
        self.server.require()
        self.run.points += self.waiting
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


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(module, "Tracker", server)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)
    return server


def open_study(storage: Path | str) -> Study:
    journal = StudyJournal(RunFolder(str(storage), "search"))
    parent = SimpleNamespace(uri="memory", run_id="parent", abandon=lambda error: None)
    return Study(
        journal, RECIPE, parent,  # type: ignore[arg-type]
        name="search", experiment="tests", labels=("calm", "sad"), tags=TAGS,
        show=lambda trials: None,
    )  # fmt: skip


def tune_trial(trial_id: str, **values: object) -> SimpleNamespace:
    return SimpleNamespace(
        trial_id=trial_id, config=values, checkpoint=None, error_file=None, status="RUNNING",
        TERMINATED="TERMINATED",
    )  # fmt: skip


def epoch(number: int, val_ua: float, *, done: bool = False) -> dict[str, object]:
    row = {"epoch": float(number), "train_loss": 1.0, "train_wa": 0.3}
    row |= {"val_ua": val_ua, "val_wa": val_ua, "val_f1": 0.25, "val_loss": 1.0}
    confusion = [[number, 0], [0, 1]]
    return {"row": row, "lr": [0.1, 0.2], "confusion": confusion, "done": done}


def write(storage: Path | str) -> JournalCallback:
    """One trial that is stopped, one whose process is lost and then finishes, one that fails."""
    journal = StudyJournal(RunFolder(str(storage), "search"))
    tell = JournalCallback(journal)
    stopped, finished, failed = (
        tune_trial("s", lr_max=1e-2),
        tune_trial("f", lr_max=2e-2),
        tune_trial("x", lr_max=3e-2),
    )
    trials = [stopped, finished, failed]
    tell.on_step_begin(0, trials)
    for trial in reversed(trials):
        tell.on_trial_start(0, trials, trial)
    tell.on_trial_result(0, trials, stopped, epoch(1, 0.1, done=True))
    tell.on_trial_complete(0, trials, stopped)
    tell.on_trial_result(0, trials, finished, epoch(1, 0.2))
    tell.on_trial_result(0, trials, finished, epoch(2, 0.6))
    tell.on_trial_start(0, trials, finished)  # it goes on from a checkpoint after the first epoch
    tell.on_trial_result(0, trials, finished, epoch(2, 0.6))
    tell.on_trial_result(0, trials, finished, epoch(3, 0.5, done=True))
    tell.on_trial_complete(0, trials, finished)
    error = journal.path.with_name("error.txt")
    error.write_text("Failure # 1\nTraceback\n  File\nValueError: no good\n\n")
    failed.error_file = str(error)
    tell.on_trial_error(0, trials, failed)
    return tell


def test_the_journal_tells_how_every_trial_went(server, tmp_path):
    write(tmp_path)
    stopped, finished, failed = open_study(tmp_path).logs
    assert [trial.number for trial in (stopped, finished, failed)] == [1, 2, 3]
    assert (stopped.state, stopped.recipe.lr_max) == ("pruned", 1e-2)
    assert (failed.state, failed.problem) == ("failed", "ValueError: no good")
    assert finished.state == "finished"
    assert [row["epoch"] for row in finished.rows] == [1, 2, 3]
    assert finished.selected["epoch"] == 2
    assert finished.selected_confusion == [[2, 0], [0, 1]]
    finished.recipe = replace(finished.recipe, keep="last")
    assert finished.selected["epoch"] == 3


def test_a_server_that_comes_back_gets_everything_once(server, tmp_path):
    server.away = True
    write(tmp_path)
    study = open_study(tmp_path)
    assert not study.deliver()
    server.away = False
    assert study.deliver()
    assert study.deliver()
    again = open_study(tmp_path)
    assert again.deliver()
    assert [run.status for run in server.runs.values()] == ["KILLED", "FINISHED", "FAILED"]
    finished = server.runs["run-2"]
    assert finished.tags["mlflow.parentRunId"] == "parent"
    assert finished.tags["trial.state"] == "finished"
    assert finished.params["lr_max"] == 2e-2
    assert [point for point in finished.points if point[0] == "val_ua"] == [
        ("val_ua", 1, 0.2), ("val_ua", 2, 0.6), ("val_ua", 3, 0.5),
    ]  # fmt: skip
    assert [step for name, step, _ in finished.points if name == "lr_step"] == list(range(6))
    assert ("selected_val_ua", 0, 0.6) in finished.points
    assert server.runs["run-3"].tags["problem"] == "ValueError: no good"
    pages = [run.files["report.html"] for run in server.runs.values()]
    assert "60.0%" in pages[1]
    assert "epoch 2, validation, speaker-3 fold 1 of 3 (speaker-independent)" in pages[1]
    assert "Trial 2 of search: finished" in pages[1]
    assert "Trial 3 of search: failed. ValueError: no good" in pages[2]


def test_half_a_line_is_left_for_later(server, tmp_path):
    write(tmp_path)
    journal = tmp_path / "search" / "epochs.jsonl"
    lines = journal.read_text()
    journal.write_text(lines[:-8])
    study = open_study(tmp_path)
    assert study.logs[2].state == "running"
    journal.write_text(lines)
    study.read()
    assert study.logs[2].state == "failed"


def test_a_line_that_was_cut_short_for_good_is_left_out(server, tmp_path):
    write(tmp_path)
    journal = tmp_path / "search" / "epochs.jsonl"
    journal.write_text(journal.read_text()[:-8])
    trial = tune_trial("x", lr_max=3e-2)
    JournalCallback(StudyJournal(RunFolder(str(tmp_path), "search"))).on_trial_complete(
        1, [trial], trial
    )
    assert [trial.state for trial in open_study(tmp_path).logs] == ["pruned", "finished", "failed"]


@pytest.fixture
def elsewhere(in_tmp, monkeypatch):
    """Move to another directory, as a driver on another machine would start in."""

    def move() -> None:
        (in_tmp / "elsewhere").mkdir()
        monkeypatch.chdir(in_tmp / "elsewhere")

    return move


def test_a_driver_elsewhere_knows_what_was_stored(server, in_tmp, elsewhere):
    storage = f"memory://{in_tmp}"
    write(storage).get_state()
    known = open_study(storage).logs
    elsewhere()
    logs = open_study(storage).logs
    assert [trial.state for trial in logs] == ["pruned", "finished", "failed"]
    assert logs == known


def test_the_end_of_a_study_is_stored_with_its_runs(server, in_tmp, elsewhere):
    storage = f"memory://{in_tmp}"
    write(storage)
    with open_study(storage):
        pass
    elsewhere()
    assert [trial.run_id for trial in open_study(storage).logs] == ["run-1", "run-2", "run-3"]
    assert all(trial.recorded for trial in open_study(storage).logs)


def test_the_stored_journal_gives_way_only_to_what_goes_on_from_it(in_tmp):
    folder = RunFolder(f"memory://{in_tmp}", "search")
    journal = StudyJournal(folder)
    journal.append("a", event="start")
    journal.store()
    journal.append("a", event="end")
    assert [entry["event"] for entry in StudyJournal(folder).read()] == ["start", "end"]
    journal.path.write_text(journal.path.read_text().replace('"a"', '"b"'))  # another driver's
    assert [(e["trial"], e["event"]) for e in StudyJournal(folder).read()] == [("a", "start")]


def test_a_failed_trial_that_is_trained_again_is_recorded_again(server, tmp_path):
    tell = write(tmp_path)
    assert open_study(tmp_path).deliver()
    trial = tune_trial("x", lr_max=3e-2)
    tell.on_trial_start(0, [trial], trial)
    for number in (1, 2, 3):
        tell.on_trial_result(0, [trial], trial, epoch(number, 0.7, done=number == 3))
    tell.on_trial_complete(0, [trial], trial)
    study = open_study(tmp_path)
    assert study.deliver()
    assert study.logs[2].state == "finished"
    run = server.runs["run-3"]
    assert (run.status, run.tags["trial.state"], run.tags["problem"]) == (
        "FINISHED",
        "finished",
        "",
    )
    assert len(server.runs) == 3


def test_a_study_does_not_end_before_its_trials_are_recorded(server, tmp_path):
    write(tmp_path)
    server.away = True
    study = open_study(tmp_path)
    with pytest.raises(SerRayError, match=r"only 3 of 4 trials have ended.*resumes"), study:
        study.settle(4)
    study = open_study(tmp_path)
    with pytest.raises(TrackingError, match="the same command delivers them"), study:
        study.settle(3)
    server.away = False
    with open_study(tmp_path) as study:
        study.settle(3)
    assert [run.status for run in server.runs.values()] == ["KILLED", "FINISHED", "FAILED"]


def test_trials_that_tune_forgot_are_lost(server, tmp_path):
    tell = write(tmp_path)
    forgotten = tune_trial("gone", lr_max=4e-2)
    tell.on_step_begin(1, [forgotten])
    tell.on_trial_start(1, [forgotten], forgotten)
    for _ in range(2):  # the same command again
        with open_study(tmp_path) as study:
            study.settle(3)
        assert [trial.state for trial in study.logs] == ["pruned", "finished", "failed", "lost"]
    assert server.runs["run-4"].status == "KILLED"


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED"), (ValueError, "FAILED")],
)
def test_a_study_that_was_stopped_is_killed(server, tmp_path, monkeypatch, error, status):
    study = open_study(tmp_path)
    told: list[str] = []
    monkeypatch.setattr(study.parent, "finish", told.append, raising=False)
    abandon = partial(Tracker.abandon, study.parent)
    monkeypatch.setattr(study.parent, "abandon", abandon, raising=False)
    with pytest.raises(error), study:
        raise error
    assert told == [status]


def test_checkpoints_of_ended_trials_go_at_the_end_and_not_before(tmp_path):
    """A snapshot of Tune's may not know yet that the trial ended; and an interruption ends none."""
    folder = RunFolder(str(tmp_path), "search")
    tell = JournalCallback(StudyJournal(folder))
    names = ["ended", "before", "gone", "interrupted"]
    trials = [tune_trial(name) for name in names]
    kept = {name: Path(folder.path, name, "checkpoint_000000") for name in names}
    groups = {name: Path(folder.path, "groups", name) for name in names}
    for trial in trials:
        kept[trial.trial_id].mkdir(parents=True)
        groups[trial.trial_id].mkdir(parents=True)
        trial.checkpoint = SimpleNamespace(path=str(kept[trial.trial_id]))
    kept["gone"].rmdir()
    trials[1].status = "TERMINATED"  # in an earlier start
    tell.on_step_begin(0, trials)
    for trial in (trials[0], trials[2]):
        tell.on_trial_complete(0, trials, trial)
    assert kept["ended"].exists()
    for trial in trials:
        trial.status = "TERMINATED"  # as Tune calls whatever it stopped
    tell.on_experiment_end(trials)
    for paths in (kept, groups):
        assert [name for name in names if paths[name].exists()] == ["interrupted"]


def test_a_log_gets_a_line_at_every_start_and_end(server, tmp_path):
    write(tmp_path)
    output = io.StringIO()
    with TrialTable(Console(file=output, width=200), 3, "SPEAKER-DEPENDENT") as table:
        table(open_study(tmp_path).logs)
        table(open_study(tmp_path).logs)
    lines = output.getvalue().splitlines()
    assert len(lines) == 3
    assert "trial   1/3 pruned" in lines[0]
    assert "UA 10.0% SPEAKER-DEPENDENT after 1 of 3 epochs" in lines[0]
    assert "after 0 epochs: ValueError: no good" in lines[2]


def test_a_log_gets_a_line_of_what_runs_now_and_then(server, tmp_path, monkeypatch):
    running = TrialLog("r", 1, {"seed": 0}, RECIPE, rows=[], state="running")
    output = io.StringIO()
    with TrialTable(Console(file=output, width=200), 1) as table:
        table([running])
        running.rows.append({"epoch": 1.0, "val_ua": 0.25, "val_loss": 1.0})
        table([running])
        monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
        table([running])
    assert output.getvalue().splitlines() == [
        "trial   1/1 running   seed 0",
        "trial   1/1 running   seed 0  UA 25.0% after 1 of 3 epochs",
    ]


def test_a_terminal_gets_a_table(server, tmp_path):
    write(tmp_path)
    output = io.StringIO()
    with TrialTable(Console(file=output, width=120, force_terminal=True), 3) as table:
        table(open_study(tmp_path).logs)
    text = output.getvalue()
    assert all(word in text for word in ("pruned", "finished", "failed", "60.0%", "3/3", "2.0e-02"))


def test_importance_points_at_the_name_that_matters():
    dimensions = TuneConfig(
        space=("lr_max=loguniform(1e-4,1e-2)", "lr_ratio=choice(10)", "feature=choice(mel,mfcc)")
    ).dimensions
    trials = []
    for index in range(24):
        lr_max = 1e-4 * 100 ** (index / 23)
        values = {"lr_max": lr_max, "lr_ratio": 10.0, "feature": ("mel", "mfcc")[index % 2]}
        row = {"epoch": 1.0, "val_ua": index / 24, "val_wa": 0.0, "val_loss": 1.0}
        trials.append(TrialLog(str(index), index + 1, values, RECIPE, rows=[row], state="finished"))
    importance = importance_of(trials, dimensions)
    assert importance["lr_max"] > 0.9
    assert sum(importance.values()) == pytest.approx(1.0)
    assert importance_of(trials[:3], dimensions) == {}


def test_every_row_of_the_table_has_the_same_columns(server, tmp_path):
    write(tmp_path)
    rows = trial_rows(open_study(tmp_path).logs)
    assert len({tuple(row) for row in rows}) == 1
    assert json.loads(json.dumps(rows))[1]["selected_val_ua"] == 0.6
