"""Figures of a training, read back from the drawn artists."""

import re

import numpy as np
import pytest

from ser_ray.plots.svg import inline_svg
from ser_ray.plots.training import (
    curves_figure,
    layer_weights_figure,
    learning_rate_figure,
    range_figure,
)
from tests.plots.drawn import lines


def row(epoch: int, val_ua: float, val_loss: float = 1.0) -> dict[str, float]:
    return {
        "epoch": epoch,
        "train/loss": 2.0 / epoch,
        "train/wa": 0.1 * epoch,
        "val/loss": val_loss,
        "val/wa": val_ua + 0.02,
        "val/ua": val_ua,
    }


def test_curves_show_the_history_and_mark_the_selected_epoch() -> None:
    history = [row(1, 0.3), row(2, 0.6, 1.2), row(3, 0.5), row(4, 0.6, 1.1), row(5, 0.4)]
    figure = curves_figure(history, history[3], "validation, emobox-6")
    losses, accuracies = figure.axes
    drawn = lines(losses) | lines(accuracies)
    for label, key in {
        "training": "train/loss",
        "validation": "val/loss",
        "training WA": "train/wa",
        "validation WA": "val/wa",
        "validation UA": "val/ua",
    }.items():
        assert drawn[label] == ([1, 2, 3, 4, 5], [item[key] for item in history])
    for axes in (losses, accuracies):
        assert [4, 4] in [np.asarray(line.get_xdata()).tolist() for line in axes.lines]
    assert "marked: epoch 4, validation UA 60.0%" in figure.get_suptitle()
    assert "emobox-6" in figure.get_suptitle()


def test_learning_rate_is_drawn_by_step_between_its_bounds() -> None:
    rates = [1e-4, 1e-3, 2e-3, 1e-5]
    figure = learning_rate_figure(rates, 1e-4, 2e-3)
    axes = figure.axes[0]
    low, high, curve = axes.lines
    assert np.asarray(curve.get_xdata()).tolist() == [1, 2, 3, 4]
    assert np.asarray(curve.get_ydata()).tolist() == rates
    assert np.unique([low.get_ydata(), high.get_ydata()]).tolist() == [1e-4, 2e-3]
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.texts] == ["lr_min 0.0001", "lr_max 0.002"]


def test_range_test_shows_both_losses_by_learning_rate_and_the_bounds() -> None:
    found = {
        "learning_rates": [1e-5, 1e-4, 1e-3],
        "losses": [2.0, 1.0, 3.0],
        "smooth": [1.9, 1.4, 2.5],
        "lr_min": 2e-5,
        "lr_max": 5e-4,
    }
    (axes,) = range_figure(found).axes
    drawn = lines(axes)
    assert drawn["each step"] == (found["learning_rates"], found["losses"])
    assert drawn["averaged"] == (found["learning_rates"], found["smooth"])
    assert drawn["lr_min 2.0e-05"][0] == [2e-5, 2e-5]
    assert drawn["lr_max 5.0e-04"][0] == [5e-4, 5e-4]
    assert axes.get_xscale() == "log"


def test_powers_of_ten_on_a_logarithmic_axis_are_formulas() -> None:
    drawn = inline_svg(learning_rate_figure([1e-4, 1e-2], 1e-4, 1e-2), "learning rate")
    assert "mathdefault" not in re.sub("<!--.*?-->", "", drawn)


@pytest.mark.parametrize("title", ["", "test, emobox-6 fold 3 of 6 (speaker-independent), RAVDESS"])
def test_a_title_is_broken_to_the_width_of_the_figure(title: str) -> None:
    figure = layer_weights_figure([0.25, 0.75], title)
    figure.draw_without_rendering()
    assert figure.get_suptitle().replace("\n", " ") == title
    for text in figure.texts:
        box = text.get_window_extent()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1


def test_each_layer_of_an_encoder_has_a_bar_as_high_as_its_weight() -> None:
    [axes] = layer_weights_figure([0.1, 0.7, 0.2], "tiny").axes
    bars = [bar.get_bbox() for bar in axes.patches]  # type: ignore[attr-defined]
    assert [round((bar.x0 + bar.x1) / 2) for bar in bars] == [1, 2, 3]
    assert [bar.height for bar in bars] == pytest.approx([0.1, 0.7, 0.2])
