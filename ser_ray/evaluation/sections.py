"""Builds what several HTML pages share: the header, the contents, sections and clips."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from ser_ray.command import flags_of
from ser_ray.corpus.words import CORPORA
from ser_ray.evaluation.evaluation import SCORES, Evaluation, Row
from ser_ray.evaluation.rendering import render
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.prediction import shortest_names
from ser_ray.plots.clip import clip_figure
from ser_ray.plots.scores import confusion_figure, reliability_figure, speakers_figure
from ser_ray.plots.training import curves_figure, learning_rate_figure
from ser_ray.tracking.run_metadata import provenance
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.metrics import Scores, selected_row
from ser_ray.training.recipe import TrainConfig

History = Sequence[Mapping[str, float]]
"""A row for each epoch, with the keys epoch, train/loss and train/wa. With a validation part, a row
also has val/loss and the scores of this part, such as val/ua."""

_CONTENTS = re.compile(r'(?<=<nav aria-label="Contents">).*?(?=</nav>)', re.DOTALL)
_HEADING = re.compile(r'<h([23]) id="([\w-]+)">(.*?)</h')

MP3_RATES = frozenset((8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000))
"""Sample rates of MP3. Pages about features of another rate have no sound."""


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
    """Make a page with a header and a list of contents.

    Args:
        template: name of the template, without the suffix.
        kind: kind of the run, as the page shows it.
        title: name of the run.
        corpus: kind of the corpus.
        facts: name and value of each fact in the page's header; empty values are left out.
        versions: name and value of each row of the page's last table. The versions of the program
            and its packages are added.
        summary: the result in a sentence.
        values: the other values that the template needs.
    """
    today = datetime.now(UTC).date().isoformat()
    all_versions = {**versions, **provenance()}
    page = render(
        f"{template}.html.jinja",
        kind=kind,
        title=title,
        summary=summary,
        is_synthetic=corpus == "synthetic",
        facts={"Date": today, "Corpus": CORPORA[corpus], **facts},
        versions={
            name: text
            for name, text in all_versions.items()
            if name != "kind"
            and not name.startswith("mlflow.")  # `kind` of a study, not of a trial
        },
        **values,
    )
    return with_contents(page)


def with_contents(page: str) -> str:
    """Return a page with a list of contents that links to its headings."""
    links = [
        ("<li>" if level == "2" else "") + f'<a href="#{anchor}">{title}</a>'
        for level, anchor, title in _HEADING.findall(page)
    ]
    items = " ".join(links).replace(" <li>", "</li>\n<li>")
    return _CONTENTS.sub(lambda _: f"<ul>\n{items}</li>\n</ul>", page, count=1)


def part_values(evaluation: Evaluation, *, audio: bool) -> dict[str, Any]:
    """Return the values that `part.html.jinja` needs for an evaluation."""
    labels = evaluation.card.labels
    scores = {title: evaluation.mean(name) for name, title in SCORES.items()}
    confusions = [scores.confusion for scores in evaluation.by_seed.values()]
    where = f"{evaluation.measured_on}, {evaluation.num_clips} clips"
    base = confusion_values(evaluation.part, where, confusions, labels, scores)
    calibration, uncalibrated = evaluation.calibration, evaluation.uncalibrated
    has_temperature = evaluation.card.temperature != 1
    return base | {
        "evaluation": evaluation,
        "intervals": {title: getattr(evaluation.intervals, name) for name, title in SCORES.items()},
        "speaker_bars": speakers_figure(evaluation.speaker_rows),
        "groups": [
            rows for kind, rows in evaluation.groups.items() if kind != "speaker" and len(rows) > 1
        ],
        "reliability": reliability_figure(
            calibration.confidence,
            calibration.accuracy,
            calibration.count,
            (uncalibrated.confidence, uncalibrated.accuracy) if has_temperature else None,
        ),
        "examples": read_clips(evaluation, evaluation.typical(), audio=audio),
        "hardest": read_clips(evaluation, evaluation.hardest(), audio=audio),
    }


def confusion_values(
    part: str,
    measured_on: str,
    confusions: Sequence[np.ndarray],
    labels: Sequence[str],
    scores: Mapping[str, float],
) -> dict[str, Any]:
    """Return the values that `part.html.jinja` needs if only counts and scores are known.

    Args:
        part: the part of the fold that was scored.
        measured_on: what was scored, and on how many clips, in words.
        confusions: for each seed, counts as in `label_rows`.
        labels: the labels, in the order of the counts.
        scores: the scores of the part, by title.
    """
    confusion = np.sum(confusions, axis=0)
    return {
        "id": part,
        "title": f"{part.capitalize()} part",
        "headline": headline(confusion, labels, "clips" if len(confusions) == 1 else "predictions"),
        "measured_on": measured_on,
        "scores": scores,
        "num_labels": int((confusion.sum(axis=1) > 0).sum()),
        "confusion": confusion_figure(confusion, labels),
        "labels": label_rows(confusions, labels),
        "intervals": {},
        "evaluation": None,
    }


def training_section(
    history: History, learning_rates: Sequence[float], recipe: TrainConfig
) -> dict[str, Any]:
    """Return the figures of a training's epochs and steps; empty before the first epoch ends."""
    if not history:
        return {}
    return {
        "curves": curves_figure(history, selected_row(history, recipe.keep)),
        "schedule": learning_rate_figure(learning_rates, recipe.lr_min, recipe.lr_max),
    }


