"""The prediction for a recording, and its forms: text, a row of a table, a cell of a notebook."""

import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ser_ray.storage.paths import printable

if TYPE_CHECKING:
    import pandas as pd

BAR_WIDTH = 40
"""Number of characters in a bar for 100 %."""
UNSURE = "unsure"
"""Status of a recording in which every emotion is less probable than the minimum confidence."""
UNREACHABLE = "unreachable"
"""Status of a file that the storage could not deliver; a later attempt may succeed."""
_TEXT_COLUMNS = ("path", "status", "reason", "warning", "emotion")


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowPrediction:
    """The prediction for a window of a long recording."""

    start: float
    """Seconds from the beginning of the recording."""
    end: float
    """Seconds from the beginning of the recording."""
    emotion: str | None
    """None if the model is unsure."""
    probabilities: dict[str, float]
    """Probability of every label; the sum is 1."""

    def __str__(self) -> str:
        times = f"{_clock(self.start)}–{_clock(self.end)}"
        return f"{times:>15}  {self.emotion or UNSURE} ({max(self.probabilities.values()):.0%})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """The prediction for a recording, or the reason why there is none.

    `print` shows one line; a notebook also shows the probabilities and the timeline.
    """

    path: str
    emotion: str | None = None
    probabilities: dict[str, float] | None = None
    """Probability of every label; the sum is 1. For a long recording, the mean of its windows. None
    if the recording cannot be scored."""
    duration: float | None = None
    """Seconds of the complete recording."""
    timeline: tuple[WindowPrediction, ...] = ()
    """The windows with sound, if the recording has more sound than the longest training clip."""
    status: str = "ok"
    """ok, or why there is no emotion: unsure (no probability reaches the minimum confidence),
    unreadable, unreachable, no_audio, too_short, too_long, silent or beyond_end (less than half
    of the segment is inside the recording)."""
    reason: str | None = None
    """The reason for the status."""
    warning: str | None = None
    """A reason to doubt the prediction, such as a loud background or lost sound."""

    def __str__(self) -> str:
        return f"{printable(self.path.rpartition('/')[2])}: {self._summary()}"

    def _summary(self) -> str:
        warning = f"; {self.warning}" if self.warning else ""
        if self.probabilities is None or self.emotion is None:
            return f"{self.status} ({self.reason}){warning}"
        length = f" over {_clock(self.duration or 0)}" if self.timeline else ""
        return f"{self.emotion} ({self.probabilities[self.emotion]:.0%}){length}{warning}"

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with the row of this recording, as `Predictions.to_pandas`."""
        return Predictions([self]).to_pandas()

    def _repr_html_(self) -> str:
        text = html.escape(str(Predictions([self])))
        # Without this style, JupyterLab shows the bars and columns in a proportional font.
        return f'<pre style="font-family: monospace">{text}</pre>'


class Predictions(tuple[Prediction, ...]):
    """The predictions for several recordings; a notebook shows them as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        """Return a line for each recording and window, and bars if there is only one recording."""
        names = shortest_names([prediction.path for prediction in self])
        lines = []
        for prediction in self:
            lines.append(f"{names[prediction.path]}: {prediction._summary()}")
            lines += [f"  {window}" for window in prediction.timeline]
        if len(self) == 1 and (probabilities := self[0].probabilities):
            longest = max(map(len, probabilities))
            for label, share in sorted(probabilities.items(), key=lambda item: -item[1]):
                lines.append(f"  {label:{longest}}  {share:6.1%}  {'█' * round(share * BAR_WIDTH)}")
        return "\n".join(lines)

    def to_pandas(self) -> "pd.DataFrame":
        """Return a table with a row for each recording, like the table of a batch pass.

        The columns are `path`, `status`, `reason`, `warning`, `emotion`, `duration` in seconds, the
        probability of every label as `p_<label>`, and `timeline`, a list of windows.
        """
        import pandas as pd

        return pd.DataFrame([prediction_row(prediction) for prediction in self])

    def _repr_html_(self) -> str:
        import pandas as pd

        windows = [f"{len(prediction.timeline)} windows" for prediction in self]
        table = self.to_pandas().assign(timeline=windows)
        # By default, pandas shows only 50 characters, which may be the same for all paths.
        with pd.option_context("display.max_colwidth", None):
            return table._repr_html_()


def shortest_names(paths: Iterable[str]) -> dict[str, str]:
    """Return {path: its file name, or the path itself if several files have this name}.

    Line ends and other characters that cannot be printed are escaped in the names.
    """
    names = {path: path.rpartition("/")[2] for path in paths}
    counts = Counter(names.values())
    return {path: printable(name if counts[name] == 1 else path) for path, name in names.items()}


def prediction_row(prediction: Prediction) -> dict[str, Any]:
    """Return the row of a prediction in a table with the columns of `table_schema`."""
    timeline = [
        {"start": window.start, "end": window.end, "emotion": window.emotion}
        | _label_columns(window.probabilities)
        for window in prediction.timeline
    ]
    return {
        **{name: getattr(prediction, name) for name in (*_TEXT_COLUMNS, "duration")},
        **_label_columns(prediction.probabilities or {}),
        "timeline": timeline,
    }


def _label_columns(probabilities: dict[str, float]) -> dict[str, Any]:
    return {f"p_{label}": probability for label, probability in probabilities.items()}


def table_schema(labels: Sequence[str]) -> pa.Schema:
    """Return the columns of a table of predictions, which has one row for each file.

    The probability of a label is in the column `p_<label>`.
    """
    probabilities = [(f"p_{label}", pa.float64()) for label in labels]
    window = [("start", pa.float64()), ("end", pa.float64()), ("emotion", pa.string())]
    texts = [(name, pa.string()) for name in _TEXT_COLUMNS]
    timeline = ("timeline", pa.list_(pa.struct([*window, *probabilities])))
    return pa.schema([*texts, ("duration", pa.float64()), *probabilities, timeline])


def _clock(seconds: float) -> str:
    minutes, tenths = divmod(round(seconds * 10), 600)
    return f"{minutes}:{tenths / 10:04.1f}"
