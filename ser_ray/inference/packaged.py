"""The model as MLflow packages it: it works alone, without Ray and without this repository.

MLflow's `loader_module` protocol: the checkpoint's directory is the data, `_load_pyfunc` opens it.
Input: one column of paths, or of the bytes of audio files. Output: a row for each with `emotion`, a
probability for every label, `status` and `reason`.
"""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ser_ray.inference.predict import Predictor

if TYPE_CHECKING:
    import pandas as pd

REQUIREMENTS = (
    "torch", "torchvision", "torchaudio", "numpy", "pyarrow", "fsspec", "soundfile", "av", "soxr",
    "safetensors",
)  # fmt: skip
"""What loading and predicting import."""


class PackagedModel:
    """A checkpoint behind MLflow's `predict`."""

    def __init__(self, checkpoint: Path) -> None:
        self.predictor = Predictor(checkpoint)

    def predict(
        self, model_input: "pd.DataFrame", params: dict[str, Any] | None = None
    ) -> "pd.DataFrame":
        """Name the emotion of each file in the first column."""
        import pandas as pd

        return pd.DataFrame([self._row(item) for item in model_input.iloc[:, 0]])

    def _row(self, item: str | bytes) -> dict[str, Any]:
        if isinstance(item, bytes):
            found = self.predictor.predict_stream(BytesIO(item), "bytes")
        else:
            found = self.predictor.predict(item)
        empty = dict.fromkeys(self.predictor.card.labels, float("nan"))
        return {
            "emotion": found.emotion or "",
            **(found.probabilities or empty),
            "status": found.status,
            "reason": found.reason or "",
        }


def _load_pyfunc(data_path: str) -> PackagedModel:
    return PackagedModel(Path(data_path))
