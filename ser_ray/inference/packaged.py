"""The model in MLflow's package format, which runs without Ray and without this repository.

This module implements MLflow's `loader_module` protocol: `_load_pyfunc` opens the checkpoint's
directory. The input has a row for each recording, with a value in one of these columns:

path       path or URI of a recording that the model's machine can open
audio      the content of a file: base64, a data URI with base64, or bytes
waveform   mono samples, floats in [-1, 1] or integers on the scale of int16; the column
           `sample_rate` is their rate in hertz, by default 16000

The output has a row for each recording with `emotion`, a probability for every label, `status`,
`reason` and `warning`. In the signature, the input columns have the type Any, because MLflow
refuses integers for the type double, and rows that use different columns for the type binary.
MLflow reads no CSV for this signature, so requests are JSON or Parquet.
"""

import base64
import os
from io import BytesIO
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from ser_ray.features.errors import ClipError
from ser_ray.inference.prediction import Prediction
from ser_ray.inference.predictor import Predictor
from ser_ray.training.checkpoint import read_card

if TYPE_CHECKING:
    import pandas as pd

_REQUIREMENTS = ("torch", "numpy", "scipy", "pyarrow", "fsspec", "soundfile", "av", "soxr",
                "safetensors", "pandas")  # fmt: skip
"""The packages that every model needs."""

RECORDING_COLUMNS = ("path", "audio", "waveform")
"""The input columns that can hold a recording. A row has a value in exactly one of them."""
WAVEFORM_RATE = 16_000.0
"""Sample rate of a waveform in hertz if the row gives no rate."""
ROW_FORMAT = (
    'send {"dataframe_records": [...]} with a row for each recording, as {"path": "clip.wav"}, '
    '{"audio": "BASE64"} or {"waveform": [0.1, ...], "sample_rate": 16000}'
)
"""Advice at the end of error messages about a row."""
TEXT_COLUMNS = ("emotion", "status", "reason", "warning")
"""The output columns besides the probabilities."""
EXAMPLE_SECONDS = 0.25
"""Length of the waveform in the example that MLflow stores with the model."""


def requirements(checkpoint: Path) -> tuple[str, ...]:
    """Return the packages that a checkpoint needs for loading and predicting."""
    has_encoder = read_card(checkpoint).encoder is not None
    return (*_REQUIREMENTS, "torchaudio") if has_encoder else _REQUIREMENTS


class PackagedModel:
    """A checkpoint with the method `predict` that MLflow calls."""

    def __init__(self, checkpoint: Path) -> None:
        self.predictor = Predictor(checkpoint)

    def predict(
        self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None
    ) -> "pd.DataFrame":
        """Predict the emotion of the recording in each row.

        The probabilities of a recording that cannot be scored are None. MLflow's server writes None
        as null, while NaN would not be valid JSON. If the input has none of the known columns,
        MLflow passes a table without rows, and the result is one row with the reason.
        """
        import pandas as pd

        records = _one_row_per_recording(model_input).to_dict(orient="records") or [{}]
        rows = [self._row({name: v for name, v in row.items() if _is_given(v)}) for row in records]
        all_scored = all(row["status"] == "ok" for row in rows)
        return pd.DataFrame(rows, dtype=None if all_scored else object)

    def _row(self, row: dict[Any, Any]) -> dict[str, Any]:
        try:
            prediction = self._predict(row)
        except ClipError as error:
            reason = f"{error.reason}; {ROW_FORMAT}"
            prediction = Prediction(path="", status=error.status, reason=reason)
        return {
            "emotion": prediction.emotion or "",
            **{
                probability_column(label): (prediction.probabilities or {}).get(label)
                for label in self.predictor.labels
            },
            "status": prediction.status,
            "reason": prediction.reason or "",
            "warning": prediction.warning or "",
        }

    def _predict(self, row: dict[Any, Any]) -> Prediction:
        """Predict the emotion in one recording.

        Raises:
            ClipError: the row does not have one recording in an accepted form.
        """
        kinds = [kind for kind in RECORDING_COLUMNS if kind in row]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "a value in none of path, audio and waveform"
            raise ClipError("unreadable", f"the row has {found}")
        if kinds == ["path"]:
            if not isinstance(row["path"], str | os.PathLike):
                raise ClipError("unreadable", "path is not a string")
            return self.predictor.predict(row["path"])
        if kinds == ["audio"]:
            return self.predictor.predict_file(BytesIO(_file_bytes(row["audio"])), "audio")
        try:
            samples = np.asarray(row["waveform"])
        except ValueError:  # a list of lists with different lengths
            raise ClipError("unreadable", "the waveform is not a list of numbers") from None
        prediction = self.predictor.predict_samples(
            samples, row.get("sample_rate", WAVEFORM_RATE), "waveform"
        )
        if prediction.status == "unreadable":
            raise ClipError("unreadable", str(prediction.reason))
        return prediction


