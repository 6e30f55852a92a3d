"""The page of a run: one HTML file that loads nothing, for any screen, light or dark.

A `RunReport` of plain numbers comes in, text goes out; the pages of a search are put together from
the same sections (`ser_ray.search.page`). The figures are inline SVG in the colour of the
page's own text, so that they follow the reader's light or dark setting.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure

from ser_ray.corpus.ravdess import CORPORA
from ser_ray.plots.scores import (
    Row,
    bars_figure,
    clip_figure,
    confusion_figure,
    curves_figure,
    learning_rate_figure,
    per_class_rows,
    reliability_figure,
)
from ser_ray.plots.svg import inline_svg


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipView:
    """One clip as the page shows it."""

    name: str
    """File name."""
    truth: str
    """Its label."""
    predicted: str
    """The label named."""
    probability: float
    """Of the label named."""
    waveform: np.ndarray
    """Its sound [num_samples], full scale ±1."""
    sample_rate: int
    """Hertz."""
    spectrogram: np.ndarray
    """Power in dB [bins, frames], from 0 Hz to half the sample rate."""
    mp3: bytes | None
    """Its sound for the player; None shows none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """All that the page of a run shows."""

    title: str
    """Name of the run."""
    corpus: str
    """ravdess, synthetic or table."""
    protocol: str
    """Protocol and fold in words; it stands beside every score, which says nothing without it."""
    part: Literal["validation", "test"]
    """What the scores, the confusion matrix and the speakers' table were measured on."""
    scores: Mapping[str, float]
    """Shares from 0 to 1 by name (UA, WA, macro F1), shown large, in this order."""
    labels: Sequence[str]
    """Names of the confusion matrix's rows and columns."""
    confusion: np.ndarray
    """Counts [labels, labels], row = true, column = predicted."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % interval of each of the scores, where there is one."""
    drawn: str
    """What the intervals were drawn over, in words."""
    groups: Mapping[str, Sequence[Row]]
    """Rows of `group_rows` by what the groups are; `speaker` is among them."""
    calibration: tuple[Sequence[float], Sequence[float], Sequence[int]]
    """Confidence, accuracy and clips of every bin, as `reliability_figure` takes them."""
    ece: float
    """Expected calibration error, a share."""
    examples: Sequence[ClipView]
    """A typical clip of each label."""
    hardest: Sequence[ClipView]
    """Clips that the model is surest of and wrong about."""
    history: Sequence[Mapping[str, float]]
    """Rows of the epochs, as `curves_figure` takes them; none on the page of an evaluation."""
    selected: Mapping[str, float]
    """That of the epoch whose weights were kept, where there is a history."""
    lr_per_step: Sequence[float]
    """Learning rate of every step, where there is a history."""
    lr_min: float
    """Lower bound of the schedule."""
    lr_max: float
    """Upper bound of the schedule."""
    config: Mapping[str, object]
    """Settings by name."""
    versions: Mapping[str, str]
    """Versions, machine and commit by name."""


_HEADINGS = {"f1": "F1", "wa": "WA", "ua": "UA"}
_EXAMPLES = "A clip of each label in the middle of how sure the model is of that label."
_HARDEST = "The clips that the model is surest of and wrong about, the surest first."
_BANNER = (
    '<p class="banner"><strong>Synthetic corpus.</strong> These clips are synthesised: the numbers '
    "show that the program works, they are not results on RAVDESS.</p>"
)
# No script, and nothing from elsewhere, whatever a label or a setting contains.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --quiet: #59636e; --line: #d1d9e0;
  --warn-ink: #4d2d00; --warn: #fff1d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #9198a1; --line: #3d444d;
    --warn-ink: #ffdfb6; --warn: #3a2a10 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; margin-bottom: 0 }
h2 { font-size: 1.15rem; margin-top: 2.5rem }
.banner { padding: .75rem 1rem; background: var(--warn); color: var(--warn-ink);
  border-left: .3rem solid currentColor }
