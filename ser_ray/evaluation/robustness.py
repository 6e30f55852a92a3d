"""Scores of a model on the same clips under other recording conditions.

The shards hold no sound. Therefore the clips are decoded again, changed by
`ser_ray.features.conditions`, and scored as `predict` scores files. A clip counts as wrong if its
sound is too short or silent under a condition.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ser_ray.errors import CorpusError
from ser_ray.evaluation import statistics
from ser_ray.evaluation.evaluation import Evaluation, Row
from ser_ray.features.conditions import CONDITIONS
from ser_ray.inference.batch import predict_under
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import UNREACHABLE
from ser_ray.training.metrics import Scores, count_confusion


def predict_conditions(
    evaluation: Evaluation, predictor: Predictor, groups: Sequence[str]
) -> dict[str, np.ndarray]:
    """Predict the clips of an evaluation under conditions, on the connected cluster.

    Args:
        evaluation: the clips, and the labels of the model.
        predictor: the model.
        groups: names of `CONDITIONS`.

    Returns:
        For each condition by name, the predicted label indices [clips]. The index of a clip
        without an answer is the number of labels, which is no label.

    Raises:
        CorpusError: a clip cannot be read again.
        SerRayError: the pass ended early.
    """
    conditions = [name for group in dict.fromkeys(groups) for name in CONDITIONS[group]]
    columns = (evaluation.predictions[name].to_pylist() for name in ("path", "start", "end"))
    clips = list(zip(*columns, strict=True))
    answers = pa.concat_tables(predict_under(clips, conditions, predictor)).to_pylist()
    indices = {label: index for index, label in enumerate(evaluation.card.labels)}
    predicted = {name: np.full(len(clips), len(indices)) for name in conditions}
    for row in answers:
        if row["status"] in (UNREACHABLE, "unreadable"):
            raise CorpusError(
                f"{row['path']}: --under needs the sound of the clips, but this one cannot be "
                f"read again ({row['reason']}); prepare the corpus where its files are now, as "
                "evaluate --corpus does"
            )
        if row["emotion"] is not None:
            predicted[row["condition"]][row["clip"]] = indices[row["emotion"]]
    return predicted


def score_under(evaluation: Evaluation, predicted: Mapping[str, np.ndarray]) -> tuple[Row, ...]:
    """Score the clips of an evaluation under conditions.

    Args:
        evaluation: the clips, and the predictions for them as they are.
        predicted: what `predict_conditions` returned for them.

    Returns:
        A row for the clips as they are, and one for every condition. Each has `condition`,
        `definition`, `ua` and `wa` as shares, and the number of `unscored` clips. `ua_change` is
        the change against the clips as they are, and `low` to `high` is its 95 % interval (paired,
        by bootstrap over speakers).
    """
    definitions = {name: text for group in CONDITIONS.values() for name, (text, _) in group.items()}
    return (
        _row("clean", "the clips as they are", evaluation, evaluation.predicted),
        *(_row(name, definitions[name], evaluation, found) for name, found in predicted.items()),
    )


def _row(name: str, text: str, evaluation: Evaluation, predicted: np.ndarray) -> Row:
    num_indices = len(evaluation.card.labels) + 1
    scores = Scores(count_confusion(evaluation.truth, predicted, num_indices), loss=0.0)
    change = statistics.compare(
        evaluation.speakers, evaluation.truth, predicted, evaluation.predicted, num_indices
    )
    low, high = change.ua_interval
    return {
        "condition": name,
        "definition": text,
        "ua": scores.ua,
        "wa": scores.wa,
        "ua_change": change.ua_difference,
        "low": low,
        "high": high,
        "unscored": int((predicted == num_indices - 1).sum()),
    }
