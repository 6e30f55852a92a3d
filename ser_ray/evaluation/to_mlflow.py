"""Records trainings and evaluations in MLflow, and registers models there.

If a model is scored on the test part of its own fold, the scores, tables, plots and page are logged
to the MLflow run that trained the model. A registered model has a model card as its description.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ser_ray.evaluation.evaluation import REPORT, Evaluation
from ser_ray.evaluation.pages import add_test_part
from ser_ray.evaluation.rendering import as_artifact, render, store_page, stored_page
from ser_ray.plots.scores import confusion_figure, speakers_figure
from ser_ray.plots.training import curves_figure, layer_weights_figure
from ser_ray.tracking.registry import (
    SELECTED_BY,
    TEST_SCORES,
    best_training_of,
    cross_validation_of,
    fetch_checkpoint,
    read_test_scores,
    register_model,
)
from ser_ray.tracking.run_metadata import SHARDS_TAG
from ser_ray.tracking.store import resolve_uri
from ser_ray.tracking.tracker import Tracker, now_ms
from ser_ray.training.checkpoint import read_card, read_layer_weights
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.metrics import selected_metrics


def record_training(
    tracker: Tracker,
    checkpoint: Path,
    card: CheckpointCard,
    validation: Evaluation | None,
    progress: dict[str, Any],
    page: str,
) -> None:
    """Log the model, scores, page, plots and history of a training, and end its MLflow run.

    Args:
        checkpoint: directory of the selected checkpoint.
        validation: evaluation on the validation part; None if all speakers trained the model.
        progress: epochs and scores of the training (`ser_ray.training.checkpoint.Snapshot`).
        page: the run's page.

    Raises:
        TrackingError: the store refused a part of the record.
    """
    selected, history = progress["selected"], progress["history"]
    tracker.deliver()
    title = f"{card.split['label']}, {card.trained_on}"
    precision = "bfloat16" if selected.get("bfloat16") else "float32"
    tracker.log_params({"initial_weights": card.initial_weights, "precision": precision})
    files = {
        REPORT: page,
        "plots/curves.png": curves_figure(history, selected, title),
        "tables/history.json": history,
    }
    if layers := read_layer_weights(checkpoint, card):
        files["plots/layer_weights.png"] = layer_weights_figure(layers, title)
    if validation is not None:
        confusion = np.asarray(progress["selected_confusion"])
        figure = confusion_figure(confusion, card.labels, f"validation, {title}")
        files["plots/validation_confusion.png"] = figure
        tracker.describe(Validation=validation.sentence)
    tracker.log_files(files)
    tracker.log_model(checkpoint, card.labels)
    tracker.log_scores(selected_metrics(selected), now_ms())
    tracker.finish("FINISHED")


def record_evaluation(evaluation: Evaluation, *, audio: bool) -> None:
    """Log the evaluation of a test part to the MLflow run that trained the model.

    The page in the run folder gets the test part even if the tracking store does not respond.

    Args:
        evaluation: the evaluation on the test part of the model's own fold.
        audio: whether the page contains the sound of the clips that it shows.

    Raises:
        TrackingError: the store does not have the run, or refuses the evaluation.
    """
    origin, labels, scores = evaluation.origin, evaluation.card.labels, evaluation.scores
    page = stored_page(evaluation.report)
    if page:
        page = add_test_part(page, evaluation, audio=audio)
        store_page(page, evaluation.report)
    tracker = Tracker.of_run(origin["tracking_uri"], origin["run_id"])
    if not page:
        page = add_test_part(tracker.read_text(REPORT), evaluation, audio=audio)
    metrics = scores.to_dict() | evaluation.group_metrics
    metrics["ece"] = evaluation.calibration.ece
    metrics["ece_uncalibrated"] = evaluation.uncalibrated.ece
    tracker.log_scores({f"test/{name}": value for name, value in metrics.items()}, now_ms())
    tracker.describe(Test=evaluation.sentence)
    title = evaluation.measured_on
    tracker.log_files(
        {
            REPORT: as_artifact(page),
            "plots/test_confusion.png": confusion_figure(scores.confusion, labels, title),
            "plots/test_accuracy_by_speaker.png": speakers_figure(evaluation.speaker_rows, title),
            TEST_SCORES: evaluation.to_dict(),
            "tables/test_predictions.csv": evaluation.predictions,
        }
    )


def register(run_id: str, name: str, alias: str, tracking_uri: str) -> tuple[str, str]:
    """Register the model of a run or of its best training; return the version and the model card.

    If the model was trained on all speakers, its card has the scores of a cross-validation of the
    same recipe, if there is one.

    Raises:
        TrackingError: there is no such run, it has no model, or the store refuses the version.
    """
    run_id = best_training_of(run_id, tracking_uri)
    with TemporaryDirectory() as folder:
        card = read_card(fetch_checkpoint(run_id, tracking_uri, Path(folder)))
    scores = read_test_scores(run_id, tracking_uri)
    run = Tracker.of_run(resolve_uri(tracking_uri), run_id).read()
    validation_ua = run.data.metrics.get(SELECTED_BY)
    text = render(
        "model_card.md.jinja",
        card=card,
        scores=scores,
        validation_ua=validation_ua,
        tested=cross_validation_of(run_id, tracking_uri) if validation_ua is None else None,
    ).rstrip()
    tags = {
        "protocol": card.split["label"],
        "feature": card.config.feature,
        "corpus": card.corpus,
        SHARDS_TAG: card.shards_fingerprint,
    }
    if validation_ua is not None:
        tags["val/ua"] = f"{validation_ua:.4f}"
    if scores is not None:
        tags["test/ua"] = f"{scores['ua']:.4f}"
    return register_model(run_id, tracking_uri, name, alias, tags, text), text
