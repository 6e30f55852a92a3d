"""What a search found: a table of its trials, the importance of each searched name, a study."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ser_ray.search.record import TrialRecord
from ser_ray.search.space import Dimension


def trial_rows(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Tabulate the trials, every row with the same columns; `ser_ray.plots.search` draws them."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    return [
        {
            "trial": trial.number,
            "state": trial.state,
            **{name: trial.values.get(name) for name in names},
            "feature": trial.recipe.feature,
            "lr_min": trial.recipe.lr_min,
            "lr_max": trial.recipe.lr_max,
            "epochs": trial.epochs,
            "selected/epoch": trial.selected.get("epoch"),
            "selected/ua": trial.selected.get("val/ua"),
            "selected/wa": trial.selected.get("val/wa"),
            "selected/loss": trial.selected.get("val/loss"),
            "problem": trial.problem,
            "run_id": trial.run_id,
        }
        for trial in trials
    ]


def importance_of(
    trials: Sequence[TrialRecord], dimensions: Sequence[Dimension]
) -> dict[str, float]:
    """Importance of every searched name by PED-ANOVA (Watanabe et al. 2023).

    Returns:
        Shares that sum to 1; empty where fewer than four trials differ in UA.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    scored = [trial for trial in trials if trial.succeeded and _is_drawn(trial, dimensions)]
    for trial in scored:
        study.add_trial(_optuna_trial(trial, dimensions, optuna.trial.TrialState.COMPLETE))
    if len({trial.selected["val/ua"] for trial in scored}) < 4:
        return {}
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()}


def optuna_journal(
    name: str, trials: Sequence[TrialRecord], dimensions: Sequence[Dimension]
) -> str:
    """Write a finished search as an Optuna study: the text of a file for Optuna's JournalStorage.

    `optuna-dashboard FILE` shows it, and `optuna.load_study` reads it.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    states = {
        "finished": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
    }
    with TemporaryDirectory() as folder:
        journal = Path(folder, "journal")
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        for trial in trials:
            if trial.state in states and _is_drawn(trial, dimensions):
                study.add_trial(_optuna_trial(trial, dimensions, states[trial.state]))
        return journal.read_text()


def _is_drawn(trial: TrialRecord, dimensions: Sequence[Dimension]) -> bool:
    return all(item.holds(trial.values[item.name]) for item in dimensions)


def _optuna_trial(trial: TrialRecord, dimensions: Sequence[Dimension], state: Any) -> Any:
    """A trial as Optuna keeps it; its intermediate values are the validation UA by epoch."""
    import optuna

    frozen = optuna.trial.create_trial(
        state=state,
        params=trial.values,
        distributions={item.name: _optuna_distribution(item) for item in dimensions},
        value=None if trial.problem else trial.selected.get("val/ua"),
        intermediate_values={int(row["epoch"]): row["val/ua"] for row in trial.rows},
        user_attrs={"trial": trial.number, "MLflow run": trial.run_id, "problem": trial.problem},
    )
    if trial.started_ms and trial.ended_ms:
        frozen.datetime_start = datetime.fromtimestamp(trial.started_ms / 1000)
        frozen.datetime_complete = datetime.fromtimestamp(trial.ended_ms / 1000)
    return frozen


def _optuna_distribution(dimension: Dimension) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    low, high = dimension.values[0], dimension.values[-1]
    match dimension.kind:
        case "choice":
            return CategoricalDistribution(dimension.values)
        case "integer":
            return IntDistribution(low, high)
        case _:
            return FloatDistribution(low, high, log=dimension.kind == "loguniform")
