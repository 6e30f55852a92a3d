"""Tables and sentences made from predictions, against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

from ser_ray.evaluation.evaluation import group_rows, headline, label_rows

LABELS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def test_table_of_labels_agrees_with_scikit_learn(rng: np.random.Generator) -> None:
    truth, predicted = rng.integers(0, 7, (2, 500))  # label 7 neither occurs nor is predicted
    truth[truth == 3] = 2  # label 3 is predicted and never occurs
    predicted[predicted == 5] = 6  # label 5 occurs and is never predicted
    confusion = np.zeros((8, 8), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    rows = label_rows([confusion], LABELS)
    wanted = precision_recall_fscore_support(truth, predicted, labels=range(8), zero_division=0)
    assert [item["label"] for item in rows] == list(LABELS)
    for key, values in zip(("precision", "recall", "f1", "support"), wanted, strict=True):
        np.testing.assert_allclose([float(item[key]) for item in rows], values, err_msg=key)


def test_table_of_speakers_agrees_with_scikit_learn(rng: np.random.Generator) -> None:
    truth, predicted = rng.integers(0, 4, (2, 300))
    speakers = rng.choice(["03", "01", "22"], 300)
    truth[(speakers == "22") & (truth == 2)] = 1  # a speaker without one of the labels
    rows = group_rows("speaker", list(speakers), truth, predicted)
    assert [item["speaker"] for item in rows] == ["01", "03", "22"]
    for item in rows:
        own = speakers == item["speaker"]
        occurring = np.unique(truth[own])
        assert item["clips"] == own.sum()
        assert item["wa"] == pytest.approx(accuracy_score(truth[own], predicted[own]))
        assert item["ua"] == pytest.approx(
            recall_score(truth[own], predicted[own], labels=occurring, average="macro")
        )


def test_headline_names_best_worst_and_the_most_frequent_confusion() -> None:
    confusion = np.array([[9, 0, 1, 0], [2, 3, 5, 0], [30, 0, 70, 0], [0, 0, 0, 0]])
    assert headline(confusion, ("calm", "sad", "angry", "happy")) == (
        "The model recognises calm best (90% of its clips) and sad worst (30%). "
        "It most often mistakes sad for angry (5 of 10 clips)."
    )


def test_headline_of_a_perfect_model_names_no_confusion() -> None:
    assert headline(np.diag([0, 4, 5]), ("calm", "sad", "angry")) == (
        "Every label has a recall of 100%."
    )