def selected_scores(selected: Mapping[str, float]) -> dict[str, float]:
    """Return the validation scores of the selected epoch, by title."""
    return {
        title: selected[f"val/{name}"]
        for name, title in SCORES.items()
        if f"val/{name}" in selected
    }


def card_settings(card: CheckpointCard) -> dict[str, object]:
    """Return the settings that the page of a checkpoint lists."""
    return settings_of(card.config) | {"started from": card.initial_weights}


def settings_of(recipe: TrainConfig) -> dict[str, object]:
    """Return all settings of a recipe. The first entry lists the settings that are not defaults."""
    settings = recipe.to_dict()
    settings |= settings.pop("augment")
    return {"changed settings": " ".join(flags_of(recipe)) or "none"} | settings


def label_rows(confusions: Sequence[np.ndarray], labels: Sequence[str]) -> list[Row]:
    """Make a row for each label: precision, recall and F1 as shares, and support in clips.

    A score is 0 if its denominator is 0, as for the precision of a label that is never predicted.

    Args:
        confusions: for each seed, counts [labels, labels] with a row for each true label and a
            column for each predicted label. The shares are means over the seeds, and the support is
            the sum.
        labels: the labels, in the order of the counts.
    """
    scores = Scores(np.stack(confusions))
    columns = {name: getattr(scores, name).mean(axis=0) for name in ("precision", "recall", "f1")}
    support = np.sum(confusions, axis=(0, 2))
    return pa.table({"label": labels, **columns, "support": support}).to_pylist()


def headline(confusion: np.ndarray, labels: Sequence[str], noun: str = "clips") -> str:
    """Return sentences about the best label, the worst label and the most frequent confusion.

    The frequency of a confusion is its share of the clips of the true label.

    Args:
        confusion: counts of at least one clip [labels, labels], with a row for each true label and
            a column for each predicted label.
        labels: the labels, in the order of the counts.
        noun: what is counted. Several seeds make several predictions for a clip.
    """
    support = confusion.sum(axis=1)
    recall = np.where(support > 0, Scores(confusion).recall, np.nan)
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
            f"({wrong[true, predicted]} of {support[true]} {noun})."
        )
    return sentence


def read_clips(evaluation: Evaluation, rows: Sequence[int], *, audio: bool) -> list[dict[str, Any]]:
    """Decode the clips that a page shows from the recordings of the corpus.

    Clips whose recording cannot be decoded are left out.

    Args:
        evaluation: the predictions of the clips.
        rows: row numbers in `evaluation.predictions`.
        audio: whether the page contains the sound of the clips.

    Returns:
        For each clip its file `name`, the true label as `truth`, the `predicted` label and its
        `probability`, a `figure` of the clip without its silent ends, and the sound as `mp3`, which
        is empty without `audio`.
    """
    extract = FeatureExtractor(evaluation.card.features)
    rate = evaluation.card.features.sample_rate
    views = []
    clips = evaluation.predictions.take(rows).to_pylist()
    names = shortest_names(clip["path"] for clip in clips)
    for clip in clips:
        try:
            decoded = decode(clip["path"])
            (samples, sample_rate, _), _ = cut(decoded, clip["start"], clip["end"])
            waveform = extract.windows(samples, sample_rate)[0]
        except ClipError:
            continue
        sound = BytesIO()
        if audio and rate in MP3_RATES:  # any browser plays MP3, with about 4 kB per second
            soundfile.write(sound, waveform, rate, format="MP3")
        views.append(
            {
                "name": names[clip["path"]],
                "truth": clip["emotion"],
                "predicted": clip["predicted"],
                "probability": clip[f"p_{clip['predicted']}"],
                "figure": clip_figure(waveform, rate, extract.features(waveform)["spectrogram"]),
                "mp3": sound.getvalue(),
            }
        )
    return views
