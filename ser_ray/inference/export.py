"""Exports a checkpoint as one file that runs without this program: ONNX, or torch's own format.

The input is a mono waveform [num_samples] float32 at the model's sample rate, of any length. The
output is the probability of every label [labels] float32. All probabilities are NaN if `Predictor`
would not score the waveform as one clip: if it is silent, too short, or has more sound than the
longest training clip.

The graph contains all steps: trimming, features or encoder, normalisation, windows, network and
temperature. So this module implements the features a second time, in torch. In the graph, only the
shape of the input may depend on the recording, so silent ends are masked instead of cut off. A file
is written only if its probabilities agree with those of `Predictor`.
"""

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from pyarrow import fs
from scipy.fft import dct
from torch import Tensor, nn

from ser_ray.cluster.shared_files import require_kept
from ser_ray.errors import SerRayError
from ser_ray.features.loudness import (
    ENERGY_SECONDS,
    HEARD_RATIO,
    LOUD_STRETCHES,
    NOISE_MARGIN_DB,
    NOISE_SPREADS,
    SILENCE_POWER,
    STEADY_RATIO,
)
from ser_ray.features.mel import POWER_FLOOR
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.predictor import Predictor
from ser_ray.storage.paths import filesystem_of
from ser_ray.training.calibration import MIN_PROBABILITY

if TYPE_CHECKING:
    from ser_ray.features.encoder import Encoder

