"""The header, contents, sections and clips that several HTML pages share."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation.evaluation import SCORES, Evaluation, Row
from ser_ray.evaluation.rendering import render
from ser_ray.features.decode import MAX_RECORDING_SECONDS, decode
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.plots.clip import clip_figure
from ser_ray.plots.scores import confusion_figure, reliability_figure, speakers_figure
from ser_ray.plots.training import curves_figure, learning_rate_figure
from ser_ray.tracking.run_metadata import provenance
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.metrics import Scores, selected_row
from ser_ray.training.recipe import TrainConfig

History = Sequence[Mapping[str, float]]
"""A row for each epoch, with the keys epoch, train/loss, train/wa, val/loss, val/wa and val/ua."""

_CONTENTS = re.compile(r'(?<=<nav aria-label="Contents">).*?(?=</nav>)', re.DOTALL)
_HEADING = re.compile(r'<h([23]) id="([\w-]+)">(.*?)</h')


def make_page(
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
        template: name of the template, without the suffix.
        kind: kind of the run, as the page names it.
        title: name of the run.
        corpus: kind of the corpus.
        facts: name and value of each fact in the page's header; empty values are left out.
        versions: rows of the page's last table, in addition to the program's provenance.
        summary: the result in a sentence.
        values: other values that the template needs.
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
    return with_contents(page)


def with_contents(page: str) -> str:
    """Fill the list of contents from the headings of a page."""
    lines: list[str] = []
    for level, anchor, title in _HEADING.findall(page):
        link = f'<a href="#{anchor}">{title}</a>'
        lines.append(f"<li>{link}") if level == "2" else lines.append(link)
    items = " ".join(lines).replace(" <li>", "</li>\n<li>")
    return _CONTENTS.sub(lambda _: f"<ul>\n{items}</li>\n</ul>", page, count=1)


def part_of(evaluation: Evaluation, *, audio: bool) -> dict[str, Any]:
    """Collect the values of `part.html.jinja` from an evaluation."""
    labels = evaluation.card.labels
    shown = {title: evaluation.mean(name) for name, title in SCORES.items()}
    confusion = evaluation.scores.confusion
    base = confusion_part(evaluation.part, evaluation.measured_on, confusion, labels, shown)
    calibration, before = evaluation.calibration, evaluation.uncalibrated
    return base | {
        "evaluation": evaluation,
        "labels": label_rows([scores.confusion for scores in evaluation.by_seed.values()], labels),
        "intervals": {title: getattr(evaluation.intervals, name) for name, title in SCORES.items()},
        "speaker_bars": speakers_figure(evaluation.speaker_rows),
        "groups": [
            rows for kind, rows in evaluation.groups.items() if kind != "speaker" and len(rows) > 1
        ],
        "reliability": reliability_figure(
            calibration.confidence,
            calibration.accuracy,
            calibration.count,
            None if evaluation.card.temperature == 1 else (before.confidence, before.accuracy),
        ),
        "examples": read_clips(evaluation, evaluation.typical(), audio=audio),
        "hardest": read_clips(evaluation, evaluation.hardest(), audio=audio),
    }


def confusion_part(
    part: str,
    measured_on: str,
    confusion: np.ndarray,
    labels: Sequence[str],
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """Collect the values of `part.html.jinja` if only the confusion counts are known."""
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


def training_section(
    history: History, learning_rates: Sequence[float], recipe: TrainConfig
) -> dict[str, Any]:
    """Draw the figures of a training's epochs and steps; empty before the first epoch ends."""
    if not history:
        return {}
    return {
        "curves": curves_figure(history, selected_row(history, recipe.keep)),
        "schedule": learning_rate_figure(learning_rates, recipe.lr_min, recipe.lr_max),
    }


def selected_scores(selected: Mapping[str, float]) -> dict[str, float]:
    """Return the validation scores of the selected epoch by their titles."""
    return {
        title: selected[f"val/{name}"]
        for name, title in SCORES.items()
        if f"val/{name}" in selected
    }


