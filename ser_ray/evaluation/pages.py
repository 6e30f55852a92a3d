"""Makes the HTML page (report) of a run from its results.

Each page is one file that loads no other file. It fits any screen size, and has a light and a dark
mode. The functions here choose what a page shows, and `templates/` defines how a page looks.

A run has one page. When a training ends, its page has the scores of the validation part. Later,
`add_test_part` inserts the scores of the test part before them. A page links only to pages in the
same run folder.

These arguments have the same meaning in every function:
    name            name of the run
    run_id          id of the MLflow run
    history         metrics of the epochs; if empty, the page has no section on the training
    learning_rates  learning rate of every step [steps]
    tags            tags of the MLflow run; `protocol` and `corpus` are shown beside the scores
    audio           whether the page contains the sound of the clips that it shows
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ser_ray.evaluation.evaluation import REPORT, Evaluation
from ser_ray.evaluation.rendering import render
from ser_ray.evaluation.sections import (
    History,
    card_settings,
    confusion_values,
    make_page,
    part_values,
    selected_scores,
    settings_of,
    training_section,
    with_contents,
)
from ser_ray.plots.search import history_figure, importance_figure, parameter_figure, trial_sort_key
from ser_ray.plots.training import layer_weights_figure, range_figure
from ser_ray.tracking.run_metadata import scored_on
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.metrics import selected_row
from ser_ray.training.recipe import TrainConfig

_TEST_PART = re.compile("(?<=<!-- test part -->).*(?=<!-- end of test part -->)", re.DOTALL)


def run_page(
    card: CheckpointCard,
    validation: Evaluation | None,
    *,
    name: str,
    run_id: str = "",
    history: History = (),
    learning_rates: Sequence[float] = (),
    layer_weights: Sequence[float] = (),
    audio: bool,
) -> str:
    """Make the page of a training, without its test part.

    Args:
        card: card of the selected checkpoint.
        validation: evaluation on the validation part; None if all speakers trained the model.
        layer_weights: weights of the encoder's layers [layers]; empty without an encoder.
    """
    speakers = {
        f"{part.capitalize()} speakers": f"{len(names)}: {', '.join(names)}"
        for part in ("train", "validation", "test")
        if (names := card.split[f"{part}_speakers"])
    }
    return make_page(
        "run",
        "Training",
        name,
        card.corpus,
        facts={
            "Protocol": card.split["label"],
            "Corpora": ". ".join(map(str, card.corpora)),
            **speakers,
            "Features": card.config.feature,
            "MLflow run": run_id,
        },
        part=None if validation is None else part_values(validation, audio=audio),
        **training_section(history, learning_rates, card.config),
        layers=layer_weights_figure(layer_weights) if layer_weights else None,
        settings=card_settings(card),
        versions={"shards": card.shards_fingerprint},
    )


def add_test_part(page: str, evaluation: Evaluation, *, audio: bool) -> str:
    """Insert the scores of a test part into the page of its run, or replace earlier ones.

    Args:
        page: the page that `run_page` or `trial_page` made.
    """
    section = render("part.html.jinja", part=part_values(evaluation, audio=audio))
    return with_contents(_TEST_PART.sub(lambda _: section, page))


def evaluation_page(evaluation: Evaluation, *, model: str, audio: bool) -> str:
    """Make the page of an evaluation on other clips than the test part of the model's own fold.

    Args:
        model: the model as the user named it.
    """
    card = evaluation.card
    return make_page(
        "run",
        "Evaluation",
        model,
        evaluation.corpus,
        facts={
            "Scored on": evaluation.label,
            "Trained on": f"{card.trained_on}, {card.split['label']}",
            "Corpora": ". ".join(map(str, evaluation.corpora)),
            "Features": card.config.feature,
            "MLflow run of the training": evaluation.origin.get("run_id", ""),
        },
        part=part_values(evaluation, audio=audio) | {"title": "Scores"},
        settings=card_settings(card),
    )


def crossval_page(
    pooled: Evaluation,
    *,
    name: str,
    summary: str,
    folds: Sequence[Mapping[str, Any]],
    pages: Sequence[str],
    run_id: str,
    audio: bool,
) -> str:
    """Make the page of a cross-validation.

    Args:
        pooled: the evaluation of all folds and seeds together.
        summary: a sentence with the mean score over the seeds.
        folds: a row for each training; floats are shares from 0 to 1.
        pages: for each row, the relative link to the page of the training.
    """
    card = pooled.card
    return make_page(
        "run",
        "Cross-validation",
        name,
        pooled.corpus,
        summary=summary,
        facts={
            "Protocol": pooled.protocol,
            "Corpora": ". ".join(map(str, card.corpora)),
            "Features": card.config.feature,
            "Shards": card.shards_fingerprint,
            "MLflow run": run_id,
        },
        part=part_values(pooled, audio=audio),
        folds=folds,
        pages=pages,
        settings=card_settings(card),
    )


def trial_page(
    name: str,
    about: str,
    *,
    recipe: TrainConfig,
    history: History,
    learning_rates: Sequence[float],
    confusion: Sequence[Sequence[int]],
    labels: Sequence[str],
    tags: Mapping[str, str],
    study: str,
    run_id: str,
) -> str:
    """Make the page of one trial of a search or cross-validation. The page shows no clips.

    Args:
        about: a sentence that names the trial and says how it ended.
        confusion: confusion counts of the validation clips in the selected epoch [labels, labels].
        study: name of the search or cross-validation. Its page is in the folder above.
    """
    part = None
    if history:
        selected = selected_row(history, recipe.keep)
        counts, scores = np.asarray(confusion), selected_scores(selected)
        where = (
            f"epoch {selected['epoch']:.0f}, validation, {scored_on(tags)}, {counts.sum()} clips"
        )
        part = confusion_values("validation", where, [counts], labels, scores)
    return make_page(
        "run",
        "Trial",
        name,
        tags["corpus"],
        summary=about,
        facts={
            "Part of": Markup('<a href="../{}">{}</a>').format(REPORT, study),
            "Protocol": tags["protocol"],
            "Features": recipe.feature,
            "MLflow run": run_id,
        },
        part=part,
        **training_section(history, learning_rates, recipe),
        settings=settings_of(recipe),
        versions=tags,
    )


def search_page(
    name: str,
    trials: Sequence[Mapping[str, Any]],
    *,
    counts: str,
    best: int,
    selected: Mapping[str, float],
    recipe: TrainConfig,
    searched: Mapping[str, str],
    importance: Mapping[str, float],
    tags: Mapping[str, str],
    train_command: str,
    pages: Mapping[int, str],
    num_labels: int,
    run_id: str,
) -> str:
    """Make the page of a search.

    Args:
        trials: one row for each trial, with the keys that `ser_ray.plots.search` describes.
        counts: number of trials in each state, as text.
        best: number of the selected trial.
        selected: metrics of this trial's selected epoch.
        recipe: recipe of this trial.
        searched: {hyperparameter: its range, as text}.
        importance: {hyperparameter: its importance}, as `importance_figure` draws it; may be empty.
        train_command: command that trains the best recipe.
        pages: {number of a trial: relative link to its page}.
    """
    row = next(row for row in trials if row["trial"] == best)
    values = ", ".join(f"{key} {_format(row[key])}" for key in searched)
    ranked = sorted(trials, key=trial_sort_key, reverse=True)
    return make_page(
        "search",
        "Search",
        name,
        tags["corpus"],
        summary=f"The best of {len(trials)} trials ({counts}) is trial {best}, with {values}. "
        f"Its selected epoch is {selected['epoch']:.0f}.",
        facts={"Protocol": tags["protocol"], "MLflow run": run_id},
        train_command=train_command,
        measured_on=f"validation, {scored_on(tags)}",
        scores=selected_scores(selected),
        num_labels=num_labels,
        progress=history_figure(trials),
        parameters={key: parameter_figure(trials, key) for key in searched},
        importance=importance_figure(importance) if importance else None,
        trials=[
            {
                "trial": row["trial"],
                "ua": row["selected/ua"],
                "wa": row["selected/wa"],
                **{key: _format(row[key]) for key in searched},
                "completed": row["completed"],
                "state": row["state"],
            }
            for row in ranked
        ],
        pages=[pages[row["trial"]] for row in ranked],
        searched=searched,
        settings=settings_of(recipe),
        versions=tags,
    )


def range_page(
    name: str,
    found: Mapping[str, Any],
    *,
    recipe: TrainConfig,
    test: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str,
) -> str:
    """Make the page of a learning-rate range test.

    Args:
        found: the measured losses and the proposed bounds, in the form that `range_figure` takes.
        test: name and value of each setting of the range test.
    """
    bounds = {key: f"{found[key]:.1e}" for key in ("lr_min", "lr_max")}
    return make_page(
        "lr_range",
        "Learning-rate range test",
        name,
        tags["corpus"],
        summary=f"A test of {len(found['learning_rates'])} steps proposes learning rates from "
        f"{bounds['lr_min']} to {bounds['lr_max']}.",
        facts={"Protocol": tags["protocol"], "MLflow run": run_id},
        measured_on=f"training loss, {scored_on(tags)}",
        bounds=bounds,
        figure=range_figure(found),
        settings={**settings_of(recipe), **test},
        versions=tags,
    )


def _format(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
