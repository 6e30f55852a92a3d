"""The HTML pages of runs.

Each page is one file that loads no other file. It fits any screen size, in light and in dark mode.
Each function here takes the results of a run, and returns its page as HTML text. `templates/`
defines how a page looks. Figures are inline SVG. Their text and axes have the colour of the page's
text, which depends on the reader's choice of light or dark mode.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.evaluation.clips import ClipView, read_clips
from ser_ray.evaluation.rendering import render
from ser_ray.evaluation.results import Evaluation, headline, label_rows
from ser_ray.plots.clip import clip_figure
from ser_ray.plots.scores import bars_figure, confusion_figure, reliability_figure
from ser_ray.plots.search import (
    TrialRow,
    bounds_figure,
    history_figure,
    importance_figure,
    rank_of,
)
from ser_ray.plots.svg import inline_svg
from ser_ray.plots.training import curves_figure, learning_rate_figure, range_figure
from ser_ray.tracking.provenance import provenance
from ser_ray.training.config import TrainConfig
from ser_ray.training.metrics import selected_row

History = Sequence[Mapping[str, float]]
"""A row for each epoch, with the keys epoch, train/loss, train/wa, val/loss, val/wa and val/ua."""

SCORES = {"val/ua": "UA", "val/wa": "WA", "val/f1": "macro F1"}


def run_page(
    evaluation: Evaluation,
    *,
    name: str,
    history: History = (),
    learning_rates: Sequence[float] = (),
    audio: bool,
) -> str:
    """The page of a training, of a cross-validation or of an evaluation.

    Args:
        evaluation: the predictions and their scores.
        name: name of the run.
        history: metrics of the training's epochs. If empty, the page has no section on training.
        learning_rates: learning rate of every step of the training [steps].
        audio: whether the page contains the sound of the clips that it shows, with players.
    """
    card, scores, intervals = evaluation.card, evaluation.scores, evaluation.intervals
    speakers = evaluation.groups["speaker"]
    calibration = evaluation.calibration
    reliability = reliability_figure(
        calibration.confidence.tolist(), calibration.accuracy.tolist(), calibration.count.tolist()
    )
    bars = bars_figure(
        [str(row["speaker"]) for row in speakers],
        [float(row["wa"]) for row in speakers],
        [int(row["clips"]) for row in speakers],
        "WA",
    )
    return _page(
        "run",
        name,
        evaluation.corpus,
        subtitle=f"{card.config.feature} features, {evaluation.part} scores",
        measured_on=evaluation.measured_on,
        headline=headline(scores.confusion, card.labels),
        scores={"UA": scores.ua, "WA": scores.wa, "macro F1": scores.macro_f1},
        intervals={"UA": intervals.ua, "WA": intervals.wa, "macro F1": intervals.f1},
        drawn=f"by bootstrap over {intervals.count} {intervals.drawn}",
        labels=_labels(scores.confusion, card.labels),
        speakers=(_svg(bars, "WA of every speaker"), speakers),
        groups=[rows for kind, rows in evaluation.groups.items() if kind != "speaker"],
        ece=calibration.ece,
        reliability=_svg(reliability, "Accuracy at every confidence"),
        examples=_clips("Examples", read_clips(evaluation, evaluation.typical(), audio=audio)),
        hardest=_clips("Hardest", read_clips(evaluation, evaluation.hardest(), audio=audio)),
        training=_training(history, learning_rates, card.config),
        settings=_settings(card.config) | {"started from": card.initial_weights},
        versions=provenance() | {"shards": card.shards_fingerprint},
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
) -> str:
    """The page of one trial of a search or cross-validation; it shows no clips.

    Args:
        name: name of the trial's run.
        about: which trial it is and how it ended, in a sentence.
        recipe: the trial's recipe.
        history: metrics of the trial's epochs. If empty, the page has no scores and no figures.
        learning_rates: learning rate of every step [steps].
        confusion: counts of the validation clips in the selected epoch [labels, labels].
        labels: names of the confusion matrix's rows.
        tags: tags of the run; `protocol` and `corpus` are shown beside the scores.
    """
    selected = selected_row(history, recipe.keep)
    counts = np.asarray(confusion)
    return _page(
        "trial",
        name,
        tags["corpus"],
        subtitle="trial",
        about=about,
        measured_on=f"epoch {selected['epoch']:.0f}, {_validated_on(tags)}" if history else "",
        headline=headline(counts, labels) if history else "",
        scores=_selected_scores(selected),
        labels=_labels(counts, labels) if history else None,
        training=_training(history, learning_rates, recipe),
        settings=_settings(recipe),
        versions=_versions(tags),
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
) -> str:
    """The page of a search.

    Args:
        name: name of the search.
        trials: one row for each trial, with the keys that `ser_ray.plots.search` describes.
        best: number of the selected trial.
        selected: row of that trial's selected epoch.
        recipe: that trial's recipe.
        searched: name of each searched setting, and its range in words.
        importance: for each searched setting, the share of the differences in UA between trials
            that it explains; may be empty.
        tags: tags of the run; `protocol` and `corpus` are shown beside the scores.
        again: command that trains the best recipe.
    """
    figures = [
        _svg(history_figure(trials), "Validation UA of every trial"),
        _svg(bounds_figure(trials), "Validation UA by the bounds of the learning rate"),
    ]
    if importance:
        figures.append(_svg(importance_figure(importance), "Importance of the searched settings"))
    states = [row["state"] for row in trials]
    return _page(
        "search",
        name,
        tags["corpus"],
        subtitle="search",
        counts=", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        best=best,
        selected_epoch=int(selected["epoch"]),
        again=again,
        measured_on=_validated_on(tags),
        scores=_selected_scores(selected),
        figures=figures,
        trials=[
            {
                "trial": row["trial"],
                "state": row["state"],
                **{name: _shown(row[name]) for name in searched},
                "epochs": row["epochs"],
                "ua": "" if row["selected/ua"] is None else row["selected/ua"],
                "wa": "" if row["selected/wa"] is None else row["selected/wa"],
            }
            for row in sorted(trials, key=rank_of, reverse=True)
        ],
        searched=searched,
        settings=_settings(recipe),
        versions=_versions(tags),
    )


def range_page(
    name: str,
    found: Mapping[str, Any],
    *,
    settings: Mapping[str, object],
    tags: Mapping[str, str],
) -> str:
    """The page of a learning-rate range test.

    Args:
        name: name of the test's run.
        found: the measured losses and the proposed bounds, as `range_figure` takes them.
        settings: name and value of each setting of the recipe and of the range.
        tags: tags of the run; `protocol` and `corpus` are shown beside the figure.
    """
    return _page(
        "lr_range",
        name,
        tags["corpus"],
        subtitle="learning-rate range test",
        measured_on=f"training loss, {tags['protocol']}, {CORPORA[tags['corpus']]}",
        num_steps=len(found["learning_rates"]),
        bounds={key: f"{found[key]:.1e}" for key in ("lr_min", "lr_max")},
        figure=_svg(range_figure(found), "Loss by learning rate"),
        settings=settings,
        versions=_versions(tags),
    )


def _page(template: str, title: str, corpus: str, **values: object) -> str:
    return render(
        f"{template}.html.jinja",
        title=title,
        corpus=CORPORA[corpus],
        is_synthetic=corpus == "synthetic",
        date=datetime.now(UTC).date().isoformat(),
        **values,
    )


def _svg(figure: Figure, description: str) -> Markup:
    return Markup(inline_svg(figure, description))


def _labels(confusion: np.ndarray, labels: Sequence[str]) -> tuple[Markup, list[Any]]:
    figure = confusion_figure(confusion, labels)
    return _svg(figure, "Confusion matrix"), list(label_rows(confusion, labels))


def _training(
    history: History, learning_rates: Sequence[float], recipe: TrainConfig
) -> list[Markup]:
    if not history:
        return []
    curves = curves_figure(history, selected_row(history, recipe.keep))
    schedule = learning_rate_figure(learning_rates, recipe.lr_min, recipe.lr_max)
    return [
        _svg(curves, "Loss and accuracy of every epoch"),
        _svg(schedule, "Learning rate of every step"),
    ]


def _clips(section: str, clips: Sequence[ClipView]) -> list[tuple[ClipView, Markup]]:
    # The description names the section, because a clip may be in both, and two figures with the
    # same description would have the same ids.
    return [
        (
            clip,
            _svg(
                clip_figure(clip.waveform, clip.sample_rate, clip.spectrogram),
                f"{section}: waveform and spectrogram of {clip.name}",
            ),
        )
        for clip in clips
    ]


def _selected_scores(selected: Mapping[str, float]) -> dict[str, float]:
    return {title: selected[key] for key, title in SCORES.items() if key in selected}


def _validated_on(tags: Mapping[str, str]) -> str:
    return f"validation, {tags['protocol']}, {CORPORA[tags['corpus']]}"


def _settings(recipe: TrainConfig) -> dict[str, object]:
    settings = recipe.to_dict()
    return settings | settings.pop("augment")


def _versions(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if not name.startswith("mlflow.")}


def _shown(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
