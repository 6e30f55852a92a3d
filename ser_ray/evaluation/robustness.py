"""Scores a model on the clips of an evaluation under simulated recording conditions.

The shards hold no sound, so the clips are decoded again, changed by `ser_ray.features.conditions`,
and scored as `predict` scores files. A clip that is too short or silent under a condition counts as
wrong.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ser_ray.errors import CorpusError
from ser_ray.evaluation.evaluation import Evaluation, Row
from ser_ray.features.conditions import CONDITIONS
from ser_ray.inference.batch import predict_under
from ser_ray.inference.prediction import UNREACHABLE
from ser_ray.inference.predictor import Predictor
from ser_ray.training.metrics import Scores, count_confusion


def predict_conditions(
    evaluation: Evaluation, predictor: Predictor, groups: Sequence[str]
) -> dict[str, np.ndarray]:
    """Predict the labels of the clips under recording conditions, on the connected cluster.

    Args:
        evaluation: the evaluation of the unchanged clips.
        groups: groups of `CONDITIONS`.

    Returns:
        {condition: predicted label indices [clips]}. A clip that cannot be scored has the number of
        labels as its index, which is not the index of a label.

    Raises:
        CorpusError: the file of a clip cannot be read.
        SerRayError: the pass ended early.
    """
    conditions = [name for name, (group, *_) in CONDITIONS.items() if group in groups]
    columns = (evaluation.predictions[name].to_pylist() for name in ("path", "start", "end"))
    clips = list(zip(*columns, strict=True))
    answers = pa.concat_tables(predict_under(clips, conditions, predictor)).to_pylist()
    indices = {label: index for index, label in enumerate(evaluation.card.labels)}
    predicted = {name: np.full(len(clips), len(indices)) for name in conditions}
    for row in answers:
        if row["status"] in (UNREACHABLE, "unreadable"):
            raise CorpusError(
                f"{row['path']}: --under needs the sound of the clips, but this file cannot be "
                f"read ({row['reason']}). If the files were moved, prepare the corpus again, for "
                "example with evaluate --corpus"
            )
        if row["emotion"] is not None:
            predicted[row["condition"]][row["clip"]] = indices[row["emotion"]]
    return predicted


def score_under(evaluation: Evaluation, predicted: Mapping[str, np.ndarray]) -> tuple[Row, ...]:
    """Score the predictions under recording conditions.

    Args:
        evaluation: the evaluation of the unchanged clips.
        predicted: the predictions, as `predict_conditions` returns them.

    Returns:
        A row for the unchanged clips, and one for each condition. A row has `condition`,
        `definition`, `ua` and `wa` as shares, and the number of `unscored` clips. `ua_change` is
        the UA minus that of the unchanged clips. `low` and `high` are the ends of the 95 % interval
        of this change, by paired bootstrap.
    """
    definitions = {name: text for name, (_, text, _) in CONDITIONS.items()}
    return (
        _row("clean", "the clips as they are", evaluation, evaluation.predicted),
        *(_row(name, definitions[name], evaluation, labels) for name, labels in predicted.items()),
    )


def _row(name: str, definition: str, evaluation: Evaluation, predicted: np.ndarray) -> Row:
    num_indices = len(evaluation.card.labels) + 1  # the last index is that of unscored clips
    scores = Scores(count_confusion(evaluation.truth, predicted, num_indices))
    change = evaluation.compare(predicted, evaluation.predicted, num_indices)
    low, high = change.ua_interval
    return {
        "condition": name,
        "definition": definition,
        "ua": scores.ua,
        "wa": scores.wa,
        "ua_change": change.ua_difference,
        "low": low,
        "high": high,
        "unscored": len(set(np.asarray(evaluation.clips)[predicted == num_indices - 1])),
    }
