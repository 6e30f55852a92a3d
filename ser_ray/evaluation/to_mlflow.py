"""What MLflow gets of evaluated models: an evaluation's scores, tables, plots and page go into the
run that trained the model, and a registered version gets the model's card.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from ser_ray.evaluation.evaluation import REPORT, Evaluation
from ser_ray.evaluation.pages import add_test_part
from ser_ray.evaluation.rendering import as_artifact, render, store_page, stored_page
from ser_ray.plots.scores import bars_figure, confusion_figure, speakers_figure
from ser_ray.tracking.about import SHARDS_TAG
from ser_ray.tracking.registry import (
    best_training_of,
    fetch_checkpoint,
    read_test_scores,
    read_validation_ua,
    register_model,
)
from ser_ray.tracking.tracker import Tracker, now_ms
from ser_ray.training.checkpoint import read_card


def record_evaluation(evaluation: Evaluation, *, audio: bool) -> None:
    """Store the evaluation of a test part in the run that `evaluation.origin` names.

    Its page in the run's folder gets the test part also if the tracking store does not answer.

    Args:
        evaluation: of the test part of the model's own fold.
        audio: put the sound of the clips that the page shows into the page.

    Raises:
        TrackingError: the store does not have the run, or does not accept the evaluation.
    """
    origin, labels, scores = evaluation.origin, evaluation.card.labels, evaluation.scores
    page = stored_page(evaluation.report)
    if page:
        page = add_test_part(page, evaluation, audio=audio)
        store_page(page, evaluation.report)
    tracker = Tracker.of_run(origin["tracking_uri"], origin["run_id"])
    if not page:
        page = add_test_part(tracker.read_text(REPORT), evaluation, audio=audio)
    test = {f"test/{name}": value for name, value in scores.to_dict().items()}
    test["test/ece"] = evaluation.calibration.ece
    test["test/ece_uncalibrated"] = evaluation.uncalibrated.ece
    for row in evaluation.under:
        test |= {f"test/under/{row['condition']}/{name}": float(row[name]) for name in ("ua", "wa")}
    tracker.log_scores(test, now_ms())
    tracker.describe(Test=evaluation.sentence)
    title, support = evaluation.measured_on, scores.confusion.sum(axis=1)
    tracker.log_files(
        {
            REPORT: as_artifact(page),
            "plots/test_confusion.png": confusion_figure(scores.confusion, labels, title),
            "plots/test_recall_by_label.png": bars_figure(
                labels, scores.recall.tolist(), support.tolist(), "recall", title
            ),
            "plots/test_accuracy_by_speaker.png": speakers_figure(evaluation.speaker_rows, title),
            "tables/test.json": evaluation.to_dict(),
            "tables/test_predictions.csv": evaluation.predictions,
        }
    )


def register(run_id: str, name: str, alias: str, tracking_uri: str) -> tuple[str, str]:
    """Register a run's model, and return the new version's number and the model's card.

    For a cross-validation, this is the model of the best fold. The trials of a search have no
    models, so for a search it is that of the newest run that trained the best trial's recipe.

    Raises:
        TrackingError: there is no such run, or it has no model.
    """
    run_id = best_training_of(run_id, tracking_uri)
    with TemporaryDirectory() as folder:
        card = read_card(fetch_checkpoint(run_id, tracking_uri, Path(folder)))
    scores = read_test_scores(run_id, tracking_uri)
    validation_ua = read_validation_ua(run_id, tracking_uri)
    text = render(
        "model_card.md.jinja", card=card, scores=scores, validation_ua=validation_ua
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
