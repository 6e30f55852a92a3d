"""What this program needs of Ray Tune beyond its public interface.

Each entry says which public function is missing. `tests/search/test_ray_internals.py` fails when an
upgrade of Ray moves one of them.
"""

from fnmatch import fnmatch
from typing import Any

from pyarrow import fs
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from ser_ray.distributed.run_folder import RunFolder


def has_snapshot(folder: RunFolder) -> bool:
    """Whether Ray Tune has stored the state of a study in its folder.

    `tune.run(resume_config=...)` reports an error and starts from the beginning where there is no
    snapshot, and the public `Tuner.can_restore` looks for a file that only `Tuner` writes.
    """
    selector = fs.FileSelector(folder.path, allow_not_found=True)
    names = [info.base_name for info in folder.filesystem.get_file_info(selector)]
    return any(fnmatch(name, TuneController.CKPT_FILE_TMPL.format("*")) for name in names)


class RetryFailed(FIFOScheduler):
    """Trains trials in their order; a resumed study trains those that reported a problem again.

    For Ray Tune such a trial has ended like any other, and `ResumeConfig` resumes all ended trials
    or none. There is no public way to put a single trial back into the queue.
    """

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        """Queue a restored trial again if it had a problem."""
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.TERMINATED and "problem" in last_result(trial):
            trial.set_status(Trial.PENDING)


def last_result(trial: Any) -> dict[str, Any]:
    """What a trial reported last; empty before its first report.

    Ray Tune passes trials to its callbacks, but does not document how to read their results.
    """
    return trial.last_result or {}
