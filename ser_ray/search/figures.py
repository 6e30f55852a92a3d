"""Pictures and the table of a search: trials in, matplotlib figures and plain rows out."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from ser_ray.plots.scores import BLUE, GREEN, GREY, VERMILION, WIDTH, entitle, tidy
from ser_ray.search.space import Dimension
from ser_ray.search.trial_log import TrialLog

_KINDS = {"spectrogram": (BLUE, "o"), "mel": (VERMILION, "s"), "mfcc": (GREEN, "^")}
_BOUNDS = {"lr_min": "lr_min, lower bound", "lr_max": "lr_max, upper bound"}


def history_figure(trials: Sequence[TrialLog], title: str) -> Figure:
    """Validation UA of every trial by number, and the best so far."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel="validation UA")
    for state, colour, marker in (("finished", BLUE, "o"), ("pruned", GREY, "x")):
        some = [trial for trial in trials if trial.state == state and trial.rows]
        axes.scatter(
            [trial.number for trial in some],
            [trial.selected["val_ua"] for trial in some],
            color=colour,
            marker=marker,
            label=f"{state} ({len(some)})",
        )
    scored = [trial for trial in trials if trial.succeeded]
    best = [
        leader.selected["val_ua"]
        for leader in accumulate(scored, lambda *pair: max(pair, key=lambda trial: trial.rank))
    ]
    axes.step(
        [trial.number for trial in scored], best, where="post", color=VERMILION, label="best so far"
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    _legend(axes)
    tidy(axes)
    return entitle(figure, title)


def importance_figure(importance: dict[str, float], title: str) -> Figure:
    """Share of the differences in UA that each searched name explains."""
    figure = Figure(figsize=(WIDTH, 0.4 * len(importance) + 1.4), layout="constrained")
    axes = figure.add_subplot(xlabel="importance (PED-ANOVA)")
    names = sorted(importance, key=lambda name: importance[name])
    axes.barh(names, [importance[name] for name in names], color=BLUE)
    axes.set_xlim(0, 1)
    tidy(axes)
    return entitle(figure, title)


def bounds_figure(trials: Sequence[TrialLog], title: str) -> Figure:
    """Validation UA against each bound of the learning rate, by feature kind."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    panels = figure.subplots(2, 1)
    for axes, (name, label) in zip(panels, _BOUNDS.items(), strict=True):
        for kind, (colour, marker) in _KINDS.items():
            some = [trial for trial in trials if trial.succeeded and trial.recipe.feature == kind]
            axes.scatter(
                [getattr(trial.recipe, name) for trial in some],
                [trial.selected["val_ua"] for trial in some],
                color=colour,
                marker=marker,
                label=f"{kind} ({len(some)})",
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:.0e}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("validation UA")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        tidy(axes)
    _legend(panels[0])
    return entitle(figure, title)


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=3)


def trial_rows(trials: Sequence[TrialLog]) -> list[dict[str, Any]]:
    """One row a trial, every row with the same columns."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.values))
    return [
        {
            "trial": trial.number,
            "state": trial.state,
            **{name: trial.values.get(name) for name in names},
            "lr_min": trial.recipe.lr_min,
            "epochs": trial.epochs,
            "selected_epoch": trial.selected.get("epoch"),
            "selected_val_ua": trial.selected.get("val_ua"),
            "selected_val_wa": trial.selected.get("val_wa"),
            "selected_val_loss": trial.selected.get("val_loss"),
            "problem": trial.problem,
            "run_id": trial.run_id,
        }
        for trial in trials
    ]


def importance_of(trials: Sequence[TrialLog], dimensions: Sequence[Dimension]) -> dict[str, float]:
    """Importance of every searched name by PED-ANOVA (Watanabe 2023).

    Returns:
        Shares that sum to 1; empty where the trials are too few or too equal to tell.
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
                params=trial.values, distributions=distributions, value=trial.selected["val_ua"]
            )
        )
    if len({trial.selected["val_ua"] for trial in scored}) < 4:
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
