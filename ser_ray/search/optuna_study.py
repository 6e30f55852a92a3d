"""Converts a search to an Optuna study, and computes the importance of its hyperparameters."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ser_ray.search.space import Dimension
from ser_ray.search.trial import TrialRecord
from ser_ray.search.tune_run import optuna_distribution

if TYPE_CHECKING:
    from optuna import Study


def importance_of(
    trials: Sequence[TrialRecord], dimensions: Sequence[Dimension]
) -> dict[str, float]:
    """Return the importance of each hyperparameter by PED-ANOVA (Watanabe et al. 2023).

    Returns:
        Shares that sum to 1, by name. Empty if the trials have fewer than four different UAs,
        because importances of so few scores would be chance.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    # Optuna's evaluator ignores trials in the state PRUNED.
    _add_trials(study, trials, dimensions, {"finished": "COMPLETE", "pruned": "COMPLETE"})
    if len({trial.value for trial in study.trials}) < 4:
        return {}
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())


def optuna_journal(
    name: str, trials: Sequence[TrialRecord], dimensions: Sequence[Dimension]
) -> str:
    """Return a search as the content of a file for Optuna's JournalStorage.

    `optuna-dashboard FILE` shows the file, and `optuna.load_study` reads it.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with TemporaryDirectory() as folder:
        journal = Path(folder, "journal")
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        states = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
        _add_trials(study, trials, dimensions, states)
        return journal.read_text()


def _add_trials(
    study: "Study",
    trials: Sequence[TrialRecord],
    dimensions: Sequence[Dimension],
    states: Mapping[str, str],
) -> None:
    """Add trials to a study, with the validation UA of each epoch as intermediate values.

    Args:
        dimensions: the space of the search. Trials with values outside this space are left out.
        states: Optuna's name for each state. Trials in other states are left out.
    """
    from optuna.trial import TrialState, create_trial

    for trial in trials:
        is_in_space = all(item.contains(trial.values[item.name]) for item in dimensions)
        if trial.state not in states or not is_in_space:
            continue
        frozen = create_trial(
            state=TrialState[states[trial.state]],
            params=trial.values,
            distributions={item.name: optuna_distribution(item) for item in dimensions},
            # Optuna does not allow a score for a failed trial.
            value=None if trial.problem else trial.selected.get("val/ua"),
            intermediate_values={int(row["epoch"]): row["val/ua"] for row in trial.rows},
            user_attrs={
                "trial": trial.number,
                "MLflow run": trial.run_id,
                "problem": trial.problem,
            },
        )
        if trial.times_ms:
            frozen.datetime_start = datetime.fromtimestamp(trial.started_ms / 1000)
            frozen.datetime_complete = datetime.fromtimestamp(trial.times_ms[-1] / 1000)
        study.add_trial(frozen)
