"""What a figure shows, read back from its artists."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """The points of every line by its label."""
    return {
        str(line.get_label()): (
            np.asarray(line.get_xdata()).tolist(),
            np.asarray(line.get_ydata()).tolist(),
        )
        for line in axes.lines
    }


def points(axes: Axes) -> dict[str, list[list[float]]]:
    """The points of every scatter by its label."""
    return {
        str(item.get_label()): np.asarray(item.get_offsets()).tolist()
        for item in axes.collections
        if isinstance(item, PathCollection)
    }