.scores { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
.scores div { border: 1px solid var(--line); padding: .75rem 1rem }
.scores dd { margin: 0; overflow-wrap: anywhere } .scores .value { font-size: 2rem }
.quiet, caption { color: var(--quiet); font-size: .875rem }
.pair { display: grid; gap: 1.5rem 3rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)) }
.pair > *, .scroll { min-width: 0; overflow-x: auto }
.pair > .scroll { grid-column: 1 / -1 }
.clips { display: grid; gap: 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { overflow-wrap: anywhere } audio { width: 100% }
svg { display: block; height: auto; max-width: 100% } .scroll svg { max-width: none }
svg text { fill: currentColor }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums }
caption { text-align: left; padding-bottom: .25rem }
th, td { padding: .25rem clamp(.5rem, 2vw, 1.25rem) .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line) }
th { font-weight: 600 } td { overflow-wrap: anywhere }
.numbers { width: min(100%, 24rem) }
.numbers td, .numbers th + th { text-align: right; overflow-wrap: normal; white-space: nowrap }
"""


def render_report(report: RunReport) -> str:
    """Write the page of a scored model."""
    measured_on = _measured_on(report)
    tiles = score_tiles(report.scores, measured_on, report.intervals, report.drawn)
    training = ""
    if report.history:
        bounds = (report.lr_min, report.lr_max)
        validated_on = _measured_on(report, "validation")
        training = training_section(
            report.history, report.selected, report.lr_per_step, bounds, validated_on
        )
    return render_page(
        report.title,
        report.corpus,
        tiles,
        labels_section(report.confusion, report.labels, measured_on),
        _groups_section(report),
        _clips("Examples", _EXAMPLES, report.examples),
        _clips("Hardest clips", _HARDEST, report.hardest),
        training,
        settings_section(report.config, report.versions),
    )


def render_page(title: str, corpus: str, *sections: str) -> str:
    """Write a page of sections.

    Args:
        title: its heading, as it is to be read.
        corpus: ravdess, synthetic or table.
        sections: elements; what is empty is left out.
    """
    heading = html.escape(title)
    body = "\n".join(
        part
        for part in (
            f"<h1>{heading}</h1>",
            f'<p class="quiet">ser_ray on {CORPORA[corpus]}</p>',
            _BANNER if corpus == "synthetic" else "",
            *sections,
        )
        if part
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def score_tiles(
    scores: Mapping[str, float],
    measured_on: str,
    intervals: Mapping[str, tuple[float, float]] | None = None,
    drawn: str = "",
) -> str:
    """Shares from 0 to 1 by name, shown large, each with what it was measured on."""
    tiles = []
    for name, share in scores.items():
        within = ""
        if intervals and name in intervals:
            low, high = intervals[name]
            within = f"<dd>95 % interval {low:.1%} to {high:.1%}, {html.escape(drawn)}</dd>"
        tiles.append(
            f'<div><dt>{html.escape(name)}</dt><dd class="value">{share:.1%}</dd>{within}'
            f'<dd class="quiet">{html.escape(measured_on)}</dd></div>'
        )
    return f'<dl class="scores">{"".join(tiles)}</dl>'


def labels_section(confusion: np.ndarray, labels: Sequence[str], measured_on: str) -> str:
    """The confusion matrix [labels, labels] and what it says of every label."""
    figure = confusion_figure(confusion, labels, measured_on)
    return (
        f'<h2>Labels</h2><div class="pair">{inline_svg(figure, "Confusion matrix")}'
        f"{table_of(per_class_rows(confusion, labels), measured_on)}</div>"
    )


def training_section(
    history: Sequence[Mapping[str, float]],
    selected: Mapping[str, float],
    lr_per_step: Sequence[float],
    bounds: tuple[float, float],
    measured_on: str,
) -> str:
    """The curves of a training's epochs, and the learning rate of its steps between its bounds."""
    curves = curves_figure(history, selected, measured_on)
    rates = learning_rate_figure(lr_per_step, *bounds, "OneCycle, by step")
    return (
        "<h2>Training</h2>"
        f'<div class="pair">{inline_svg(curves, "Loss and accuracy of every epoch")}'
        f"{inline_svg(rates, 'Learning rate of every step')}</div>"
    )


