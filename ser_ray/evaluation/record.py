"""Records an evaluation in MLflow: scores, tables, plots and a page in the training's run."""

from ser_ray.evaluation.pages import run_page
from ser_ray.evaluation.results import Evaluation
from ser_ray.plots.scores import bars_figure, confusion_figure
from ser_ray.tracking.tracker import Tracker, now_ms


def record_evaluation(evaluation: Evaluation, tracker: Tracker, *, audio: bool) -> None:
    """Store the evaluation of a test part in the run that trained the model.

    Args:
        tracker: of that run.
        audio: put the sound of the clips that the page shows into the page.

    Raises:
        TrackingError: the store does not accept them.
    """
    scores, labels = evaluation.scores, evaluation.card.labels
    test = {f"test/{name}": value for name, value in scores.to_dict().items()}
    tracker.log_metrics(test | {"test/ece": evaluation.calibration.ece}, 0, now_ms())
    tracker.deliver()
    title, speakers = evaluation.measured_on, evaluation.groups["speaker"]
    recall = bars_figure(
        labels, scores.recall.tolist(), scores.confusion.sum(axis=1).tolist(), "recall", title
    )
    by_speaker = bars_figure(
        [str(row["speaker"]) for row in speakers],
        [float(row["wa"]) for row in speakers],
        [int(row["clips"]) for row in speakers],
        "accuracy",
        title,
    )
    tracker.log_files(
        {
            "report_test.html": run_page(evaluation, name=tracker.run_name, audio=audio),
            "plots/test_confusion.png": confusion_figure(scores.confusion, labels, title),
            "plots/test_recall_by_emotion.png": recall,
            "plots/test_accuracy_by_speaker.png": by_speaker,
            "tables/test.json": evaluation.to_dict(),
            "tables/test_predictions.csv": evaluation.predictions,
        }
    )