TOLERANCE = 1e-3
"""Largest allowed difference from a probability of `Predictor`, which adds in another order."""
CHECKED_SECONDS = (0.5, 1.0, 2.37, 4.0, 6.0)
"""Lengths of the waveforms on which a file is compared with `Predictor`."""
OPSET = 20
"""Version of ONNX's operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportResult:
    """An exported model."""

    output: str
    largest_difference: float
    """Largest difference from a probability of `Predictor`, on waveforms of `CHECKED_SECONDS`."""

    def __repr__(self) -> str:
        return (
            f"{self.output}: probabilities differ from those of the checkpoint by at most "
            f"{self.largest_difference:.1e} (tolerance {TOLERANCE:g})"
        )


class WaveformModel(nn.Module):
    """The complete computation for a clip in one graph: `FeatureExtractor`, windows and network."""

    mean: Tensor
    std: Tensor
    cosines: Tensor
    sines: Tensor
    mel_bands: Tensor
    dct: Tensor

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        card = predictor.card
        config = self.features = card.features
        self.kind, self.crop_frames = card.config.feature, card.config.window_frames
        self.network, self.temperature = predictor.network, card.temperature
        self.encoder = predictor.encoder
        self.max_windows = 1 if self.encoder else -(-config.num_frames // self.crop_frames)
        length = config.window_length
        angles = np.outer(np.arange(length), np.arange(length // 2 + 1)) * (2 * np.pi / length)
        window = np.hanning(length + 1)[:-1, None]
        extract = FeatureExtractor(config)
        constants = {
            "cosines": window * np.cos(angles),  # [window_length, bins]
            "sines": window * np.sin(angles),
            "mel_bands": extract.mel_bands.toarray().astype(np.float64),  # [mels, bins]
            "dct": dct(np.eye(config.num_mels), axis=0, norm="ortho")[: config.num_mfcc],
            "mean": card.normalisation.mean.astype(np.float32)[:, None],
            "std": card.normalisation.std.astype(np.float32)[:, None],
        }
        for name, values in constants.items():
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, waveform: Tensor) -> Tensor:
        """Compute the probabilities [labels] of a waveform [num_samples]."""
        samples = waveform.double()
        begin, length, is_scored = self._sound(samples)
        index = torch.arange(waveform.shape[0])
        is_sound = (index >= begin) & (index < begin + length)
        samples = samples - (samples * is_sound).sum() / length
        if self.encoder is None:
            num_frames = length // self.features.hop_length + 1
            features = self._features(samples, begin, length)
        else:
            num_frames = torch.ones_like(length)
            features = self._layers(self.encoder, samples, begin, length)
        # Features are rounded twice, because both shards and training tensors are float16.
        stored = features.half().float()
        normalised = ((stored - self.mean) / self.std).half().float()
        crops, weights = self._windows(normalised, num_frames)
        probabilities = self.network(crops).softmax(dim=1)  # [max_windows, labels]
        mean = (probabilities * weights[:, None]).sum(dim=0) / weights.sum()
        calibrated = (mean.clamp(min=MIN_PROBABILITY).log() / self.temperature).softmax(dim=0)
        return torch.where(is_scored, calibrated, torch.full_like(mean, torch.nan))

    def _sound(self, waveform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first sample and the length of the sound, and whether it can be scored."""
        config, num_samples = self.features, waveform.shape[0]
        stretch = round(ENERGY_SECONDS * config.sample_rate)
        index = torch.arange(num_samples // stretch + 1)
        samples = index[:, None] * stretch + torch.arange(stretch)
        is_inside = (samples < num_samples).double()
        values = waveform[samples.clamp(max=num_samples - 1)]
        count = is_inside.sum(dim=1, keepdim=True).clamp(min=1)
        line = (torch.arange(stretch) - (count - 1) / 2) * is_inside
        centred = (values - (values * is_inside).sum(dim=1, keepdim=True) / count) * is_inside
        sloping = (centred * line).sum(dim=1).square() / line.square().sum(dim=1).clamp(min=1)
        power = (centred.square().sum(dim=1) - sloping).clamp(min=0) / stretch
        loud = power > self._threshold(power)
        first = torch.where(loud, index, num_samples).min() * stretch
        stop = ((torch.where(loud, index, -1).max() + 1) * stretch).clamp(max=num_samples)
        margin = round(config.trim_margin * config.sample_rate)
        begin = (first - margin).clamp(min=0)
        length = (stop + margin).clamp(max=num_samples) - begin
        num_loud = ((index[-1] + 1) // 20).clamp(1, LOUD_STRETCHES)
        is_scored = (
            ((power >= SILENCE_POWER).sum() >= num_loud)
            & (stop - first >= config.min_seconds * config.sample_rate)
            & (length <= config.max_seconds * config.sample_rate)
        )
        return begin, length, is_scored

    def _threshold(self, power: Tensor) -> Tensor:
        """Compute `Loudness.threshold` from the power of every stretch [stretches]."""
        loudest = power.max()
        threshold = loudest * 10 ** (-self.features.trim_db / 10)
        ranked = power[:-1].sort().values
        num_silent = (ranked <= POWER_FLOOR).sum()
        last = (ranked.shape[0] - 1 - num_silent).clamp(min=0)
        index = num_silent + torch.stack((last // 10, last * 3 // 10))
        quiet, less_quiet = ranked[index.clamp(max=ranked.shape[0] - 1)]
        is_noise = (less_quiet < quiet * STEADY_RATIO) & (loudest > quiet * HEARD_RATIO)
        is_noise = is_noise & (num_silent < ranked.shape[0])
        spread_db = 10 * torch.log10(less_quiet / quiet.clamp(min=POWER_FLOOR))
        margin_db = (NOISE_SPREADS * spread_db).clamp(*NOISE_MARGIN_DB)
        raised = torch.maximum(threshold, quiet * 10 ** (margin_db / 10))
        return torch.where(is_noise, raised, threshold)

    def _features(self, waveform: Tensor, begin: Tensor, length: Tensor) -> Tensor:
        """Compute features [bins, num_frames_max]; frames after the sound are invalid."""
        config = self.features
        starts = torch.arange(config.num_frames)[:, None] * config.hop_length
        offsets = starts + torch.arange(config.window_length) - config.window_length // 2
        mirrored = torch.where(offsets < 0, -offsets, offsets)
        mirrored = torch.where(mirrored >= length, 2 * (length - 1) - mirrored, mirrored)
        index = (begin + mirrored).clamp(0, waveform.shape[0] - 1)
        frames = waveform[index]  # [num_frames_max, window_length]
        power = (frames @ self.cosines).square() + (frames @ self.sines).square()
        if self.kind == "spectrogram":
            return _decibels(power).T
        mel = _decibels(power @ self.mel_bands.T).T
        return mel if self.kind == "mel" else self.dct @ mel

    def _layers(
        self, encoder: "Encoder", waveform: Tensor, begin: Tensor, length: Tensor
    ) -> Tensor:
        """Compute the layers [layers * dim, 1] of an encoder for a clip padded to `max_seconds`."""
        index = torch.arange(round(self.features.max_seconds * self.features.sample_rate))
        sound = waveform[(begin + index).clamp(max=waveform.shape[0] - 1)] * (index < length)
        return encoder(sound.float()[None], length[None]).reshape(-1, 1)

    def _windows(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """Cut windows at the positions of `ser_ray.training.scoring.window_starts`.

        Returns:
            Crops [max_windows, 1, bins, crop_frames], and weights [max_windows]: 1 for used
            windows, 0 for the others.
        """
        surplus_frames = num_frames - self.crop_frames
        num_windows = (num_frames + self.crop_frames - 1) // self.crop_frames
        window = torch.arange(self.max_windows)
        num_steps = (num_windows - 1).clamp(min=1).double()
        spread = torch.round(window * surplus_frames / num_steps).long()
        centred = torch.div(surplus_frames, 2, rounding_mode="floor")
        starts = torch.where(surplus_frames > 0, spread, centred)
        frames = starts[:, None] + torch.arange(self.crop_frames)
        is_inside = (frames >= 0) & (frames < num_frames)
        crops = features[:, frames.clamp(0, features.shape[1] - 1)] * is_inside
        return crops.transpose(0, 1).unsqueeze(1), (window < num_windows).float()


def export(checkpoint: Path, output: str, kind: Literal["onnx", "torch"]) -> ExportResult:
    """Export a checkpoint to a path or URI, if the file has the probabilities of `Predictor`.

    Raises:
        CheckpointError, EncoderError: as in `Predictor`.
        ConfigError: no file system can open the output.
        ResourcesError: Ray deletes the folder of the output after the job.
        SerRayError: a package is missing, the probabilities differ, or the file cannot be written.
    """
    require_kept(output)
    filesystem, path = filesystem_of(output)
    predictor = Predictor(checkpoint)
    num_samples = torch.export.Dim("num_samples", min=predictor.card.features.window_length)
    example = torch.from_numpy(_synthetic_voice(1.0, predictor.card.features.sample_rate))
    with torch.no_grad():
        program = torch.export.export(
            WaveformModel(predictor), (example,), dynamic_shapes=({0: num_samples},)
        )
    about = {
        "labels": list(predictor.labels),
        "sample_rate": predictor.card.features.sample_rate,
        "protocol": predictor.card.split["label"],
        "trained_on": predictor.card.trained_on,
    }
    name, write = ("model.onnx", _write_onnx) if kind == "onnx" else ("model.pt2", _write_torch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, name)
        largest = _largest_difference(write(program, file, about), predictor, output)
        try:
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            fs.copy_files(str(file), path, destination_filesystem=filesystem)
        except OSError as error:
            raise SerRayError(
                f"{output}: cannot be written ({error}); choose another --output"
            ) from error
    return ExportResult(output=output, largest_difference=largest)


RunModel = Callable[[np.ndarray], np.ndarray]
"""Waveform [num_samples] float32 -> probabilities [labels]."""


def _write_onnx(program: torch.export.ExportedProgram, file: Path, about: dict) -> RunModel:
    """Write an ONNX file, and return a function that runs it."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - without it, torch's exporter fails with a traceback
    except ImportError as error:
        raise SerRayError(
            f"ONNX export needs the package {error.name}; in the clone, run "
            "pip install -e '.[export]'"
        ) from error
    with warnings.catch_warnings():
        # The exporter of torch calls functions that torch itself has deprecated.
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        graph = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["waveform"],
            output_names=["probabilities"],
            verbose=False,
        )
    assert graph is not None
    graph.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    graph.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda waveform: session.run(None, {"waveform": waveform})[0]


def _write_torch(program: torch.export.ExportedProgram, file: Path, about: dict) -> RunModel:
    """Write an exported program of torch, and return a function that runs the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about tensors and buffers that share memory
        torch.export.save(program, file, extra_files={"about.json": json.dumps(about)})
        module = torch.export.load(file).module()
    return lambda waveform: module(torch.from_numpy(waveform)).numpy()


def _largest_difference(run_model: RunModel, predictor: Predictor, output: str) -> float:
    """Return the largest difference from a probability of `Predictor` on several waveforms.

    Raises:
        SerRayError: the difference is larger than `TOLERANCE`.
    """
    rate = predictor.card.features.sample_rate
    largest = 0.0
    for seconds in CHECKED_SECONDS:
        waveform = _synthetic_voice(seconds, rate)
        expected = predictor.predict_samples(waveform, rate, "checked")
        probabilities = run_model(waveform)
        if expected.probabilities is None or expected.timeline:
            if not np.isnan(probabilities).all():
                largest = np.inf
            continue
        differences = np.abs(probabilities - np.array(list(expected.probabilities.values())))
        largest = float(np.maximum(largest, differences.max()))
    if not largest <= TOLERANCE:  # true for NaN too
        raise SerRayError(
            f"{output}: not written, because its probabilities differ from those of the checkpoint "
            f"by {largest:.2g}, which is more than {TOLERANCE:g}; this is a fault of ser_ray: "
            "please report it with the model's card.json"
        )
    return largest


def _synthetic_voice(seconds: float, rate: int) -> np.ndarray:
    """Make a voice with weak noise, a constant offset and silent ends, float32 [num_samples]."""
    time = np.arange(round(seconds * rate)) / rate
    pitch = np.cumsum(140 + 30 * np.sin(2 * np.pi * 1.7 * time)) / rate
    voice = sum(np.sin(2 * np.pi * n * pitch) / n for n in range(1, 20))
    is_voiced = (time > 0.1 * seconds) & (time < 0.8 * seconds)
    loudness = 0.1 * is_voiced * (1.2 + np.sin(2 * np.pi * 3 * time))
    noise = np.random.default_rng(0).normal(0, 1e-5, len(time))
    return (loudness * voice + noise + 0.02).astype(np.float32)


def _decibels(power: Tensor) -> Tensor:
    return 10 * torch.log10(power.clamp(min=POWER_FLOOR))
