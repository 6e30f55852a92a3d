"""The tables of a search: one row for each trial, and the importance of each searched name."""

from collections.abc import Sequence
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
    distributions = {item.name: _optuna_distribution(item) for item in dimensions}
    scored = [
        trial
        for trial in trials
        if trial.succeeded and all(item.holds(trial.values[item.name]) for item in dimensions)
    ]
    for trial in scored:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.values, distributions=distributions, value=trial.selected["val/ua"]
            )
        )
    if len({trial.selected["val/ua"] for trial in scored}) < 4:
        return {}
    shares = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in shares.items()}


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
