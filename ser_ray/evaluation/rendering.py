"""Fills the templates of HTML pages and of the model card, and stores pages in run folders."""

import base64
import html
import logging
import re
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ser_ray.errors import LocationError
from ser_ray.storage.atomic import write_file
from ser_ray.storage.paths import filesystem_of, read_file

_PAGE_LINK = re.compile(r'<a href="[^"#:]+">(.*?)</a>', re.DOTALL)
_CONTENTS_AND_CLIPS = re.compile(
    r'<nav.*?</nav>|<h3 id="[^"]*-(?:examples|hardest)">.*?(?=</section>)', re.DOTALL
)

logger = logging.getLogger(__name__)


def render(template: str, **values: object) -> str:
    """Fill a template of `templates/`. In HTML, values are escaped; a missing value is an error."""
    return _environment().get_template(template).render(values)


def store_page(page: str, location: str) -> None:
    """Write a page to a path or URI, and create its folder.

    If the page cannot be written, only a warning is logged, because the caller also stores or
    prints the numbers.
    """
    try:
        filesystem, path = filesystem_of(location)
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        write_file(filesystem, path, page.encode())
    except (OSError, LocationError) as error:
        logger.warning("%s: the report could not be written (%s)", location, error)


def as_artifact(page: str) -> str:
    """Return a page without its links to other pages, for the MLflow run.

    MLflow's viewer shows a page alone, so links to other pages would not work.
    """
    return _PAGE_LINK.sub(r"\1", page)


def stored_page(location: str) -> str:
    """Return the page at a path or URI; empty if it cannot be read."""
    try:
        return read_file(location).decode()
    except (OSError, LocationError):
        return ""


def notebook_cell(text: str, report: str) -> str:
    """Return what a notebook shows of a result: its text, and its page if there is one.

    The page's clips are left out, because their pictures and sounds would make the notebook large.
    """
    cell = f'<pre style="font-family: monospace">{html.escape(text)}</pre>'
    page = _CONTENTS_AND_CLIPS.sub("", as_artifact(stored_page(report))) if report else ""
    if page:
        cell += f'<iframe srcdoc="{html.escape(page)}" width="100%" height="600"></iframe>'
    return cell


@cache
def _environment() -> Environment:
    from ser_ray.plots.svg import inline_svg  # imports matplotlib, which is slow

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=lambda name: name is None or ".md" not in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share, digits=1: f"{share:.{digits}%}"
    environment.filters["svg"] = lambda figure, about: Markup(inline_svg(figure, about))
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")  # of Markdown
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment
