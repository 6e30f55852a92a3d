"""The common style of all figures: colours, width, frame, legend and title.

Figures are drawn without pyplot, so they need no display and no global state. The colours can be
distinguished with the common kinds of colour blindness (Okabe and Ito 2008). Lines also differ by
their dashes or width, and points by their shapes. Names that a user chose are drawn with
`parse_math=False`, because what stands between two $ is otherwise a formula.
"""

import textwrap
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#808080"
"""If a figure shows correct and wrong predictions, correct ones are blue, wrong ones vermilion."""
DARK_BLUE, DARK_VERMILION = "#08529C", "#983000"
"""The darkest colours in a confusion matrix."""
WIDTH = 5.2
"""Width of a figure in inches. Phones shrink such figures to three quarters, so their text has at
least 10 points."""
MOST_CHARACTERS = 24
"""Longer names beside an axis are shortened, because they would leave no room for the axes."""
CHARACTERS_PER_INCH = 12
"""Number of characters of a title that fit into an inch."""


def new_axes(height: float, **settings: Any) -> Axes:
    """Return the only axes of a new figure of this height in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained").add_subplot(**settings)


def shortened(name: str) -> str:
    """Return a name without its middle if it has more than MOST_CHARACTERS characters."""
    half = MOST_CHARACTERS // 2
    return name if len(name) <= MOST_CHARACTERS else f"{name[:half]}…{name[1 - half :]}"


def format_percent(share: float, _: float = 0.0) -> str:
    """Return the label of the tick at a share from 0 to 1, such as 62.5%."""
    return f"{100 * share:.3g}%"


def tidy(axes: Axes) -> None:
    """Remove the top and right edges of the frame, and draw a faint grid."""
    axes.grid(color=GREY, alpha=0.3, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, ncols=columns)


def finish(axes: Axes, title: str = "") -> Figure:
    """Tidy the only axes of a figure, add a title, and return the figure."""
    tidy(axes)
    figure = axes.get_figure(root=True)
    assert figure is not None
    return add_title(figure, title)


def add_title(figure: Figure, *lines: str) -> Figure:
    """Write lines above a figure, wrapped to its width. Empty lines are left out."""
    width = round(figure.get_figwidth() * CHARACTERS_PER_INCH)
    title = "\n".join(textwrap.fill(line, width) for line in lines if line)
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
