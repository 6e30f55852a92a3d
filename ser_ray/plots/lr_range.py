"""The loss of a learning-rate range test."""

from matplotlib.figure import Figure

from ser_ray.plots.scores import BLUE, GREY, VERMILION, WIDTH, entitle, tidy
from ser_ray.training.lr_range import LrRange


def range_figure(found: LrRange, title: str) -> Figure:
    """Draw the loss against the learning rate, with the proposed bounds."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="learning rate", ylabel="training loss")
    axes.set_xscale("log")
    axes.plot(found.learning_rates, found.losses, color=GREY, linewidth=0.8, label="each step")
    axes.plot(found.learning_rates, found.smooth, color=BLUE, label="averaged")
    for name in ("lr_min", "lr_max"):
        bound = getattr(found, name)
        axes.axvline(bound, color=VERMILION, linestyle=":", label=f"{name} {bound:.1e}")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=2)
    tidy(axes)
    return entitle(figure, title)
