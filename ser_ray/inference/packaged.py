"""The model in MLflow's package format, which runs without Ray and without this repository.

This module implements MLflow's `loader_module` protocol: `_load_pyfunc` opens the checkpoint's
directory. The input has a row for each recording, with a value in one of these columns:

path       path or URI of a recording that the model's machine can open
audio      the content of a file: base64, a data URI, or bytes
waveform   mono samples, floats in [-1, 1] or integers on the scale of int16; the column
           `sample_rate` is their rate in hertz, by default 16000

The output has a row for each recording with `emotion`, a probability for every label, `status`,
`reason` and `warning`. The input columns of the signature have the type Any: with the type double,
MLflow refuses integers, and with the type binary, it refuses rows that use different columns.
"""

import base64
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

WAVEFORM_RATE = 16_000.0
"""Sample rate of a waveform in hertz if the row gives no rate."""
ROW_FORMAT = (
    'send {"dataframe_records": [...]} with a row for each recording, as {"path": "clip.wav"}, '
    '{"audio": "BASE64"} or {"waveform": [0.1, ...], "sample_rate": 16000}'
)
"""Advice at the end of error messages about a row."""
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
            prediction = Prediction(path="", status=error.status, reason=error.reason)
        return {
            "emotion": prediction.emotion or "",
            **(prediction.probabilities or dict.fromkeys(self.predictor.labels)),
            "status": prediction.status,
            "reason": prediction.reason or "",
            "warning": prediction.warning or "",
        }

    def _predict(self, row: dict[Any, Any]) -> Prediction:
        kinds = [kind for kind in ("path", "audio", "waveform") if kind in row]
        if len(kinds) != 1:
            found = " and ".join(kinds) or "none of path, audio and waveform"
            raise ClipError("unreadable", f"the row has {found}; {ROW_FORMAT}")
        if kinds == ["path"]:
            if not isinstance(row["path"], str):
                raise ClipError("unreadable", f"path is not a string; {ROW_FORMAT}")
            return self.predictor.predict(row["path"])
        if kinds == ["audio"]:
            return self.predictor.predict_file(BytesIO(_file_bytes(row["audio"])), "audio")
        try:
            samples = np.asarray(row["waveform"])
        except ValueError:  # a list of lists with different lengths
            raise ClipError(
                "unreadable", f"the waveform is not a list of numbers; {ROW_FORMAT}"
            ) from None
        return self.predictor.predict_samples(
            samples, row.get("sample_rate", WAVEFORM_RATE), "waveform"
        )


def example_input() -> "pd.DataFrame":
    """Make a row that every machine can score: the samples of a tone."""
    import pandas as pd

    seconds = np.arange(int(EXAMPLE_SECONDS * WAVEFORM_RATE)) / WAVEFORM_RATE
    tone = np.round(0.2 * np.sin(2 * np.pi * 220 * seconds), 4)
    return pd.DataFrame({"waveform": [tone.tolist()], "sample_rate": [WAVEFORM_RATE]})


def _one_row_per_recording(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table with one row for each recording.

    From a request with the key `inputs`, MLflow makes one row for a list of paths, and one row for
    each sample of a single waveform.
    """
    waveform = rows.get("waveform")
    if waveform is not None and waveform.dtype.kind in "iuf" and waveform.notna().all():
        return rows.head(1).assign(waveform=[waveform.tolist()])
    list_columns = [
        name
        for name in ("path", "audio")
        if name in rows and rows[name].map(lambda cell: isinstance(cell, list)).any()
    ]
    return rows.explode(list_columns, ignore_index=True) if len(list_columns) == 1 else rows


def _file_bytes(audio: Any) -> bytes:
    """Return a file's content, which is given as bytes, base64 or a data URI.

    Raises:
        ClipError: the value has another form.
    """
    if isinstance(audio, bytes):
        return audio
    text = str(audio).partition(";base64,")[2] if str(audio).startswith("data:") else str(audio)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        reason = f"audio is neither base64 nor a data URI with base64; {ROW_FORMAT}"
        raise ClipError("unreadable", reason) from None


def _is_given(value: Any) -> bool:
    return not (value is None or (isinstance(value, float) and np.isnan(value)))


def _load_pyfunc(data_path: str) -> PackagedModel:
    return PackagedModel(Path(data_path))
