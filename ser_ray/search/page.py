"""The pages of a search, `report.html` of its own run and of every trial's: trials in, text out.

A trial keeps no model, so its page has scores, confusion matrix and curves, but no clips.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.evaluation.page import (
    figure_section,
    labels_section,
    render_page,
    score_tiles,
    settings_section,
    table_of,
    text_section,
    training_section,
)
from ser_ray.plots.scores import Row
from ser_ray.search.figures import bounds_figure, history_figure, importance_figure
from ser_ray.search.space import Dimension
from ser_ray.search.trial_log import TrialLog
from ser_ray.training.config import TrainConfig

SCORES = {"val_ua": "UA", "val_wa": "WA", "val_f1": "macro F1"}


def trial_page(
    name: str, trial: TrialLog, labels: Sequence[str], tags: Mapping[str, str], *, of: str
) -> str:
    """Write the page of one trial.

    Args:
        name: the trial's.
        trial: as it ended.
        labels: names of the confusion matrix's rows.
        tags: of its run; `protocol` and `corpus` stand beside every score.
        of: name of the search or cross-validation that it is part of.
    """
    measured_on = f"validation, {tags['protocol']}, {CORPORA[tags['corpus']]}"
    sections = [text_section(f"Trial {trial.number} of {of}: {trial.state}. {trial.problem}")]
    if trial.rows:
        rates = [rate for epoch in trial.rates for rate in epoch]
        bounds = (trial.recipe.lr_min, trial.recipe.lr_max)
        sections += [
            _selected_scores(trial, measured_on),
            labels_section(np.asarray(trial.selected_confusion), labels, measured_on),
            training_section(trial.rows, trial.selected, rates, bounds, measured_on),
        ]
    sections.append(settings_section(_flat(trial.recipe), _versions(tags)))
    return render_page(name, tags["corpus"], *sections)


def search_page(
    name: str,
    trials: Sequence[TrialLog],
    best: TrialLog,
    dimensions: Sequence[Dimension],
    importance: Mapping[str, float],
    tags: Mapping[str, str],
    again: str,
) -> str:
    """Write the page of a whole search.

    Args:
        name: the search's.
        trials: all of them.
        best: the selected one.
        dimensions: what was searched.
        importance: share of every searched name, as `importance_of` tells it; may be empty.
        tags: of its run; `protocol` and `corpus` stand beside every score.
        again: command that trains the best recipe.
    """
    measured_on = f"validation, {tags['protocol']}, {CORPORA[tags['corpus']]}"
    figures = [
        (history_figure(trials, measured_on), "Validation UA of every trial"),
        (bounds_figure(trials, measured_on), "Validation UA by the bounds of the learning rate"),
    ]
    if importance:
        figure = importance_figure(dict(importance), measured_on)
        figures.append((figure, "Importance of what was searched"))
    states = [trial.state for trial in trials]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    space = {item.name: f"{item.kind} {_range(item)}" for item in dimensions}
    return render_page(
        name,
        tags["corpus"],
        text_section(
            f"{len(trials)} trials: {counted}. The best is trial {best.number}; the scores are "
            "those it was selected by, so a test part has to confirm them. Train it to the full "
            f"with {again}"
        ),
        _selected_scores(best, measured_on),
        figure_section("Search", *figures),
        "<h2>Trials</h2>",
        f'<div class="scroll">{table_of(_rows(trials, dimensions), measured_on)}</div>',
        settings_section(space, _flat(best.recipe), _versions(tags)),
    )


def _selected_scores(trial: TrialLog, measured_on: str) -> str:
    named = {title: trial.selected[key] for key, title in SCORES.items()}
    return score_tiles(named, f"epoch {trial.selected['epoch']:.0f}, {measured_on}")


def _rows(trials: Sequence[TrialLog], dimensions: Sequence[Dimension]) -> list[Row]:
    """The trials with a score first, the best of them first."""
    order = sorted(trials, key=lambda trial: trial.rank if trial.rows else (), reverse=True)
    return [
        {
            "trial": trial.number,
            "state": trial.state,
            **{item.name: _shown(trial.values.get(item.name)) for item in dimensions},
            "epochs": trial.epochs,
            "UA": trial.selected.get("val_ua", ""),
            "WA": trial.selected.get("val_wa", ""),
        }
        for trial in order
    ]


def _flat(recipe: TrainConfig) -> dict[str, Any]:
    settings = recipe.to_dict()
    return settings | settings.pop("augment")


def _versions(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if not name.startswith("mlflow.")}


def _range(dimension: Dimension) -> str:
    between = ", " if dimension.kind == "choice" else " to "
    return between.join(_shown(value) for value in dimension.values)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
