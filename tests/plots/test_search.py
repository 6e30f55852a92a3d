"""Figures of a search, read back from the drawn artists."""

from typing import Any

import pytest

from ser_ray.plots.search import history_figure, importance_figure, parameter_figure, trial_sort_key
from ser_ray.plots.svg import inline_svg
from tests.plots.drawn import lines, points


def row(number: int, state: str, val_ua: float | None, **values: Any) -> dict[str, Any]:
    known = {"trial": number, "state": state, "selected/ua": val_ua, "selected/loss": 1.0}
    return known | {"feature": "mel", "lr_min": 1e-4 * number, "lr_max": 1e-2 * number} | values


TRIALS = [
    row(1, "pruned", 0.5),
    row(2, "finished", 0.3),
    row(3, "failed", None),
    row(4, "pruned", 0.6, feature="mfcc"),
    row(5, "finished", 0.4),
    row(6, "finished", 0.4, **{"selected/loss": 2.0}),
    row(7, "failed", 0.9),
]


def test_history_shows_every_scored_trial_and_the_best_so_far() -> None:
    (axes,) = history_figure(TRIALS).axes
    assert points(axes) == {
        "finished (3)": [[2, 0.3], [5, 0.4], [6, 0.4]],
        "pruned (2)": [[1, 0.5], [4, 0.6]],
    }
    # A finished trial comes before every pruned one, of which no weights are kept.
    assert lines(axes)["best so far"] == ([1, 2, 4, 5, 6], [0.5, 0.3, 0.3, 0.4, 0.4])


def test_a_searched_number_is_drawn_by_feature_kind_on_the_scale_of_its_range() -> None:
    wide = [item | {"lr_max": 10.0 ** -item["trial"]} for item in TRIALS]
    for trials, scale in ((wide, "log"), (TRIALS, "linear")):
        (axes,) = parameter_figure(trials, "lr_max").axes
        x = {item["trial"]: item["lr_max"] for item in trials}
        drawn = points(axes)
        assert set(drawn) == {"mfcc (1)", "mel (4)"}
        assert drawn["mfcc (1)"] == [[x[4], 0.6]]
        assert drawn["mel (4)"] == [[x[1], 0.5], [x[2], 0.3], [x[5], 0.4], [x[6], 0.4]]
        assert (axes.get_xscale(), axes.get_xlabel()) == (scale, "lr_max")


def test_the_label_of_a_tick_is_its_place() -> None:
    for figure in (history_figure(TRIALS), parameter_figure(TRIALS, "lr_max")):
        (axes,) = figure.axes
        figure.draw_without_rendering()
        shares = [float(label.get_text().rstrip("%")) / 100 for label in axes.get_yticklabels()]
        assert shares == pytest.approx(list(axes.get_yticks()))


def test_trials_on_encoders_are_drawn_beside_those_on_pictures() -> None:
    trials = [item | {"feature": "wavlm_base"} if item["trial"] == 2 else item for item in TRIALS]
    drawn = points(*parameter_figure(trials, "feature").axes)
    assert [place[1] for place in drawn["wavlm_base (1)"]] == [0.3]
    assert len(drawn["mel (3)"]) == 3


def test_a_searched_choice_has_a_place_for_each_of_its_values() -> None:
    (axes,) = parameter_figure(TRIALS, "feature").axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mel", "mfcc"]
    assert points(axes)["mfcc (1)"] == [[1, 0.6]]
    assert {x for x, _ in points(axes)["mel (4)"]} == {0}
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0}
    encoders = ("spectrogram", "mfcc", "mel", "wavlm_base_plus")
    trials = [item | {"feature": name} for item in TRIALS for name in encoders]
    (axes,) = parameter_figure(trials, "feature").axes
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {20}, "they overlapped"
    figure = parameter_figure([item | {"weights": "a$_$.pth"} for item in TRIALS], "weights")
    assert ">a$_$.pth<" in inline_svg(figure, "weights"), "it is text and no formula"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [((16, 32, 32, 64, 16), [16, 32, 64]), ((2.05541, 2.1, 2.88895, 4.8, 6.02), None)],
)
def test_values_of_a_list_have_ticks_and_drawn_ones_round_numbers(
    values: tuple[float, ...], ticks: list[float] | None
) -> None:
    scored = [item for item in TRIALS if item["state"] != "failed"]
    trials = [item | {"drawn": x} for item, x in zip(scored, values, strict=True)]
    (axes,) = parameter_figure(trials, "drawn").axes
    found = [x for x in axes.get_xticks() if min(values) <= x <= max(values)]
    assert found == (ticks or [3, 4, 5, 6])


def test_importance_has_the_largest_share_at_the_top() -> None:
    (axes,) = importance_figure({"feature": 0.1, "lr_max": 0.7, "lr_ratio": 0.2}).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "feature", "lr_ratio", "lr_max",
    ]  # fmt: skip
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.1, 0.2, 0.7])  # type: ignore[attr-defined]


def test_trials_rank_by_state_then_score_then_loss() -> None:
    order = [item["trial"] for item in sorted(TRIALS, key=trial_sort_key, reverse=True)]
    assert order == [5, 6, 2, 7, 4, 1, 3]
