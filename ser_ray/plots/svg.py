"""Writes a figure into an HTML page, as SVG."""

import html
import io
import re
import threading

import matplotlib
from matplotlib.figure import Figure

from ser_ray.plots.style import WIDTH

_DRAWING = threading.Lock()
"""matplotlib's settings are global, so only one thread may draw at a time."""


def inline_svg(figure: Figure, description: str) -> str:
    """Return the HTML of a figure. It has no background, and its black is the page's text colour.

    Args:
        figure: the figure. If it is wider than `WIDTH`, it scrolls instead of shrinking.
        description: text for screen readers, unique within the page.
    """
    buffer = io.StringIO()
    # Letters stay text, and equal figures get equal ids, so a run's page is reproducible.
    with _DRAWING, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Remove the ids of groups: they are the same in every figure, and nothing refers to them.
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    wide = "scroll" if figure.get_figwidth() > WIDTH else "fit"
    return f'<div class="{wide}">{svg}</div>'
