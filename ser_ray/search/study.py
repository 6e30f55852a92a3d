"""A study as its driver sees it: what every trial did, shown and recorded in MLflow.

The journal that `ser_ray.search.trials` writes is the one source: it is read from its first line
whenever a study is started or goes on, so the table, the runs in MLflow and the result are the same
however often the driver died. A study has one run, and every trial a run nested in it. A tracking
server that goes away costs nothing: what it missed is delivered when it answers again.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Event, Lock, Thread
from typing import Any

from ser_ray.errors import SerRayError, TrackingError
from ser_ray.search.space import RATIO, recipe_of
from ser_ray.search.study_journal import StudyJournal
from ser_ray.search.trial_log import TrialLog
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_metrics

POLL_SECONDS = 0.2
RETRY_SECONDS = 10.0
"""Between two attempts to reach a tracking server that did not answer."""
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "lost": "KILLED"}
"""MLflow's status of a trial's run."""

logger = logging.getLogger(__name__)


Show = Callable[[list[TrialLog]], None]
"""Shows the trials as they are now; called whenever something happened."""


class Study:
    """Reads a study's journal, shows its trials and delivers them to MLflow.

    Args:
        journal: what `JournalCallback` appends to; what an earlier start left is read at once.
        recipe: the recipe that drawn values go into.
        parent: the study's own run.
        experiment: MLflow experiment of the runs.
        labels: names of the rows of a confusion matrix.
        tags: tags of every trial's run; `protocol` and `corpus` stand beside every score.
        show: shows the trials.
    """

    def __init__(
        self,
        journal: StudyJournal,
        recipe: TrainConfig,
        parent: Tracker,
        *,
        name: str,
        experiment: str,
        labels: Sequence[str],
        tags: Mapping[str, str],
        show: Show,
    ) -> None:
        self.journal, self.recipe, self.parent = journal, recipe, parent
        self.name, self.experiment, self.labels = name, experiment, labels
        self.tags, self.show = dict(tags), show
        self.trials: dict[str, TrialLog] = {}
        self._trackers: dict[str, Tracker] = {}
        self._retry_at = 0.0
        self._lock, self._stop = Lock(), Event()
        self._thread = Thread(target=self._follow, daemon=True)
        self.read()

    def __enter__(self) -> "Study":
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end()
        if error is not None:
            self.parent.abandon(error)

    def settle(self, expected: int) -> None:
        """End the study, after so many trials, and deliver the last of it.

        Where enough have ended, Tune does not know the others any more: they are lost, and new ones
        have taken their place.

        Raises:
            SerRayError: fewer trials have ended.
            TrackingError: MLflow does not take it; the same command delivers it.
        """
        self.read()
        ended = sum(trial.ended for trial in self.logs)
        if ended < expected:
            raise SerRayError(
                f"{self.name}: only {ended} of {expected} trials have ended, although Ray Tune has "
                "stopped; the same command resumes the others"
            )
        for trial in self.logs:
            if not trial.ended:
                trial.state, trial.problem = "lost", "forgotten when the driver was killed"
        if not self._end():
            raise TrackingError(
                f"{self.parent.uri}: the tracking server does not answer, so some of the "
                f"{len(self.trials)} trials are not in it yet; they have all ended, and the same "
                "command delivers them when it answers again"
            )

    def _end(self) -> bool:
        """Stop following; says whether all is delivered."""
        self._stop.set()
        self._thread.join()
        self.read()
        self._retry_at = 0.0
        delivered = self.deliver()
        self.journal.store()
        return delivered

    @property
    def logs(self) -> list[TrialLog]:
        """The trials by number."""
        return list(self.trials.values())

    def read(self) -> None:
        """Take up the journal's lines since the last call."""
        with self._lock:
            entries = self.journal.read()
            for entry in entries:
                self._take(entry)
        if entries:
            self.show(self.logs)

    def _take(self, entry: dict[str, Any]) -> None:
        trial = self.trials.get(entry["trial"])
        if trial is None:
            trial = TrialLog(
                trial_id=entry["trial"],
                number=len(self.trials) + 1,
                values=entry["values"],
                recipe=recipe_of(self.recipe, entry["values"]),
            )
            self.trials[trial.trial_id] = trial
        match entry["event"]:
            case "start":
                # Once more after a lost process: it goes on from its checkpoint.
                trial.state, trial.problem, trial.stopped = "running", "", False
                trial.started_ms, trial.recorded = entry["timestamp_ms"], False
            case "epoch":
                trial.stopped = entry["stopped"]
                if entry["row"]["epoch"] > trial.epochs:  # else done again: the same numbers
                    trial.rows.append(entry["row"])
                    trial.rates.append(entry["lr"])
                    trial.confusions.append(entry["confusion"])
                    trial.times_ms.append(entry["timestamp_ms"])
            case "problem":
                trial.problem = entry["problem"]
            case "end":
                trial.state = trial.end_state
                trial.ended_ms = entry["timestamp_ms"]
            case "run" if entry["uri"] == self.parent.uri:
                trial.run_id = entry["run_id"]
            case "recorded" if entry["uri"] == self.parent.uri:
                trial.recorded = True

    def deliver(self) -> bool:
        """Deliver what MLflow has not got of the trials yet; says whether all of it was."""
        if time.monotonic() < self._retry_at:
            return False
        try:
            for trial in self.logs:
                if trial.state != "waiting" and not trial.recorded:
                    self._deliver_trial(trial)
        except TrackingError as error:
            logger.warning("%s", error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def _deliver_trial(self, trial: TrialLog) -> None:
        tracker, ended = self._tracker(trial), trial.ended  # as now: rows may come meanwhile
        for row, rates, when in list(zip(trial.rows, trial.rates, trial.times_ms, strict=False))[
            trial.delivered :
        ]:
            tracker.log_epoch(row, rates, when)
            trial.delivered += 1
        tracker.deliver()
        if not ended:
            return
        if trial.state == "finished":  # what ended before keeps no epoch
            tracker.log_metrics(selected_metrics(trial.selected), 0, trial.times_ms[-1])
            tracker.deliver()
        from ser_ray.evaluation.pages import trial_page  # slow: matplotlib

        page = trial_page(
            self._name_of(trial),
            f"Trial {trial.number} of {self.name}: {trial.state}. {trial.problem}",
            recipe=trial.recipe,
            history=trial.rows,
            learning_rates=[rate for epoch in trial.rates for rate in epoch],
            confusion=trial.selected_confusion if trial.rows else (),
            labels=self.labels,
            tags=self.tags,
        )
        tracker.log_files({"report.html": page})
        tracker.set_tags({"trial.state": trial.state, "problem": trial.problem})
        tracker.finish(STATUS[trial.state])
        self._note(trial, event="recorded")
        trial.recorded = True

    def _tracker(self, trial: TrialLog) -> Tracker:
        """The trial's run, opened at first use."""
        if trial.trial_id not in self._trackers:
            tracker = Tracker.start(
                self.parent.uri,
                self.experiment,
                name=self._name_of(trial),
                params=trial.recipe.to_dict()
                | {RATIO: trial.recipe.lr_max / trial.recipe.lr_min, "trial": trial.number},
                tags=self.tags | {"mlflow.parentRunId": self.parent.run_id},
                run_id=trial.run_id,
            )
            if not trial.run_id:
                self._note(trial, event="run", run_id=tracker.run_id)
                trial.run_id = tracker.run_id
                tracker.log_files({"config.json": trial.recipe.to_dict()})
            self._trackers[trial.trial_id] = tracker
        return self._trackers[trial.trial_id]

    def _name_of(self, trial: TrialLog) -> str:
        return f"{self.name}-{trial.number:03d}"

    def _note(self, trial: TrialLog, **entry: str) -> None:
        self.journal.append(trial.trial_id, **entry, uri=self.parent.uri)

    def _follow(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self.read()
            self.deliver()
