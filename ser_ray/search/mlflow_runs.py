"""The runs of a study's trials in MLflow, each nested in the study's own run.

If the tracking server stops answering, the study logs a warning and the trials continue. What the
server missed is delivered when it answers again, or when the same command is given. Each run is
tagged with the id of its trial, so a later driver finds it.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.errors import TrackingError
from ser_ray.evaluation.rendering import as_artifact, store_page
from ser_ray.evaluation.results import REPORT
from ser_ray.search.record import TrialRecord
from ser_ray.search.space import RATIO
from ser_ray.shards.read import ShardSet
from ser_ray.storage.paths import location_inside
from ser_ray.tracking.about import Kind, data_line, dataset_of
from ser_ray.tracking.provenance import provenance
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.metrics import selected_metrics

TRIAL_ID = "trial.id"
"""Tag of a trial's run."""
RETRY_SECONDS = 10.0
"""Time between two attempts to reach a tracking server that did not answer."""
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""MLflow's status of a trial's run."""

logger = logging.getLogger(__name__)


def page_of(trial: TrialRecord) -> str:
    """Where a trial's page is, inside the study's folder."""
    return f"trials/{trial.number:03d}.html"


class TrialRuns:
    """The runs of a study's trials.

    Args:
        parent: the study's own run.
        folder: the study's folder.
        experiment: MLflow experiment of the runs.
        shards: what the trials are trained on.
        tags: tags of every run; `protocol` and `corpus` are shown beside every score.
        again: returns the command that trains the recipe of a run.
    """

    def __init__(
        self,
        parent: Tracker,
        folder: RunFolder,
        experiment: str,
        shards: ShardSet,
        tags: Mapping[str, str],
        again: Callable[[str], str],
    ) -> None:
        self.parent, self.folder, self.experiment = parent, folder, experiment
        self.shards, self.tags, self.again = shards, tags, again
        self._dataset = dataset_of(shards)
        self.lock = Lock()
        """Held while a trial's record changes."""
        self._unclaimed = parent.nested_runs(TRIAL_ID)
        """Runs that an earlier driver opened, by the id of their trial."""
        self._lost: list[str] = []
        """Runs of trials that Ray Tune has forgotten."""
        self._trackers: dict[str, Tracker] = {}
        self._retry_at = 0.0

    def claim(self, trial: TrialRecord) -> None:
        """Find the run that an earlier driver opened for a trial."""
        trial.run_id = self._unclaimed.pop(trial.trial_id, "")
        if not trial.run_id:  # there is none yet, or it is on another tracking server
            trial.delivered, trial.recorded = 0, False

    def give_up_unclaimed(self) -> None:
        """Mark the other runs as lost: Ray Tune forgot their trials when its driver was killed."""
        self._lost += self._unclaimed.values()
        self._unclaimed = {}

    def deliver(self, trials: Sequence[TrialRecord], *, at_once: bool = False) -> bool:
        """Deliver what MLflow does not have yet; returns whether it has everything.

        Args:
            trials: all trials of the study; their `delivered` and `recorded` are updated.
            at_once: do not wait for `RETRY_SECONDS` after a failed attempt.
        """
        if time.monotonic() < self._retry_at and not at_once:
            return False
        try:
            for trial in trials:
                if trial.state != "waiting" and not trial.recorded:
                    self._deliver_trial(trial)
            while self._lost:
                run = Tracker(self.parent.uri, self._lost[0])
                run.set_tags({"trial.state": "lost"})
                run.finish("KILLED")
                self._lost.pop(0)
        except TrackingError as error:
            logger.warning("%s", error)
            self._trackers.clear()  # the next attempt logs what they could not deliver again
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def abandon(self, trials: Sequence[TrialRecord], error: BaseException) -> None:
        """Close the runs of the trials that an error ended; a resumed trial opens its run again."""
        for trial in trials:
            if trial.run_id and not trial.recorded:
                Tracker(self.parent.uri, trial.run_id).abandon(error)

    def _deliver_trial(self, trial: TrialRecord) -> None:
        with self.lock:
            seen = replace(trial)  # Ray Tune's loop may change the record meanwhile
        run = self._run(trial)
        epochs = zip(seen.rows, seen.learning_rates, seen.times_ms, strict=True)
        for row, learning_rates, timestamp_ms in list(epochs)[seen.delivered :]:
            run.log_epoch(row, learning_rates, timestamp_ms)
        run.deliver()
        trial.delivered = max(seen.delivered, seen.epochs)
        if not seen.ended:
            return
        if seen.state == "finished":  # only a finished trial has selected weights
            run.log_scores(selected_metrics(seen.selected), seen.times_ms[-1])
        page = self._page(seen, run.run_id)
        store_page(page, location_inside(self.folder.location, page_of(seen)))
        run.log_files({REPORT: as_artifact(page)})
        run.set_tags({"trial.state": seen.state, "problem": seen.problem})
        run.describe(**self._outcome(seen))
        run.finish(STATUS[seen.state])
        with self.lock:
            trial.recorded = trial.started_ms == seen.started_ms

    def _page(self, trial: TrialRecord, run_id: str) -> str:
        from ser_ray.evaluation.pages import trial_page  # slow: matplotlib

        return trial_page(
            self._name(trial),
            f"Trial {trial.number} of {self.folder.name}: {trial.state}. {trial.problem}",
            recipe=trial.recipe,
            history=trial.rows,
            learning_rates=[rate for epoch in trial.learning_rates for rate in epoch],
            confusion=trial.selected_confusion,
            labels=self.shards.card.labels,
            tags={**self.tags, **provenance()},
            study=self.folder.name,
            run_id=run_id,
        )

    def _outcome(self, trial: TrialRecord) -> dict[str, str]:
        """The line of the description that says how a trial ended."""
        if trial.problem:
            return {"Result": f"failed after {trial.epochs} epochs: {trial.problem}"}
        ended = f"{trial.state} after {trial.epochs} of {trial.recipe.epochs} epochs"
        if not trial.rows:
            return {"Result": ended}
        on = f"{self.tags['protocol']}, {CORPORA[self.tags['corpus']]}"
        ua, wa = trial.selected["val/ua"], trial.selected["val/wa"]
        return {"Validation": f"UA {ua:.1%}, WA {wa:.1%} ({on}); {ended}"}

    def _run(self, trial: TrialRecord) -> Tracker:
        """The trial's run, opened at its first use."""
        if trial.trial_id not in self._trackers:
            is_fold = "fold" in trial.values
            kind: Kind = "fold" if is_fold else "trial"
            run = Tracker.start(
                self.parent.uri,
                self.experiment,
                name=self._name(trial),
                params=trial.recipe.to_dict() | {RATIO: trial.recipe.lr_max / trial.recipe.lr_min},
                tags={
                    **self.tags,
                    "kind": kind,
                    "mlflow.parentRunId": self.parent.run_id,
                    TRIAL_ID: trial.trial_id,
                },
                dataset=self._dataset,
                run_id=trial.run_id,
            )
            if not trial.run_id:
                trial.run_id = run.run_id
                run.log_files({"config.json": trial.recipe.to_dict()})
                whole = "the cross-validation" if is_fold else "the search"
                run.describe(
                    Run=f"{kind} {trial.number} of {whole} {self.folder.name}",
                    Data=data_line(self.shards),
                    Again=f"`{self.again(run.run_id)}`",
                )
            self._trackers[trial.trial_id] = run
        return self._trackers[trial.trial_id]

    def _name(self, trial: TrialRecord) -> str:
        """Name of a trial's run: what tells it from the others."""
        recipe = trial.recipe
        if "fold" in trial.values:
            return f"fold {recipe.fold} seed {recipe.seed}"
        lr_max = f"{recipe.lr_max:.1e}".replace("e-0", "e-")
        return f"{trial.number:03d} {recipe.feature} {lr_max}"
