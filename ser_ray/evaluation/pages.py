"""The HTML pages of runs.

Each page is one file that loads no other file. It fits any screen size, in light and in dark mode.
Each function here takes the results of a run and returns its page as HTML text. `templates/`
defines how a page looks; this module chooses what it shows.

A run has one page. When a training ends, it has the scores of the validation part; `add_test_part`
puts those of the test part before them. Links lead to other pages in the same run's folder.

These arguments mean the same in every function:
    name            name of the run
    run_id          its MLflow run
    history         metrics of its epochs; if empty, the page has no section on the training
    learning_rates  learning rate of every step [steps]
    tags            tags of its MLflow run; `protocol` and `corpus` are shown beside the scores
    audio           whether the page contains the sound of its clips, with players
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup

from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation.clips import read_clips
from ser_ray.evaluation.evaluation import REPORT, SCORES, Evaluation, headline, label_rows
from ser_ray.evaluation.rendering import render
from ser_ray.plots.scores import confusion_figure, reliability_figure, speakers_figure
from ser_ray.plots.search import (
    TrialRow,
    history_figure,
    importance_figure,
    parameter_figure,
    rank_of,
)
from ser_ray.plots.training import (
    curves_figure,
    layer_weights_figure,
    learning_rate_figure,
    range_figure,
)
from ser_ray.shards.card import CorpusPart
from ser_ray.tracking.about import provenance, scored_on
from ser_ray.training.card import CheckpointCard
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_row

History = Sequence[Mapping[str, float]]
"""A row for each epoch, with the keys epoch, train/loss, train/wa, val/loss, val/wa and val/ua."""

_TEST_PART = re.compile("(?<=<!-- test part -->).*(?=<!-- end of test part -->)", re.DOTALL)
_CONTENTS = re.compile(r'(?<=<nav aria-label="Contents">).*?(?=</nav>)', re.DOTALL)
_HEADING = re.compile(r'<h([23]) id="([\w-]+)">(.*?)</h')


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
    """The page of a training, without its test part.

    Args:
        card: card of the selected checkpoint.
        validation: its evaluation on the validation part; None if it was trained on all speakers.
        layer_weights: weights of the encoder's layers [layers], if it has an encoder.
    """
    parts = ((side, card.split[f"{side}_speakers"]) for side in ("train", "validation", "test"))
    speakers = {
        f"{side.capitalize()} speakers": f"{len(names)}: {', '.join(names)}"
        for side, names in parts
        if names
    }
    return _page(
        "run",
        "Training",
        name,
        card.corpus,
        facts={
            "Protocol": card.split["label"],
            **_corpora(card.corpora),
            **speakers,
            "Features": card.config.feature,
            "MLflow run": run_id,
        },
        part=None if validation is None else _part(validation, audio=audio),
        **_training(history, learning_rates, card.config),
        layers=layer_weights_figure(layer_weights) if layer_weights else None,
        **_recipe(card),
        versions={"shards": card.shards_fingerprint},
    )


def add_test_part(page: str, evaluation: Evaluation, *, audio: bool) -> str:
    """Put the scores of a test part into the page of its run, in place of earlier ones.

    Args:
        page: what `run_page` or `trial_page` returned.
        evaluation: of the test part.
    """
    section = render("part.html.jinja", part=_part(evaluation, audio=audio))
    return _with_contents(_TEST_PART.sub(lambda _: section, page))


def evaluation_page(evaluation: Evaluation, *, model: str, audio: bool) -> str:
    """The page of an evaluation of other clips than the test part of the model's own fold.

    Args:
        model: how the user named the model.
    """
    card = evaluation.card
    return _page(
        "run",
        "Evaluation",
        model,
        evaluation.corpus,
        facts={
            "Scored": evaluation.label,
            "Trained on": f"{card.trained_on}, {card.split['label']}",
            **_corpora(evaluation.corpora),
            "Features": card.config.feature,
            "MLflow run of the training": evaluation.origin.get("run_id", ""),
        },
        part=_part(evaluation, audio=audio) | {"title": "Scores"},
        **_recipe(card),
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
    """The page of a cross-validation.

    Args:
        pooled: the evaluation of all folds with all seeds together.
        summary: the mean score over the seeds, in a sentence.
        folds: a row for each training; shares from 0 to 1 are floats.
        pages: for each row, where the training's page is, seen from this page.
    """
    card = pooled.card
    return _page(
        "run",
        "Cross-validation",
        name,
        pooled.corpus,
        summary=summary,
        facts={
            "Protocol": pooled.protocol,
            **_corpora(card.corpora),
            "Features": card.config.feature,
            "Shards": card.shards_fingerprint,
            "MLflow run": run_id,
        },
        part=_part(pooled, audio=audio),
        folds=folds,
        pages=pages,
        **_recipe(card),
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
    """The page of one trial of a search or cross-validation; it shows no validation clips.

    Args:
        about: which trial it is and how it ended, in a sentence.
        confusion: counts of the validation clips in the selected epoch [labels, labels].
        study: name of the search or cross-validation, whose page is in the folder above.
    """
    part = None
    if history:
        selected = selected_row(history, recipe.keep)
        where = f"epoch {selected['epoch']:.0f}, validation, {scored_on(tags)}"
        scores = _selected_scores(selected)
        part = _confusion_part("validation", where, np.asarray(confusion), labels, scores)
    return _page(
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
        **_training(history, learning_rates, recipe),
        settings=_settings(recipe),
        versions=tags,
    )


def search_page(
    name: str,
    trials: Sequence[TrialRow],
    *,
    best: int,
    selected: Mapping[str, float],
    recipe: TrainConfig,
    searched: Mapping[str, str],
    importance: Mapping[str, float],
    tags: Mapping[str, str],
    again: str,
    pages: Mapping[int, str],
    num_labels: int,
    run_id: str,
) -> str:
    """The page of a search.

    Args:
        trials: one row for each trial, with the keys that `ser_ray.plots.search` describes.
        best: number of the selected trial.
        selected: row of that trial's selected epoch.
        recipe: that trial's recipe.
        searched: name of each searched setting, and its range in words.
        importance: for each searched setting, the share of the differences in UA between trials
            that it explains; may be empty.
        again: command that trains the best recipe.
        pages: for the number of each trial, where its page is, seen from this page.
    """
    states = Counter(row["state"] for row in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    row = next(row for row in trials if row["trial"] == best)
    drawn = ", ".join(f"{key} {_shown(row[key])}" for key in searched)
    ranked = sorted(trials, key=rank_of, reverse=True)
    return _page(
        "search",
        "Search",
        name,
        tags["corpus"],
        summary=f"Trial {best} of {len(trials)} is the best ({counts}). It has {drawn}; "
        f"its epoch {selected['epoch']:.0f} is selected.",
        facts={"Protocol": tags["protocol"], "MLflow run": run_id},
        again=again,
        measured_on=f"validation, {scored_on(tags)}",
        scores=_selected_scores(selected),
        num_labels=num_labels,
        progress=history_figure(trials),
        parameters={key: parameter_figure(trials, key) for key in searched},
        importance=importance_figure(importance) if importance else None,
        trials=[
            {
                "trial": row["trial"],
                "state": row["state"],
                **{name: _shown(row[name]) for name in searched},
                "epochs": row["epochs"],
                "ua": row["selected/ua"],
                "wa": row["selected/wa"],
            }
            for row in ranked
        ],
        pages=[pages[row["trial"]] for row in ranked],
        searched=searched,
        settings=_settings(recipe),
        versions=tags,
    )


def range_page(
    name: str,
    found: Mapping[str, Any],
    *,
    settings: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str,
) -> str:
    """The page of a learning-rate range test.

    Args:
        found: the measured losses and the proposed bounds, in the form that `range_figure` takes.
        settings: name and value of each setting of the recipe and of the range.
    """
    bounds = {key: f"{found[key]:.1e}" for key in ("lr_min", "lr_max")}
    return _page(
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
        settings=settings,
        versions=tags,
    )


def _corpora(corpora: Sequence[CorpusPart]) -> dict[str, str]:
    """What was read of each corpus, as a fact of a page's header."""
    return {"Corpora": ". ".join(map(str, corpora))} if corpora else {}


