"""Figures of scores, read back from the drawn artists."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from ser_ray.plots.scores import confusion_figure, reliability_figure, speakers_figure
from ser_ray.plots.svg import inline_svg
from tests.plots.drawn import lines

LABELS = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")


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
    wanted = np.array([[750, -250, 0], [0, 0, 0], [-1, -299, 700]]) / 1000
    np.testing.assert_allclose(shades, wanted, err_msg="right is positive, wrong negative")
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
        for column in (0, 1):
            *colour, alpha = np.asarray(mesh.get_facecolor()).reshape(2, 2, 4)[0, column]
            cell = alpha * np.array(colour) + (1 - alpha) * behind
            (text,) = (item for item in axes.texts if item.get_position() == (column + 0.5, 0.5))
            letters = np.ones(3) if text.get_color() == "white" else np.array(ink)
            assert contrast(letters, cell) > 3.9, f"{right} % right, column {column}, on {paper}"


def test_bars_show_shares_with_their_clips() -> None:
    rows = [{"speaker": "01", "wa": 0.25, "clips": 60}, {"speaker": "02", "wa": 1.0, "clips": 44}]
    figure = speakers_figure(rows)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.25, 1, 0.75, 0]  # type: ignore[attr-defined]
    assert [text.get_text() for text in axes.texts] == ["25.0% of 60", "100.0% of 44"]
    figure.draw_without_rendering()
    for text in axes.texts:
        assert text.get_window_extent().x1 <= figure.bbox.x1, "cut off at the right"


def test_reliability_shows_accuracy_and_clips_at_every_confidence() -> None:
    nan = float("nan")
    figure = reliability_figure(
        np.array([0.2, nan, 0.9]), np.array([0.5, nan, 1.0]), np.array([6, 0, 12])
    )
    upper, lower = figure.axes
    confidence, accuracy = lines(upper)["this model"]
    np.testing.assert_array_equal(confidence, [0.2, nan, 0.9])
    np.testing.assert_array_equal(accuracy, [0.5, nan, 1.0])
    assert lines(upper)["confidence = accuracy"] == ([0, 1], [0, 1])
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in lower.patches]  # type: ignore[attr-defined]
    np.testing.assert_allclose(bars, [(1 / 6, 6), (1 / 2, 0), (5 / 6, 12)])


@pytest.mark.parametrize("draw", ["confusion", "bars"])
def test_a_long_title_stays_inside_the_picture(draw: str) -> None:
    title = "test, emobox-6 fold 3 of 6 (speaker-independent), the synthetic corpus"
    figures: dict[str, Figure] = {
        "confusion": confusion_figure(np.eye(8, dtype=int), LABELS, title),
        "bars": speakers_figure([{"speaker": "01", "wa": 0.5, "clips": 2}], title),
    }
    figure = figures[draw]
    figure.draw_without_rendering()
    assert title in figure.get_suptitle().replace("\n", " ")
    box = figure.texts[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0
    assert box.x1 <= figure.bbox.x1


def test_a_name_with_two_dollars_is_text_and_no_formula() -> None:
    rows = [{"speaker": "s$^$", "wa": 0.5, "clips": 2}]
    drawn = inline_svg(confusion_figure(np.eye(2, dtype=int), ["a$_$", "b"], "c$_$"), "one")
    drawn += inline_svg(speakers_figure(rows), "two")
    for text in (">a$_$<", ">a$_$ (1)<", ">c$_$<", ">s$^$<"):
        assert text in drawn


def test_long_names_leave_room_for_the_axes() -> None:
    """Common Voice names its speakers by 128 hexadecimal digits."""
    names = [f"{digit * 64}{number}" for number, digit in enumerate("abc")]
    rows = [{"speaker": name, "wa": 0.5, "clips": 2} for name in names]
    for figure in (confusion_figure(np.eye(3, dtype=int), names), speakers_figure(rows)):
        drawn = inline_svg(figure, "long")
        assert figure.axes[0].get_window_extent().width > 0.4 * figure.bbox.width
        assert all(f">{name[:12]}…{name[-11:]}" in drawn for name in names)


def test_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys, numpy; from ser_ray.plots.scores import confusion_figure;"
        "confusion_figure(numpy.eye(2, dtype=int), ['a', 'b'], 't');"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