def probability_column(label: str) -> str:
    """Return the output column with the probability of a label: the label, unless it is taken."""
    return f"p_{label}" if label in TEXT_COLUMNS else label


def example_input() -> "pd.DataFrame":
    """Make a row that every machine can score: the samples of a tone."""
    import pandas as pd

    seconds = np.arange(int(EXAMPLE_SECONDS * WAVEFORM_RATE)) / WAVEFORM_RATE
    tone = np.round(0.2 * np.sin(2 * np.pi * 220 * seconds), 4)
    return pd.DataFrame({"waveform": [tone.tolist()], "sample_rate": [WAVEFORM_RATE]})


def _one_row_per_recording(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with one row for each recording.

    If a request has the key `inputs`, MLflow puts a list of paths into one row, but makes a row of
    each number in a list (a sample of a waveform, or a byte of a file). Here each path becomes a
    row, and the numbers become one row. A list of bytes is refused later, with one answer for all.
    """
    kinds = [name for name in RECORDING_COLUMNS if name in rows and rows[name].notna().any()]
    if len(kinds) != 1:
        return rows
    cells = rows[kinds[0]]
    if kinds != ["path"] and _are_numbers(cells):
        return rows.head(1).assign(**{kinds[0]: [cells.tolist()]})
    if len(rows) == 1 and kinds != ["waveform"] and _is_list_of_files(cells.iloc[0]):
        return rows.explode(kinds, ignore_index=True)
    return rows


def _are_numbers(cells: "pd.Series") -> bool:
    """Return whether every cell is a number or a missing value."""
    return cells.dtype.kind in "iufb" or all(
        cell is None or isinstance(cell, Real) for cell in cells
    )


def _is_list_of_files(cell: Any) -> bool:
    """Return whether a cell is a list of paths or of the contents of files."""
    return isinstance(cell, list) and all(isinstance(item, str | bytes) for item in cell)


def _file_bytes(audio: Any) -> bytes:
    """Return a file's content, which is given as bytes, base64 or a data URI.

    The base64 may use the alphabet for URLs, and may lack padding.

    Raises:
        ClipError: the value has another form.
    """
    if isinstance(audio, bytes | bytearray | memoryview):
        return bytes(audio)
    try:
        header, _, data = str(audio).partition(",")
        is_uri = header[:5].lower() == "data:"
        if is_uri and not header.lower().endswith(";base64"):
            raise ValueError("a data URI without base64")
        text = "".join((unquote(data) if is_uri else str(audio)).split())
        text = text.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        reason = "audio is neither base64 nor a data URI with base64"
        raise ClipError("unreadable", reason) from None


def _is_given(value: Any) -> bool:
    """Return whether a cell has a value. An empty text is a missing value."""
    import pandas as pd

    return not (pd.api.types.is_scalar(value) and (pd.isna(value) or value == ""))


def _load_pyfunc(data_path: str) -> PackagedModel:
    return PackagedModel(Path(data_path))
