"""The driver's side of a study: it keeps a record of every trial, for display and for MLflow.

Ray Tune calls the study in its loop for everything that happens to a trial. A thread delivers the
records to MLflow (`ser_ray.search.mlflow_runs`), so a slow or absent tracking server does not delay
the loop.

A killed driver loses nothing: the last result of a trial holds all its epochs, and Ray Tune stores
it in its snapshots together with the study's own state (`get_state`). When a study has ended, its
records are written to `trials.json`.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ray import tune

from ser_ray.cluster import require_kept
from ser_ray.distributed.config import RunConfig
from ser_ray.distributed.launch import command_like, environment
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import SerRayError, TrackingError
from ser_ray.search.actor import TrialSetup
from ser_ray.search.mlflow_runs import TrialRuns
from ser_ray.search.ray_internals import last_result
from ser_ray.search.record import TrialRecord
from ser_ray.search.space import recipe_of
from ser_ray.storage.atomic import write_file
from ser_ray.tracking.about import Kind, data_line, dataset_of, run_tags
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker, now_ms, run_to_resume
from ser_ray.training.config import TrainConfig

RECORDS = "trials.json"
"""File in the folder of a study that has ended: the records of its trials."""
POLL_SECONDS = 0.2
REMEMBERED = ("number", "delivered", "recorded", "started_ms", "ended_ms")
"""Fields of a record that do not follow from the trial's last result."""

Show = Callable[[list[TrialRecord]], None]
"""Shows the trials; called whenever something has happened to one."""


