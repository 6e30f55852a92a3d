"""The model as MLflow packages it: it works alone, without Ray and without this repository.

This module implements MLflow's `loader_module` protocol: the checkpoint's directory is the data,
and `_load_pyfunc` opens it. The input has a row for each recording, with one of these columns:

path       string: path or URI of a recording that the model's machine can open
audio      binary: the bytes of a recording's file, base64 in JSON
waveform   array of double: mono samples in [-1, 1]; the column `sample_rate` (double) holds their
           rate in hertz, 16000 if it is left out

The output has a row for each recording with `emotion`, a probability for every label, `status` and
`reason`.
"""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ser_ray.features.decode import SAMPLE_RATES, full_scale
from ser_ray.features.errors import ClipError
from ser_ray.inference.predictor import Prediction, Predictor

if TYPE_CHECKING:
    import pandas as pd

REQUIREMENTS = ("torch", "numpy", "scipy", "pyarrow", "fsspec", "soundfile", "av", "soxr",
                "safetensors", "pandas")  # fmt: skip
"""Packages that loading the model and predicting import."""

WAVEFORM_RATE = 16_000.0
EXAMPLE_SECONDS = 0.25


class PackagedModel:
    """A checkpoint behind MLflow's `predict`."""

    def __init__(self, checkpoint: Path) -> None:
        self.predictor = Predictor(checkpoint)

    def predict(
        self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None
    ) -> "pd.DataFrame":
        """Name the emotion of the recording in each row.

        The probabilities of a recording that cannot be scored are None: MLflow's server would
        write NaN, which is not JSON.
        """
        import pandas as pd

        rows = [self._row(row) for row in model_input.to_dict(orient="records")]
        is_scored = all(row["status"] == "ok" for row in rows)
        return pd.DataFrame(rows, dtype=None if is_scored else object)

    def _row(self, row: dict[Any, Any]) -> dict[str, Any]:
        prediction = self._predict({name: v for name, v in row.items() if _is_given(v)})
        return {
            "emotion": prediction.emotion or "",
            **(prediction.probabilities or dict.fromkeys(self.predictor.labels)),
            "status": prediction.status,
            "reason": prediction.reason or "",
        }

    def _predict(self, row: dict[Any, Any]) -> Prediction:
        if "path" in row:
            return self.predictor.predict(row["path"])
        if "audio" in row:
            return self.predictor.predict_stream(BytesIO(row["audio"]), "audio")
        if "waveform" in row:
            samples = np.asarray(row["waveform"], np.float32)
            rate = round(row.get("sample_rate", WAVEFORM_RATE))
            if samples.ndim != 1 or not len(samples) or rate not in SAMPLE_RATES:
                rates = f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} Hz"
                reason = f"the waveform is not a row of numbers, or its rate is not {rates}"
                return Prediction(path="waveform", status="unreadable", reason=reason)
            try:
                samples = full_scale(samples)
            except ClipError as error:
                return Prediction(path="waveform", status=error.status, reason=error.reason)
            return self.predictor.predict_samples(samples, rate, "waveform")
        reason = "the row has none of path, audio and waveform"
        return Prediction(path="", status="unreadable", reason=reason)


def example_input() -> "pd.DataFrame":
    """Make a row that any machine can score: a tone as samples."""
    import pandas as pd

    seconds = np.arange(int(EXAMPLE_SECONDS * WAVEFORM_RATE)) / WAVEFORM_RATE
    tone = np.round(0.2 * np.sin(2 * np.pi * 220 * seconds), 4)
    return pd.DataFrame({"waveform": [tone.tolist()], "sample_rate": [WAVEFORM_RATE]})


def _is_given(value: Any) -> bool:
    return not (value is None or (isinstance(value, float) and np.isnan(value)))


def _load_pyfunc(data_path: str) -> PackagedModel:
    return PackagedModel(Path(data_path))
