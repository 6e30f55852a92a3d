"""Tables and sentences made from predictions, against scikit-learn and by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    precision_recall_fscore_support,
    recall_score,
)

from ser_ray.evaluation.evaluation import Evaluation, predictions_table
from ser_ray.evaluation.sections import headline, label_rows
from ser_ray.training.checkpoint import read_card

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


def test_table_of_speakers_agrees_with_scikit_learn(
    rng: np.random.Generator, checkpoint: Path
) -> None:
    card = read_card(checkpoint)
    truth, predicted = rng.integers(0, 4, (2, 300))
    speakers = rng.choice(["03", "01", "22"], 300)
    truth[(speakers == "22") & (truth == 2)] = 1  # a speaker without one of the labels
    clips = pa.table(
        {
            "path": [f"{number}.wav" for number in range(300)],
            "start": pa.nulls(300, pa.float64()),
            "speaker": speakers,
            "emotion": np.array(card.labels)[truth],
        }
    )
    table = predictions_table(clips, np.eye(len(card.labels))[predicted], card.labels)
    once, twice = (
        Evaluation(
            card=card, part="test", protocol="all", corpus="table", is_own_test=True,
            seen_speakers=(), predictions=pa.concat_tables([table] * seeds),
        )
        for seeds in (1, 2)
    )  # fmt: skip
    rows = once.groups["speaker"]
    assert twice.groups["speaker"] == rows, "clips that two seeds scored"
    assert [item["speaker"] for item in rows] == ["01", "03", "22"]
    for item in rows:
        own = speakers == item["speaker"]
        occurring = np.unique(truth[own])
        assert item["clips"] == own.sum()
        assert item["wa"] == pytest.approx(accuracy_score(truth[own], predicted[own]))
        assert item["ua"] == pytest.approx(
            recall_score(truth[own], predicted[own], labels=occurring, average="macro")
        )


def test_the_table_of_corpora_holds_the_scores_of_each_alone(checkpoint) -> None:
    """Two seeds scored the same clips: the scores are means, and each clip counts once."""
    rng = np.random.default_rng(3)
    card = read_card(checkpoint)
    num_labels = len(card.labels)
    truth = np.tile(rng.integers(0, num_labels, 60), 2)
    corpora = np.tile(np.repeat(["speech", "a/b"], [40, 20]), 2)
    clips = pa.table(
        {
            "path": [f"{number}.wav" for number in range(60)] * 2,
            "start": pa.nulls(120, pa.float64()),
            "corpus": corpora,
            "speaker": np.tile(rng.choice(["1", "2", "3"], 60), 2),
            "emotion": np.array(card.labels)[truth],
            "seed": np.repeat([0, 1], 60),
        }
    )
    probabilities = rng.dirichlet(np.ones(num_labels), 120)
    table = predictions_table(clips, probabilities, card.labels)
    table = table.append_column("seed", clips["seed"])
    found = Evaluation(
        card=card, part="test", protocol="cross-corpus", corpus="several", is_own_test=True,
        seen_speakers=(), predictions=table,
    )  # fmt: skip
    assert [(row["corpus"], row["clips"]) for row in found.corpus_rows] == [
        ("a/b", 20),
        ("speech", 40),
    ]
    predicted, seeds = probabilities.argmax(axis=1), clips["seed"].to_numpy()
    for row in found.corpus_rows:
        parts = [(corpora == row["corpus"]) & (seeds == seed) for seed in (0, 1)]
        by_seed = [balanced_accuracy_score(truth[own], predicted[own]) for own in parts]
        assert row["ua"] == pytest.approx(np.mean(by_seed))
        assert float(row["ua_low"]) < float(row["ua"]) < float(row["ua_high"])
    assert found.group_metrics.keys() == {
        f"corpus/{name}/{score}" for name in ("a-b", "speech") for score in ("ua", "wa")
    }
    assert len(found.corpus_lines) == 2
    assert found.groups["corpus"] == found.corpus_rows


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
