"""What happens to the trials of a study, line by line, as Ray Tune's loop in the driver sees it."""

from pathlib import Path
from typing import Any

from ray import tune

from ser_ray.distributed.run_folder import GROUPS
from ser_ray.search.study_journal import StudyJournal
from ser_ray.tracking.tracker import now_ms


class JournalCallback(tune.Callback):
    """Runs in Tune's loop, in the driver: writes what happens to the trials down."""

    def __init__(self, journal: StudyJournal) -> None:
        self.journal = journal
        self._seen: set[str] = set()
        self._ended: set[str] = set()
        """Trials that came to their end, which those that an interruption stops do not."""

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Trials were drawn: their order is that of their numbers."""
        for trial in trials:
            if trial.trial_id not in self._seen:
                self._seen.add(trial.trial_id)
                self._write(trial, event="drawn", values=trial.config)
                if trial.status == trial.TERMINATED:  # in an earlier start
                    self._ended.add(trial.trial_id)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts or goes on."""
        self._write(trial, event="start", values=trial.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial did an epoch or found that it cannot go on; `stopped` is Tune's decision."""
        if "problem" in result:
            self._write(trial, event="problem", problem=result["problem"])
        else:
            stopped = bool(result.get("done")) and not result.get("complete")
            known = {name: result[name] for name in ("row", "lr", "confusion")}
            self._write(trial, event="epoch", stopped=stopped, **known)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial ended, by itself or stopped by its scheduler."""
        self._ended.add(trial.trial_id)
        self._write(trial, event="end")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        lines = Path(trial.error_file).read_text().splitlines() if trial.error_file else []
        reasons = [line.strip() for line in lines if line.strip()]
        self._write(trial, event="problem", problem=reasons[-1] if reasons else "no reason given")
        self._write(trial, event="end")

    def get_state(self) -> None:
        """Tune asks before every snapshot of the study: what is stored must know no less than it.

        A trial that ended in the snapshot only would never end in the journal.
        """
        self.journal.store()

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Tune's last snapshot is stored: what trials that ended would go on from can go.

        Not before: a snapshot of a moment ago still has them running, and starts them again.
        """
        folder = self.journal.folder
        for trial in trials:
            if trial.trial_id in self._ended:
                folder.delete(f"{GROUPS}/{trial.trial_id}")
                if trial.checkpoint is not None:
                    folder.delete(f"{trial.trial_id}/{Path(trial.checkpoint.path).name}")

    def _write(self, trial: Any, **entry: Any) -> None:
        self.journal.append(trial.trial_id, **entry, timestamp_ms=now_ms())
