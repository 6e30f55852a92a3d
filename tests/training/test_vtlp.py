"""The frequency to which vocal-tract-length perturbation moves a tone."""

import numpy as np
import pytest
import torch

from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.training import augment as module
from ser_ray.training.augment import Augment
from ser_ray.training.config import AugmentConfig, TrainConfig
from ser_ray.training.data import Clips, Normalisation
from tests.conftest import PLAIN

FEATURES = FeatureConfig()
NYQUIST, BOUNDARY = 8000.0, 4800.0


def landing(hertz: float, factor: float) -> float:
    """Equation 1 of Jaitly and Hinton (2013), at 16 kHz with F_hi = 4.8 kHz."""
    knee = BOUNDARY * min(factor, 1) / factor
    if hertz <= knee:
        return hertz * factor
    slope = (NYQUIST - BOUNDARY * min(factor, 1)) / (NYQUIST - knee)
    return NYQUIST - slope * (NYQUIST - hertz)


def tone(hertz: float, kind: Kind) -> np.ndarray:
    """Features of one second of a sine, [bins, frames]."""
    time = np.arange(16_000) / 16_000
    wave = (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)
    return FeatureExtractor(FEATURES).features(wave)[kind]


def height(features: np.ndarray) -> float:
    """Fractional bin of the tone in [bins, frames] dB: the centre of the power around the peak."""
    decibels = features[:, 5:35].mean(axis=1)
    peak = int(decibels.argmax())
    bins = np.arange(max(peak - 2, 0), min(peak + 3, len(decibels)))
    power = 10 ** (decibels[bins] / 10)
    return float((bins * power).sum() / power.sum())


@pytest.mark.parametrize("kind", ["mel", "spectrogram"])
@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("hertz", [500.0, 1000.0, 2500.0, 4000.0, 6500.0])
def test_a_tone_moves_to_the_frequency_of_the_papers_equation(kind, factor, hertz, monkeypatch):
    monkeypatch.setattr(module, "_around_one", lambda spread, rows: torch.full((1,), 1 + spread))
    plain = {name: getattr(PLAIN, name) for name in PLAIN.__dataclass_fields__}
    config = TrainConfig(
        feature=kind,
        crop_frames=40,
        augment=AugmentConfig(**(plain | {"random_crop": False, "vtlp": 0.1})),
    )
    num_bins = FEATURES.num_bins(kind)
    augment = Augment(
        config,
        FEATURES,
        2,
        Normalisation(np.zeros(num_bins), np.ones(num_bins)),
        torch.device("cpu"),
    )
    augment.vtlp = factor - 1
    clip = torch.from_numpy(tone(hertz, kind).T[None, :40]).half()
    clips = Clips(clip, torch.tensor([40]), torch.tensor([0]))
    warped = augment(clips, torch.tensor([0]))[0][0, 0].numpy()
    expected = height(tone(landing(hertz, factor), kind))
    assert height(warped) == pytest.approx(expected, abs=0.5)
    assert abs(height(warped) - height(tone(hertz, kind))) > 0.6
