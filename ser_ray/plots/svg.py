"""A figure as an element of an HTML page."""

import html
import io
import re
import threading

import matplotlib
from matplotlib.figure import Figure

from ser_ray.plots.style import WIDTH

_DRAWING = threading.Lock()
"""matplotlib's settings are the whole program's, and a search draws in its own thread."""


def inline_svg(figure: Figure, description: str) -> str:
    """Write a figure as an element of the page: transparent, black made the text's colour."""
    buffer = io.StringIO()
    # Text stays text, and equal figures get equal ids: the page of a run is the same every time.
    with _DRAWING, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[\w.]+_\d+"', "", svg
    )  # group ids, the same in every figure; never referred to
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(description)}"', 1)
    wide = "scroll" if figure.get_figwidth() > WIDTH else "fit"
    return f'<div class="{wide}">{svg}</div>'
