"""Tables of scores by label and by group of clips, and their summary in sentences."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ser_ray.training.metrics import Scores, count_confusion

Row = dict[str, Any]
"""A row of a table: names and counts, and scores as shares from 0 to 1."""


def label_rows(confusions: Sequence[np.ndarray], labels: Sequence[str]) -> list[Row]:
    """Tabulate precision, recall, F1 (shares) and support (clips) of every label.

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


def group_rows(
    kind: str, groups: Sequence[str], truth: np.ndarray, predicted: np.ndarray
) -> list[Row]:
    """Tabulate clips, WA and UA (shares) of every group of clips, by name.

    Args:
        kind: name of the groups' column, such as speaker or sex.
        groups: group of every clip [clips].
        truth: label indices [clips].
        predicted: label indices [clips].
    """
    num_labels = int(max(truth.max(), predicted.max())) + 1
    rows = []
    for group in sorted(set(groups)):
        own = np.asarray(groups) == group
        scores = Scores(count_confusion(truth[own], predicted[own], num_labels), loss=0.0)
        rows.append({kind: group, "clips": scores.num_clips, "wa": scores.wa, "ua": scores.ua})
    return rows


def headline(confusion: np.ndarray, labels: Sequence[str]) -> str:
    """Describe in sentences the labels with the highest and lowest recall, and the worst confusion.

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
