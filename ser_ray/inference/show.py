"""Predictions for a person at a terminal: lines, bars and timelines."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ser_ray.inference.predict import Prediction, Segment

BAR_WIDTH = 40
"""Characters of a bar for 100 %."""


def prediction_text(found: Sequence[Prediction]) -> str:
    """A line for each file, its timeline below; of a single file the probabilities as bars."""
    lines = []
    for item in found:
        lines.append(_line(item))
        lines += [_segment_line(segment) for segment in item.timeline]
    if len(found) == 1 and found[0].probabilities:
        lines += _bars(found[0].probabilities)
    return "\n".join(lines)


def _line(item: Prediction) -> str:
    name = Path(item.path).name
    if item.probabilities is None or item.emotion is None:
        return f"{name}: {item.status} ({item.reason})"
    whole = f" over {_clock(item.duration or 0)}" if item.timeline else ""
    return f"{name}: {item.emotion} ({item.probabilities[item.emotion]:.0%}){whole}"


def _segment_line(segment: Segment) -> str:
    share = segment.probabilities[segment.emotion]
    when = f"{_clock(segment.start)}–{_clock(segment.end)}"
    return f"  {when:>15}  {segment.emotion} ({share:.0%})"


def _bars(probabilities: Mapping[str, float]) -> list[str]:
    longest = max(len(label) for label in probabilities)
    ranked = sorted(probabilities.items(), key=lambda item: -item[1])
    return [f"  {label:{longest}}  {p:6.1%}  {'█' * round(p * BAR_WIDTH)}" for label, p in ranked]


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"
