"""Keeps a record of every trial in the driver, for display and for MLflow.

Ray Tune calls the study in its loop whenever the state of a trial changes. A thread delivers the
records to MLflow, where each trial has a run nested in the study's run. Therefore a slow tracking
server does not delay the loop. If the server does not answer, the study logs a warning, and the
trials continue. The missing records are sent when the server answers again, or when the same
command is run again.

If the driver is killed, the next driver restores the records from Ray Tune's snapshot, in which the
last result of a trial holds all its epochs. It finds the MLflow run of each trial by a tag. When a
study has ended, its records are written to `trials.json`.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

from ray import tune

from ser_ray.distributed.mlflow_run import command_like
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import LockLostError, SerRayError, TrackingError
from ser_ray.evaluation.evaluation import REPORT
from ser_ray.evaluation.rendering import as_artifact, store_page
from ser_ray.search.actor import TrialSetup
from ser_ray.search.slots import Slots
from ser_ray.search.space import LR_RATIO, recipe_with
from ser_ray.search.trial import TrialRecord, read_records, write_records
from ser_ray.storage.paths import location_inside
from ser_ray.tracking.run_metadata import RunKind, data_line, dataset_of, scored_on
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.metrics import selected_metrics

TRIAL_ID, TRIAL_STATE = "trial.id", "trial.state"
"""Tags of a trial's MLflow run."""
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""Status of a trial's MLflow run, for each state in which a trial ends."""
POLL_SECONDS, RETRY_SECONDS = 0.2, 10.0
"""Time between two deliveries to MLflow, and the time between two attempts after a failure."""

Show = Callable[[list[TrialRecord]], None]
"""Shows the trials; called whenever a trial has changed."""

logger = logging.getLogger(__name__)