def _page(
    template: str,
    kind: str,
    title: str,
    corpus: str,
    *,
    facts: Mapping[str, object],
    versions: Mapping[str, str] = {},
    summary: str = "",
    **values: object,
) -> str:
    """Render a page with its header and contents.

    Args:
        template: its name, without the suffix.
        kind: what the run is.
        title: name of the run.
        corpus: ravdess, synthetic or table.
        facts: name and value of each fact in the page's head.
        versions: what is listed beside the settings, besides this program's provenance.
        summary: the result in a sentence.
        values: what only this template shows.
    """
    today = datetime.now(UTC).date().isoformat()
    known = {**versions, **provenance()}
    page = render(
        f"{template}.html.jinja",
        kind=kind,
        title=title,
        summary=summary,
        is_synthetic=corpus == "synthetic",
        facts={"Date": today, "Corpus": CORPORA[corpus], **facts},
        versions={name: text for name, text in known.items() if not name.startswith("mlflow.")},
        **values,
    )
    return _with_contents(page)


def _with_contents(page: str) -> str:
    """Fill the list of contents from the headings of a page."""
    lines: list[str] = []
    for level, anchor, title in _HEADING.findall(page):
        link = f'<a href="#{anchor}">{title}</a>'
        lines.append(f"<li>{link}") if level == "2" else lines.append(link)
    items = " ".join(lines).replace(" <li>", "</li>\n<li>")
    return _CONTENTS.sub(lambda _: f"<ul>\n{items}</li>\n</ul>", page, count=1)


