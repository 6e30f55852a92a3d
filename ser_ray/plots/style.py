"""What all figures share: their colours, their width, and how a frame and a title look.

Figures are drawn without pyplot: they need no display and hold no global state. The colours can be
distinguished with any kind of colour vision (Okabe and Ito 2008). Lines also differ in their
dashes, and points in their shapes.
"""

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#808080"
"""Where a figure shows what is right and wrong, right is blue and wrong is vermilion."""
DARK_BLUE, DARK_VERMILION = "#08529C", "#983000"
"""Full shade of a cell that holds white text."""
WIDTH = 5.2
"""Inches. A phone shows three quarters of it, so no text is smaller than matplotlib's 10 points."""
LETTERS_PER_INCH = 12
"""Letters of a title that fit into an inch."""


def tidy(axes: Axes) -> None:
    """Remove the frame's top and right sides and draw a faint grid."""
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=columns)


def entitle(figure: Figure, *lines: str) -> Figure:
    """Write lines above a figure, broken to its width; empty ones are left out."""
    letters = round(figure.get_figwidth() * LETTERS_PER_INCH)
    title = "\n".join(textwrap.fill(line, letters) for line in lines if line)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
