"""What people look at of a run: the page, the plots and the tables of one scored part.

An `Evaluation` and the training's history come in; the tracker stores what goes out. The clips
shown are read again from the corpus, where it still is: a page without them is a page all the same.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.errors import ConfigError
from ser_ray.evaluation.evaluate import Evaluation, evaluate
from ser_ray.evaluation.page import ClipView, RunReport, render_report
from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.plots.scores import bars_figure, confusion_figure
from ser_ray.storage.paths import filesystem_of
from ser_ray.tracking.tracker import Tracker, now_ms, provenance
from ser_ray.training.metrics import selected_row

History = Sequence[Mapping[str, float]]
"""A row for every epoch of a training."""


def training_page(
    checkpoint: Path, shards: str, history: History, rates: Sequence[float], *, audio: bool
) -> str:
    """Score a selected checkpoint on its validation part once more, and write the run's page.

    Args:
        checkpoint: its directory.
        shards: location of the shards it was trained on.
        history: of its training.
        rates: learning rate of every step of it.
        audio: put the sound of the clips shown into the page.
    """
    evaluation = evaluate(checkpoint, shards, part="validation")
    return render_report(report_of(evaluation, history, rates, audio=audio))


def record_evaluation(evaluation: Evaluation, tracker: Tracker, *, audio: bool) -> None:
    """Store an evaluation in the run that trained the checkpoint: scores, tables, plots, page."""
    scores, card = evaluation.scores, evaluation.card
    test = {f"test_{name}": value for name, value in scores.to_dict().items()}
    tracker.log_metrics(test | {"test_ece": evaluation.calibration.ece}, 0, now_ms())
    tracker.deliver()
    title = f"{evaluation.part}, {evaluation.label}, {CORPORA[evaluation.corpus]}"
    speakers = evaluation.groups["speaker"]
    tracker.log_files(
        {
            "report_test.html": render_report(report_of(evaluation, (), (), audio=audio)),
            "plots/test_confusion.png": confusion_figure(scores.confusion, card.labels, title),
            "plots/test_recall_by_emotion.png": bars_figure(
                list(card.labels),
                scores.recall.tolist(),
                scores.confusion.sum(axis=1).tolist(),
                title,
                "recall",
            ),
            "plots/test_accuracy_by_speaker.png": bars_figure(
                [str(row["speaker"]) for row in speakers],
                [float(row["wa"]) for row in speakers],
                [int(row["clips"]) for row in speakers],
                title,
                "accuracy",
            ),
            "tables/test.json": evaluation.to_dict(),
            "tables/test_predictions.csv": evaluation.predictions,
        }
    )


def report_of(
    evaluation: Evaluation, history: History, lr_per_step: Sequence[float], *, audio: bool
) -> RunReport:
    """Everything that a page shows; `audio` puts the clips' sound into it."""
    card, scores, intervals = evaluation.card, evaluation.scores, evaluation.intervals
    calibration = evaluation.calibration
    settings: dict[str, Any] = card.config.to_dict()
    augment = settings.pop("augment")
    return RunReport(
        title=f"{card.config.feature}, {evaluation.part} scores",
        corpus=evaluation.corpus,
        protocol=evaluation.label,
        part=evaluation.part,
        scores={"UA": scores.ua, "WA": scores.wa, "macro F1": scores.macro_f1},
        intervals={"UA": intervals.ua, "WA": intervals.wa, "macro F1": intervals.f1},
        drawn=f"over draws of {intervals.count} {intervals.drawn}",
        labels=card.labels,
        confusion=scores.confusion,
        groups=evaluation.groups,
        calibration=(
            calibration.confidence.tolist(),
            calibration.accuracy.tolist(),
            calibration.count.tolist(),
        ),
        ece=calibration.ece,
        examples=_views(evaluation, typical_rows(evaluation), audio=audio),
        hardest=_views(evaluation, evaluation.hardest().tolist(), audio=audio),
        history=history,
        selected=selected_row(history, card.config.keep),
        lr_per_step=lr_per_step,
        lr_min=card.config.lr_min,
        lr_max=card.config.lr_max,
        config=settings | augment | {"started from": card.initial_weights},
        versions=provenance() | {"shards": card.shards_fingerprint},
    )


def typical_rows(evaluation: Evaluation) -> list[int]:
    """The clip of each label whose label's own probability is the middle one of its clips."""
    rows = []
    for label in np.unique(evaluation.truth):
        own = np.flatnonzero(evaluation.truth == label)
        order = np.argsort(evaluation.probabilities[own, label], kind="stable")
        rows.append(int(own[order[len(own) // 2]]))
    return rows


def _views(evaluation: Evaluation, rows: Sequence[int], *, audio: bool) -> list[ClipView]:
    """Read some clips again; those that are not there any more are left out."""
    extract = FeatureExtractor(evaluation.card.features)
    rate = evaluation.card.features.sample_rate
    views = []
    for row in rows:
        clip = evaluation.predictions.slice(row, 1).to_pylist()[0]
        try:
            filesystem, path = filesystem_of(clip["path"])
            with filesystem.open_input_file(path) as file:
                waveform = extract.waveform(*decode(file))
        except (OSError, ConfigError, ClipError):
            continue
        views.append(
            ClipView(
                name=Path(path).name,
                truth=clip["emotion"],
                predicted=clip["predicted"],
                probability=clip[f"p_{clip['predicted']}"],
                waveform=waveform,
                sample_rate=rate,
                spectrogram=extract.features(waveform)["spectrogram"],
                mp3=_mp3(waveform, rate) if audio else None,
            )
        )
    return views


def _mp3(waveform: np.ndarray, sample_rate: int) -> bytes:
    """Compress a waveform so that any browser plays it, about 4 kB a second."""
    sound = BytesIO()
    soundfile.write(sound, waveform, sample_rate, format="MP3")
    return sound.getvalue()
