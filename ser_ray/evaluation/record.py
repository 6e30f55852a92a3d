"""Records an evaluation in the run that trained the model: scores, tables, plots and its page."""

from ser_ray.evaluation.pages import add_test_part
from ser_ray.evaluation.rendering import store_page, stored_page
from ser_ray.evaluation.results import REPORT, Evaluation
from ser_ray.plots.scores import bars_figure, confusion_figure, speakers_figure
from ser_ray.tracking.tracker import Tracker, now_ms


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
    tracker.log_scores(test | {"test/ece": evaluation.calibration.ece}, now_ms())
    tracker.describe(Test=evaluation.sentence)
    title, support = evaluation.measured_on, scores.confusion.sum(axis=1)
    tracker.log_files(
        {
            REPORT: page,
            "plots/test_confusion.png": confusion_figure(scores.confusion, labels, title),
            "plots/test_recall_by_label.png": bars_figure(
                labels, scores.recall.tolist(), support.tolist(), "recall", title
            ),
            "plots/test_accuracy_by_speaker.png": speakers_figure(evaluation.speaker_rows, title),
            "tables/test.json": evaluation.to_dict(),
            "tables/test_predictions.csv": evaluation.predictions,
        }
    )