def figure_section(heading: str, *figures: tuple[Figure, str]) -> str:
    """Figures side by side where there is room, each with what it shows in words."""
    shown = "".join(inline_svg(figure, description) for figure, description in figures)
    return f'<h2>{html.escape(heading)}</h2><div class="pair">{shown}</div>'


def text_section(text: str) -> str:
    """A paragraph."""
    return f"<p>{html.escape(text)}</p>"


def settings_section(*settings: Mapping[str, object]) -> str:
    """Settings and versions by name, a table each."""
    tables = "".join(_settings(values) for values in settings)
    return f'<h2>Configuration and versions</h2><div class="pair">{tables}</div>'


def _groups_section(report: RunReport) -> str:
    measured_on = _measured_on(report)
    speaker_rows = report.groups["speaker"]
    speakers = bars_figure(
        [str(row["speaker"]) for row in speaker_rows],
        [float(row["wa"]) for row in speaker_rows],
        [int(row["clips"]) for row in speaker_rows],
        measured_on,
        "WA",
    )
    others = [
        table_of(rows, measured_on) for kind, rows in report.groups.items() if kind != "speaker"
    ]
    ece = f"expected calibration error {report.ece:.1%}; {measured_on}"
    parts = [
        "<h2>Speakers</h2>",
        f'<div class="pair">{inline_svg(speakers, "WA of every speaker")}',
        f"{table_of(speaker_rows, measured_on)}</div>",
        "<h2>Groups of clips</h2>" if others else "",
        f'<div class="pair">{"".join(others)}</div>' if others else "",
        "<h2>Calibration</h2>",
        inline_svg(reliability_figure(*report.calibration, ece), "Accuracy at every confidence"),
    ]
    return "\n".join(part for part in parts if part)


def _clips(heading: str, about: str, clips: Sequence[ClipView]) -> str:
    if not clips:
        return ""
    shown = "".join(f"<figure>{_clip(clip, heading)}</figure>" for clip in clips)
    return (
        f'<h2>{heading}</h2><p class="quiet">{about} Sound without its silent ends.</p>'
        f'<div class="clips">{shown}</div>'
    )


def _clip(clip: ClipView, heading: str) -> str:
    verdict = "right" if clip.truth == clip.predicted else "wrong"
    picture = inline_svg(
        clip_figure(clip.waveform, clip.sample_rate, clip.spectrogram),
        f"{heading}: waveform and spectrogram of {clip.name}",
    )
    player = ""
    if clip.mp3 is not None:
        sound = base64.b64encode(clip.mp3).decode()
        player = f'<audio controls preload="none" src="data:audio/mpeg;base64,{sound}"></audio>'
    return (
        f"<figcaption><strong>{html.escape(clip.truth)}</strong>: named "
        f"{html.escape(clip.predicted)} ({clip.probability:.0%}), {verdict}"
        f'<br><span class="quiet">{html.escape(clip.name)}</span></figcaption>{picture}{player}'
    )


def _measured_on(report: RunReport, part: str = "") -> str:
    return f"{part or report.part}, {report.protocol}, {CORPORA[report.corpus]}"


def table_of(rows: Sequence[Row], caption: str) -> str:
    """Show rows of equal keys; shares become percentages."""
    head = "".join(f'<th scope="col">{_HEADINGS.get(name, name)}</th>' for name in rows[0])
    body = []
    for row in rows:
        name, *values = row.values()
        cells = [f"{value:.1%}" if isinstance(value, float) else str(value) for value in values]
        body.append(
            f'<tr><th scope="row">{html.escape(str(name))}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f'<div><table class="numbers"><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _settings(values: Mapping[str, object]) -> str:
    rows = [
        f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>'
        for key, value in values.items()
    ]
    return f"<div><table>{''.join(rows)}</table></div>"
