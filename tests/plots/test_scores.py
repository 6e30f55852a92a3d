"""Figures and tables of a run, read back from the drawn artists and compared with scikit-learn."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from sklearn.metrics import accuracy_score, precision_recall_fscore_support, recall_score

from ser_ray.plots.scores import (
    bars_figure,
    confusion_figure,
    curves_figure,
    group_rows,
    learning_rate_figure,
    per_class_rows,
)

LABELS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def row(epoch: int, val_ua: float, val_loss: float = 1.0) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train_loss": 2.0 / epoch,
        "train_wa": 0.1 * epoch,
        "val_loss": val_loss,
        "val_wa": val_ua + 0.02,
        "val_ua": val_ua,
    }


def luminance(colour: np.ndarray) -> float:
    """WCAG 2.2: relative luminance of an sRGB colour."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: np.ndarray, other: np.ndarray) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_confusion_shows_counts_and_shares_of_the_row() -> None:
    confusion = np.array([[30, 10, 0], [0, 0, 0], [1, 299, 700]])
    figure = confusion_figure(confusion, ["a", "b", "c"], "test")
    axes = figure.axes[0]
    cells = {
        (text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts
    }
    assert cells == {
        (0.5, 0.5): "30\n75%",
        (0.5, 1.5): "10\n25%",
        (2.5, 0.5): "1\n<1%",
        (2.5, 1.5): "299\n30%",
        (2.5, 2.5): "700\n70%",
    }
    (mesh,) = (item for item in axes.collections if isinstance(item, QuadMesh))
    shades = np.asarray(mesh.get_array())
    np.testing.assert_allclose(shades, np.array([[750, 250, 0], [0, 0, 0], [1, 299, 700]]) / 1000)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (40)", "b (0)", "c (1000)"]
    top, bottom = axes.get_ylim()[::-1]
    assert top < bottom, "the first label is the uppermost row"


@pytest.mark.parametrize("num_labels", [8, 20])
def test_text_of_a_cell_stays_in_its_cell(num_labels: int) -> None:
    confusion = np.full((num_labels, num_labels), 1234)
    figure = confusion_figure(confusion, [f"label {i}" for i in range(num_labels)], "test")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = figure.axes[0]
    for text in axes.texts:
        box = text.get_window_extent(canvas.get_renderer())
        x, y = text.get_position()
        corners = axes.transData.transform([(x - 0.5, y + 0.5), (x + 0.5, y - 0.5)])
        assert (corners[0] < box.min).all(), text.get_text()
        assert (box.max < corners[1]).all(), text.get_text()


@pytest.mark.parametrize(
    ("paper", "ink"), [("white", (0.0, 0.0, 0.0)), ("dark page", (0.9, 0.93, 0.95))]
)
def test_text_is_readable_on_every_shade(paper: str, ink: tuple[float, ...]) -> None:
    behind = np.ones(3) if paper == "white" else np.array([0.05, 0.07, 0.09])
    for right in range(1, 100, 3):
        figure = confusion_figure(np.array([[right, 100 - right], [0, 1]]), ["a", "b"], "test")
        figure.draw_without_rendering()
        axes = figure.axes[0]
        (mesh,) = (item for item in axes.collections if isinstance(item, QuadMesh))
        *colour, alpha = np.asarray(mesh.get_facecolor()).reshape(2, 2, 4)[0, 0]
        cell = alpha * np.array(colour) + (1 - alpha) * behind
        (text,) = (item for item in axes.texts if item.get_position() == (0.5, 0.5))
        letters = np.ones(3) if text.get_color() == "white" else np.array(ink)
        assert contrast(letters, cell) > 3.9, f"{right} % on {paper}"


def test_curves_hold_the_history_and_mark_the_kept_epoch() -> None:
    history = [row(1, 0.3), row(2, 0.6, 1.2), row(3, 0.5), row(4, 0.6, 1.1), row(5, 0.4)]
    figure = curves_figure(history, history[3], "validation, emobox-6")
    losses, accuracies = figure.axes
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    for label, key in {
        "training": "train_loss",
        "validation": "val_loss",
        "training WA": "train_wa",
        "validation WA": "val_wa",
        "validation UA": "val_ua",
    }.items():
        assert np.asarray(drawn[label].get_xdata()).tolist() == [1, 2, 3, 4, 5]
        assert np.asarray(drawn[label].get_ydata()).tolist() == [item[key] for item in history]
    for axes in (losses, accuracies):
        assert [4, 4] in [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert "marked: epoch 4, validation UA 60.0%" in figure.get_suptitle()
    assert "emobox-6" in figure.get_suptitle()


def test_learning_rate_is_drawn_by_step_between_its_bounds() -> None:
    rates = [1e-4, 1e-3, 2e-3, 1e-5]
    figure = learning_rate_figure(rates, 1e-4, 2e-3, "OneCycle")
    axes = figure.axes[0]
    low, high, curve = axes.lines
    assert np.asarray(curve.get_xdata()).tolist() == [1, 2, 3, 4]
    assert np.asarray(curve.get_ydata()).tolist() == rates
    assert np.unique([low.get_ydata(), high.get_ydata()]).tolist() == [1e-4, 2e-3]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["lr_min 0.0001", "lr_max 0.002"]


def test_bars_show_shares_with_their_clips() -> None:
    figure = bars_figure(["01", "02"], [0.25, 1.0], [60, 44], "test", "accuracy")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1.0]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["25.0% of 60", "100.0% of 44"]
    figure.draw_without_rendering()
    for text in axes.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1, "cut off at the right"


@pytest.mark.parametrize("draw", ["confusion", "curves", "rates", "bars"])
def test_a_long_title_stays_inside_the_picture(draw: str) -> None:
    title = "test, emobox-6 fold 3 of 6 (speaker-independent), the synthetic corpus"
    figures: dict[str, Figure] = {
        "confusion": confusion_figure(np.eye(8, dtype=int), LABELS, title),
        "curves": curves_figure([row(1, 0.2)], row(1, 0.2), title),
        "rates": learning_rate_figure([1e-3], 1e-4, 1e-3, title),
        "bars": bars_figure(["01"], [0.5], [2], title, "accuracy"),
    }
    figure = figures[draw]
    figure.draw_without_rendering()
    assert title in figure.get_suptitle().replace("\n", " ")
    box = figure.texts[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_table_of_labels_agrees_with_scikit_learn(rng: np.random.Generator) -> None:
    truth, predicted = rng.integers(0, 7, (2, 500))  # label 7 neither occurs nor is predicted
    truth[truth == 3] = 2  # label 3 is predicted and never occurs
    predicted[predicted == 5] = 6  # label 5 occurs and is never predicted
    confusion = np.zeros((8, 8), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    rows = per_class_rows(confusion, LABELS)
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
        mine = speakers == item["speaker"]
        occurring = np.unique(truth[mine])
        assert item["clips"] == mine.sum()
        assert item["wa"] == pytest.approx(accuracy_score(truth[mine], predicted[mine]))
        assert item["ua"] == pytest.approx(
            recall_score(truth[mine], predicted[mine], labels=occurring, average="macro")
        )


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys, numpy; from ser_ray.plots.scores import confusion_figure;"
        "confusion_figure(numpy.eye(2, dtype=int), ['a', 'b'], 't');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
