"""Reads the clips that a page shows from the corpus, if the corpus is still there."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ser_ray.evaluation.evaluation import Evaluation
from ser_ray.features.decode import MAX_RECORDING_SECONDS, decode
from ser_ray.features.errors import ClipError
from ser_ray.features.samples import cut
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.plots.clip import clip_figure


def read_clips(evaluation: Evaluation, rows: Sequence[int], *, audio: bool) -> list[dict[str, Any]]:
    """Read clips of an evaluation from the corpus. Clips that cannot be read are left out.

    Args:
        evaluation: the predictions of the clips.
        rows: row numbers in `evaluation.predictions`.
        audio: whether the page gets a player for each clip.

    Returns:
        For each clip its file `name`, its true label (`truth`), the `predicted` label and its
        `probability`, a `figure` of the clip without the silence at both ends, and its sound as
        `mp3` (None without players).
    """
    extract = FeatureExtractor(evaluation.card.features)
    rate = evaluation.card.features.sample_rate
    views = []
    for clip in evaluation.predictions.take(rows).to_pylist():
        try:
            sound = decode(clip["path"], max_seconds=MAX_RECORDING_SECONDS)
            (samples, sample_rate, _), _ = cut(sound, clip["start"], clip["end"])
            waveform = extract.windows(samples, sample_rate)[0]
        except ClipError:
            continue
        views.append(
            {
                "name": Path(clip["path"]).name,
                "truth": clip["emotion"],
                "predicted": clip["predicted"],
                "probability": clip[f"p_{clip['predicted']}"],
                "figure": clip_figure(waveform, rate, extract.features(waveform)["spectrogram"]),
                "mp3": _mp3(waveform, rate) if audio else None,
            }
        )
    return views


def _mp3(waveform: np.ndarray, sample_rate: int) -> bytes:
    """Compress a waveform [num_samples] to MP3, which any browser plays: about 4 kB per second."""
    sound = BytesIO()
    soundfile.write(sound, waveform, sample_rate, format="MP3")
    return sound.getvalue()