def card_settings(card: CheckpointCard) -> dict[str, object]:
    """Return the settings that a checkpoint's page lists."""
    return settings_of(card.config) | {"started from": card.initial_weights}


def settings_of(recipe: TrainConfig) -> dict[str, object]:
    """Return all settings of a recipe in one mapping."""
    settings = recipe.to_dict()
    return settings | settings.pop("augment")


def label_rows(confusions: Sequence[np.ndarray], labels: Sequence[str]) -> list[Row]:
    """Compute a table row for each label: precision, recall and F1 as shares, and support in clips.

    A score whose denominator is 0 is 0, such as the precision of a label that is never predicted.

    Args:
        confusions: for each seed, counts [labels, labels], row = true, column = predicted. The
            shares are means over the seeds, and the support is the sum.
        labels: names of the rows.
    """
    of_seeds = [Scores(confusion, loss=0.0) for confusion in confusions]
    columns: dict[str, Sequence[Any]] = {"label": labels}
    for name in ("precision", "recall", "f1"):
        columns[name] = np.mean([getattr(scores, name) for scores in of_seeds], axis=0).tolist()
    columns["support"] = np.sum(confusions, axis=(0, 2)).tolist()
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def headline(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """Say in sentences which label has the best recall, which the worst, and what is confused most.

    Args:
        confusion: counts [labels, labels], row = true, column = predicted; at least one clip.
        labels: names of the rows.
    """
    support = confusion.sum(axis=1)
    recall = np.where(support > 0, Scores(confusion, loss=0.0).recall, np.nan)
    best, worst = int(np.nanargmax(recall)), int(np.nanargmin(recall))
    if recall[best] == recall[worst]:
        sentence = f"Every label has a recall of {recall[best]:.0%}."
    else:
        sentence = (
            f"The model recognises {labels[best]} best ({recall[best]:.0%} of its clips) and "
            f"{labels[worst]} worst ({recall[worst]:.0%})."
        )
    wrong = confusion - np.diag(np.diag(confusion))
    shares = wrong / np.maximum(support, 1)[:, None]
    true, predicted = np.unravel_index(shares.argmax(), shares.shape)
    if wrong[true, predicted]:
        sentence += (
            f" It most often mistakes {labels[true]} for {labels[predicted]} "
            f"({wrong[true, predicted]} of {support[true]} clips)."
        )
    return sentence


def read_clips(evaluation: Evaluation, rows: Sequence[int], *, audio: bool) -> list[dict[str, Any]]:
    """Decode the clips that a page shows, from the recordings of the corpus.

    A clip is left out if its recording cannot be decoded.

    Args:
        evaluation: the predictions of the clips.
        rows: row numbers in `evaluation.predictions`.
        audio: whether the page gets a player for each clip.

    Returns:
        For each clip its file `name`, its true label (`truth`), the `predicted` label and its
        `probability`, a `figure` of the clip without the silence at both ends, and its sound as
        `mp3`, which is empty without players.
    """
    extract = FeatureExtractor(evaluation.card.features)
    rate = evaluation.card.features.sample_rate
    views = []
    for clip in evaluation.predictions.take(rows).to_pylist():
        try:
            decoded = decode(clip["path"], max_seconds=MAX_RECORDING_SECONDS)
            (samples, sample_rate, _), _ = cut(decoded, clip["start"], clip["end"])
            waveform = extract.windows(samples, sample_rate)[0]
        except ClipError:
            continue
        sound = BytesIO()
        if audio:  # MP3 plays in any browser: about 4 kB per second
            soundfile.write(sound, waveform, rate, format="MP3")
        views.append(
            {
                "name": Path(clip["path"]).name,
                "truth": clip["emotion"],
                "predicted": clip["predicted"],
                "probability": clip[f"p_{clip['predicted']}"],
                "figure": clip_figure(waveform, rate, extract.features(waveform)["spectrogram"]),
                "mp3": sound.getvalue(),
            }
        )
    return views