class Study(tune.Callback):
    """Keeps the records of a study's trials, shows them and delivers them to MLflow.

    Args:
        parent: tracker of the study's run in MLflow.
        folder: the study's folder.
        setup: recipe, data and weights of all trials.
        slots: number of concurrent trials, and the resources of each.
        run: settings of the study, such as the MLflow experiment of the runs.
        tags: tags of the study's run. The runs of the trials have the same tags, except `kind`.
            `protocol` and `corpus` are shown beside every score.
        show: shows the trials.
    """

    def __init__(
        self,
        parent: Tracker,
        folder: RunFolder,
        setup: TrialSetup,
        slots: Slots,
        run: RunConfig,
        tags: dict[str, str],
        show: Show,
    ) -> None:
        self.parent, self.folder = parent, folder
        self.trial_setup = setup  # Ray Tune calls the method `setup` of its callbacks
        self.slots = slots
        self.run, self.tags, self.show = run, tags, show
        # The data set is described now, because the shards may be unreachable later.
        self._dataset = dataset_of(setup.shards)
        self.records: dict[str, TrialRecord] = {}
        """Records by trial id. Ray Tune's loop replaces them; the delivery thread only reads."""
        self._numbers: dict[str, int] = {}
        self._earlier_runs = parent.nested_runs(TRIAL_ID)
        """MLflow runs of an earlier driver whose trials have no record yet, by trial id."""
        self._trackers: dict[str, Tracker] = {}
        """Trackers of the trials' MLflow runs, by trial id."""
        self._opened: set[str] = set()
        """Ids of the trials whose MLflow runs this driver has started or resumed."""
        self._delivered: set[str] = set()
        """Ids of the trials whose complete record is in MLflow."""
        self._lost_run_ids: list[str] = []
        """Ids of MLflow runs to close. Their trials are in no snapshot, because the driver was
        killed before the next snapshot."""
        self._stop = Event()
        self._thread = Thread(target=self._deliver_until_stopped, name="study", daemon=True)
        stored = read_records(folder, setup.recipe)
        for record in stored:
            self._add(record)
        self.has_ended = bool(stored)
        """Whether an earlier driver stored the records, because all its trials had ended."""

    def __enter__(self) -> "Study":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stop_thread()
        if error is None or isinstance(error, LockLostError):
            return
        with suppress(TrackingError):  # a tracking failure must not mask the original error
            self._deliver()
        for trial_id, run in self._trackers.items():
            if trial_id not in self._delivered:  # a trial that resumes opens its run again
                run.abandon(error)
        self.parent.abandon(error)

    @property
    def trials(self) -> list[TrialRecord]:
        """The records in the order of their numbers, with the ids of their MLflow runs."""
        trackers = self._trackers.copy()  # the delivery thread may add trackers
        run_ids = {trial_id: tracker.run_id for trial_id, tracker in trackers.items()}
        records = sorted(self.records.values(), key=lambda trial: trial.number)
        return [replace(trial, run_id=run_ids.get(trial.trial_id, "")) for trial in records]

    def deliver_all(self, expected: int) -> None:
        """Check that all trials have ended, and deliver the missing records to MLflow.

        Raises:
            LockLostError: another process has taken over the folder.
            SerRayError: fewer than `expected` trials have ended.
            TrackingError: the tracking server does not answer. The same command delivers the rest.
        """
        ended = sum(trial.ended for trial in self.records.values())
        if ended < expected:
            raise SerRayError(
                f"{self.folder.name}: only {ended} of {expected} trials have ended, although Ray "
                "Tune has stopped; the same command resumes the others"
            )
        self._stop_thread()
        self._deliver()
        self.folder.check_lock()

    def finish(self) -> None:
        """Store the records, and close the study's MLflow run."""
        self.store_records()
        self.parent.finish("FINISHED")

    def store_records(self) -> None:
        """Store the records after all trials have ended, for a later call of the same command."""
        write_records(self.folder, self.trials)

    # Ray Tune calls the following methods in its loop.

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Open records for trials that Ray Tune has restored or added.

        Raises:
            LockLostError: another process has taken over the folder. Ray Tune's loop ends.
        """
        self.folder.check_lock()
        self._open_records(trials)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial starts or resumes.

        Ray Tune may add a trial and start it in the same step, so its record may not be open yet.
        """
        self._open_records(trials)
        self._change(trial, state="running", problem="", stopped=False)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record that a trial completed an epoch, or reported a problem."""
        # If the scheduler stops the trial after this result, Ray Tune has already set `done`. The
        # snapshots keep this dict, and therefore also `stopped`.
        result["stopped"] = bool(result.get("done"))
        self.records[trial.trial_id] = self.records[trial.trial_id].updated(result)
        self.show(self.trials)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial ended, or that the scheduler stopped it."""
        self._change(trial, state=self.records[trial.trial_id].end_state)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial's process failed too often, perhaps before its first start."""
        self._open_records(trials)
        lines = Path(trial.error_file).read_text().splitlines() if trial.error_file else []
        reasons = [line.strip() for line in lines if line.strip()]
        self._change(trial, state="failed", problem=reasons[-1] if reasons else "no reason given")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Delete the checkpoints of ended trials.

        They are needed until Ray Tune has stored its last snapshot. If an earlier snapshot is
        restored, a trial that has ended since then resumes from its checkpoint. If an error ends
        Ray Tune's loop, there is no last snapshot, and a trial whose checkpoint was deleted may be
        trained again from its beginning.

        Raises:
            LockLostError: another process has taken over the folder, and needs the checkpoints.
        """
        self.folder.check_lock()
        self._open_records(trials)  # `on_step_begin` is not called if all restored trials had ended
        for trial in trials:
            if self.records[trial.trial_id].ended and trial.checkpoint is not None:
                self.folder.delete(trial.checkpoint.path.removeprefix(f"{self.folder.path}/"))

    def get_state(self) -> dict[str, int]:
        """Return the numbers of the trials. Ray Tune stores them with every snapshot."""
        return dict(self._numbers)

    def set_state(self, state: dict[str, int]) -> None:
        """Restore the numbers that `get_state` returned under an earlier driver."""
        self._numbers |= state

    def _open_records(self, trials: list[Any]) -> None:
        """Open a record for every new trial. Restored trials keep their numbers."""
        new = [trial for trial in trials if trial.trial_id not in self.records]
        for trial in new:
            next_number = max(self._numbers.values(), default=0) + 1
            record = TrialRecord(
                trial_id=trial.trial_id,
                number=self._numbers.get(trial.trial_id, next_number),
                values=trial.config,
                recipe=recipe_with(self.trial_setup.recipe, trial.config),
            ).updated(trial.last_result)
            # At the end, Ray Tune also terminates trials that have only just been added.
            if trial.status == trial.TERMINATED and (record.rows or record.problem):
                record = replace(record, state=record.end_state)
            self._add(record)
        if new:
            self.show(self.trials)
        # All restored trials have a record now. The trials of the remaining earlier runs are lost.
        self._lost_run_ids += [run.info.run_id for run in self._earlier_runs.values()]
        self._earlier_runs = {}

    def _add(self, record: TrialRecord) -> None:
        """Add a record, and find the MLflow run that an earlier driver opened for its trial."""
        self._numbers[record.trial_id] = record.number
        if run := self._earlier_runs.pop(record.trial_id, None):
            self._trackers[record.trial_id] = Tracker(self.parent.uri, run.info.run_id)
            recorded = run.data.tags.get(TRIAL_STATE), run.info.status
            if recorded == (record.state, STATUS.get(record.state)):
                self._delivered.add(record.trial_id)
        self.records[record.trial_id] = record

    def _change(self, trial: Any, **values: Any) -> None:
        self.records[trial.trial_id] = replace(self.records[trial.trial_id], **values)
        self.show(self.trials)

    # The following methods deliver the records to MLflow.

    def _stop_thread(self) -> None:
        self._stop.set()
        self._thread.join()

    def _deliver_until_stopped(self) -> None:
        pause = POLL_SECONDS
        while not self._stop.wait(pause):
            try:
                self._deliver()
                pause = POLL_SECONDS
            except TrackingError as error:
                if pause == POLL_SECONDS:
                    logger.warning("%s", error)
                pause = RETRY_SECONDS

    def _deliver(self) -> None:
        """Deliver all records that MLflow does not have yet.

        Raises:
            TrackingError: the server does not answer.
        """
        for trial in list(self.records.values()):
            if trial.state != "waiting" and trial.trial_id not in self._delivered:
                self._deliver_trial(trial)
        while self._lost_run_ids:
            run = Tracker(self.parent.uri, self._lost_run_ids[0])
            run.set_tags({TRIAL_STATE: "lost"})
            run.finish("KILLED")
            self._lost_run_ids.pop(0)

    def _deliver_trial(self, trial: TrialRecord) -> None:
        if trial.trial_id not in self._opened:
            self._open_run(trial)
        run = self._trackers[trial.trial_id]
        for epoch in zip(trial.rows, trial.learning_rates, trial.times_ms, strict=True):
            run.log_epoch(*epoch)
        run.deliver()
        if not trial.ended:
            return
        if trial.state == "finished":  # only then is the selected epoch final
            run.log_scores(selected_metrics(trial.selected), trial.times_ms[-1])
        page = self._page(trial, run.run_id)
        store_page(page, location_inside(self.folder.location, trial.page))
        run.log_files({REPORT: as_artifact(page)})
        run.describe(**trial.outcome(scored_on(self.tags)))
        run.set_tags({TRIAL_STATE: trial.state})
        run.finish(STATUS[trial.state])
        self._delivered.add(trial.trial_id)

    def _open_run(self, trial: TrialRecord) -> None:
        """Start the MLflow run of a trial, or resume the run that an earlier driver started."""
        study_kind, shards = self.tags["kind"], self.trial_setup.shards
        kind: RunKind = "fold" if study_kind == "cross-validation" else "trial"
        earlier = self._trackers.get(trial.trial_id)
        values = trial.values
        searched = {LR_RATIO: values[LR_RATIO]} if LR_RATIO in values else {}  # no recipe has it
        run = Tracker.start(
            self.parent.uri,
            self.run.experiment,
            name=trial.name,
            params=trial.recipe.to_dict() | {"search": searched},
            tags={
                **self.tags,
                "kind": kind,
                "mlflow.parentRunId": self.parent.run_id,
                TRIAL_ID: trial.trial_id,
                TRIAL_STATE: "running",
            },
            dataset=self._dataset,
            run_id="" if earlier is None else earlier.run_id,
        )
        self._trackers[trial.trial_id] = run
        if earlier is None:
            run.log_files({"config.json": trial.recipe.to_dict()})
            run.describe(
                Run=f"trial {trial.number} of the {study_kind} {self.folder.name}",
                Data=data_line(shards),
                Again=f"`{command_like(run.run_id, shards.locations, self.run)}`",
            )
        self._opened.add(trial.trial_id)

    def _page(self, trial: TrialRecord, run_id: str) -> str:
        from ser_ray.evaluation.pages import trial_page  # slow: matplotlib

        return trial_page(
            trial.name,
            f"Trial {trial.number} of {self.folder.name}: {trial.state}. {trial.problem}",
            recipe=trial.recipe,
            history=trial.rows,
            learning_rates=[rate for epoch in trial.learning_rates for rate in epoch],
            confusion=trial.selected_confusion,
            labels=self.trial_setup.shards.card.labels,
            tags=self.tags,
            study=self.folder.name,
            run_id=run_id,
        )