def _part(evaluation: Evaluation, *, audio: bool) -> dict[str, Any]:
    """What `part.html.jinja` shows of an evaluation."""
    labels, of_seeds = evaluation.card.labels, list(evaluation.by_seed.values())
    shown = {title: evaluation.mean(name) for name, title in SCORES.items()}
    confusion = evaluation.scores.confusion
    base = _confusion_part(evaluation.part, evaluation.measured_on, confusion, labels, shown)
    calibration, before = evaluation.calibration, evaluation.uncalibrated
    reliability = reliability_figure(
        calibration.confidence.tolist(),
        calibration.accuracy.tolist(),
        calibration.count.tolist(),
        None
        if evaluation.card.temperature == 1
        else (before.confidence.tolist(), before.accuracy.tolist()),
    )
    return base | {
        "evaluation": evaluation,
        "labels": label_rows([seed.confusion for seed in of_seeds], labels),
        "intervals": {title: getattr(evaluation.intervals, name) for name, title in SCORES.items()},
        "speaker_bars": speakers_figure(evaluation.speaker_rows),
        "groups": [
            rows for kind, rows in evaluation.groups.items() if kind != "speaker" and len(rows) > 1
        ],
        "reliability": reliability,
        "examples": read_clips(evaluation, evaluation.typical(), audio=audio),
        "hardest": read_clips(evaluation, evaluation.hardest(), audio=audio),
    }


def _confusion_part(
    part: str,
    measured_on: str,
    confusion: np.ndarray,
    labels: Sequence[str],
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """What `part.html.jinja` shows if only the confusion counts are known."""
    return {
        "id": part,
        "title": f"{part.capitalize()} part",
        "headline": headline(confusion, labels),
        "measured_on": f"{measured_on}, {confusion.sum()} clips",
        "scores": scores,
        "num_labels": int((confusion.sum(axis=1) > 0).sum()),
        "confusion": confusion_figure(confusion, labels),
        "labels": label_rows([confusion], labels),
        "intervals": {},
        "evaluation": None,
    }


def _training(
    history: History, learning_rates: Sequence[float], recipe: TrainConfig
) -> dict[str, Any]:
    """The figures of a training's epochs and steps, if there are any."""
    if not history:
        return {}
    curves = curves_figure(history, selected_row(history, recipe.keep))
    schedule = learning_rate_figure(learning_rates, recipe.lr_min, recipe.lr_max)
    return {"curves": curves, "schedule": schedule}


def _selected_scores(selected: Mapping[str, float]) -> dict[str, float]:
    values = {title: selected.get(f"val/{name}") for name, title in SCORES.items()}
    return {title: value for title, value in values.items() if value is not None}


def _recipe(card: CheckpointCard) -> dict[str, Any]:
    """The settings of a checkpoint's training."""
    return {"settings": _settings(card.config) | {"started from": card.initial_weights}}


def _settings(recipe: TrainConfig) -> dict[str, object]:
    settings = recipe.to_dict()
    return settings | settings.pop("augment")


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