class Study(tune.Callback):
    """Keeps the records of a study's trials, shows them and delivers them to MLflow.

    Args:
        folder: the study's folder.
        recipe: the recipe that drawn values go into.
        runs: the trials' runs in MLflow.
        show: shows the trials.
    """

    def __init__(self, folder: RunFolder, recipe: TrainConfig, runs: TrialRuns, show: Show) -> None:
        self.folder, self.recipe, self.runs, self.show = folder, recipe, runs, show
        self.parent = runs.parent
        self.records: dict[str, TrialRecord] = {}
        self.has_ended = False
        """All trials ended under an earlier driver, which stored their records."""
        self._remembered: dict[str, dict[str, Any]] = {}
        self._lock, self._stop = runs.lock, Event()
        self._thread = Thread(target=self._deliver_until_stopped, name="study", daemon=True)
        self._read_records()

    def __enter__(self) -> "Study":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._deliver_all()
        if error is not None:
            self.runs.abandon(self.trials, error)
            self.parent.abandon(error)

    @property
    def trials(self) -> list[TrialRecord]:
        """The records by number."""
        with self._lock:
            return sorted(self.records.values(), key=lambda trial: trial.number)

    def settle(self, expected: int) -> None:
        """Make sure that all trials have ended and that MLflow has them.

        Raises:
            SerRayError: fewer than `expected` trials have ended.
            TrackingError: the tracking server does not answer; the same command delivers the rest.
        """
        ended = sum(trial.ended for trial in self.trials)
        if ended < expected:
            raise SerRayError(
                f"{self.folder.name}: only {ended} of {expected} trials have ended, although Ray "
                "Tune has stopped; the same command resumes the others"
            )
        if not self._deliver_all():
            raise TrackingError(
                f"{self.parent.uri}: the tracking server does not answer, so some of the "
                f"{len(self.records)} trials are not in it yet; they have all ended, and the same "
                "command delivers them when it answers again"
            )

    def finish(self) -> None:
        """Store the records and close the study's run."""
        self.store()
        self.parent.finish("FINISHED")

    def store(self) -> None:
        """Store the records of trials that have all ended; the same command will read them."""
        records = json.dumps([trial.to_dict() for trial in self.trials]).encode()
        write_file(self.folder.filesystem, f"{self.folder.path}/{RECORDS}", records)

    def _read_records(self) -> None:
        try:
            with self.folder.filesystem.open_input_stream(
                f"{self.folder.path}/{RECORDS}"
            ) as stream:
                saved = json.loads(stream.read())
        except FileNotFoundError:
            return
        for values in saved:
            record = TrialRecord.from_dict(values, self.recipe)
            self.runs.claim(record)
            self.records[record.trial_id] = record
        self.has_ended = True

    # Ray Tune calls the following methods in its loop.

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Open records for the trials that Ray Tune has restored or drawn."""
        self._open_records(trials)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts or resumes, perhaps in the step in which it was drawn."""
        self._open_records(trials)
        self._change(
            trial, state="running", problem="", stopped=False, started_ms=now_ms(), recorded=False
        )

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial completed an epoch or found that it cannot continue."""
        # Ray Tune has set `done` if the scheduler stops the trial now. It stores this addition.
        result["stopped"] = bool(result.get("done"))
        with self._lock:
            self.records[trial.trial_id].update(result)
        self.show(self.trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended by itself, or the scheduler stopped it."""
        state = self.records[trial.trial_id].end_state
        self._change(trial, state=state, ended_ms=now_ms())

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial's process failed too often, perhaps before its first start."""
        self._open_records(trials)
        lines = Path(trial.error_file).read_text().splitlines() if trial.error_file else []
        reasons = [line.strip() for line in lines if line.strip()]
        problem = reasons[-1] if reasons else "no reason given"
        self._change(trial, state="failed", problem=problem, ended_ms=now_ms())

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Delete the checkpoints of ended trials, now that Ray Tune has stored its last snapshot.

        In an earlier snapshot such a trial may still be running; it would resume from there.
        """
        self._open_records(trials)  # if all restored trials had ended, there was no step before
        for trial in trials:
            if self.records[trial.trial_id].ended and trial.checkpoint is not None:
                self.folder.delete(trial.checkpoint.path.removeprefix(f"{self.folder.path}/"))

    def get_state(self) -> dict[str, Any]:
        """What Ray Tune stores with every snapshot of the trials."""
        return {
            trial.trial_id: {name: getattr(trial, name) for name in REMEMBERED}
            for trial in self.trials
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned under an earlier driver."""
        self._remembered = state

    def _open_records(self, trials: list[Any]) -> None:
        """Open a record for every new trial; the order of new trials gives their numbers."""
        new = [trial for trial in trials if trial.trial_id not in self.records]
        for trial in new:
            self._open_record(trial)
        if new:
            self.show(self.trials)
        self.runs.give_up_unclaimed()  # Ray Tune restores all trials at once

    def _open_record(self, trial: Any) -> None:
        taken = [item["number"] for item in self._remembered.values()]
        taken += [record.number for record in self.records.values()]
        record = TrialRecord(
            trial_id=trial.trial_id,
            number=max(taken, default=0) + 1,
            values=trial.config,
            recipe=recipe_of(self.recipe, trial.config),
        )
        if "history" in (result := last_result(trial)):
            record.update(result)
        for name, value in self._remembered.get(trial.trial_id, {}).items():
            setattr(record, name, value)
        self.runs.claim(record)
        if trial.status == trial.TERMINATED:
            record.state = record.end_state
        with self._lock:
            self.records[trial.trial_id] = record

    def _change(self, trial: Any, **values: Any) -> None:
        with self._lock:
            for name, value in values.items():
                setattr(self.records[trial.trial_id], name, value)
        self.show(self.trials)

    def _deliver_until_stopped(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.runs.deliver(self.trials)

    def _deliver_all(self) -> bool:
        self._stop.set()
        self._thread.join()
        return self.runs.deliver(self.trials, at_once=True)


def open_study(
    setup: TrialSetup,
    folder: RunFolder,
    run: RunConfig,
    kind: Kind,
    label: str,
    identity: dict[str, Any],
    params: dict[str, Any],
    show: Show,
) -> Study:
    """Open a study's run in MLflow, or the run of an interrupted study.

    Args:
        setup: what all trials share.
        folder: the study's folder.
        run: where the study is recorded.
        kind: whether it is a search or a cross-validation.
        label: the protocol, and whether it is speaker-dependent.
        identity: the settings that identify the study, without its shards.
        params: parameters of the study's run.
        show: shows the trials.

    Raises:
        CheckpointError: the folder belongs to another study.
        ResourcesError: the tracking store is in a folder that Ray deletes after the job.
        TrackingError: the tracking store cannot be reached.
    """
    card = setup.shards.card
    identity = identity | {"shards": card.fingerprint}
    folder.require_same(identity)
    tags = run_tags(kind, label, setup.shards)
    uri = resolve_uri(run.tracking_uri)
    require_kept(uri)
    tracker = Tracker.start(
        uri,
        run.experiment,
        name=folder.name,
        params=params,
        tags=tags,
        dataset=dataset_of(setup.shards),
        run_id=run_to_resume(uri, folder.record()),
    )
    tracker.describe(
        Run=f"a {kind}; its trials are nested in it, its files are in `{folder.location}`",
        Data=data_line(setup.shards),
        Again=f"`{tags['command']}`",
    )
    tracker.log_files({"environment.json": environment()})
    folder.update_record(run_id=tracker.run_id, tracking_uri=uri, identity=identity)
    again = partial(command_like, shards_location=setup.shards.uri, run=run)
    runs = TrialRuns(tracker, folder, run.experiment, setup.shards, tags, again)
    return Study(folder, setup.recipe, runs, show)
