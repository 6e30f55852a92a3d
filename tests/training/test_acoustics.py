"""Noise, echo and narrow channels in the features, against features of sound that has them."""

import math

import numpy as np
import pytest
import scipy.signal
import torch

from ser_ray.features.config import KINDS, FeatureConfig, Kind
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.training.acoustics import Acoustics, Effects
from ser_ray.training.augment import Augment
from ser_ray.training.data import Clips, Normalisation, frame_sums
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from tests.conftest import PLAIN

CPU = torch.device("cpu")
FEATURES = FeatureConfig()
EXTRACTOR = FeatureExtractor(FEATURES)
RATE = FEATURES.sample_rate
NONE = {
    "noise": 0.0, "slope": 0.0, "echo": 0.0, "echo_seconds": 0.5, "low_edge": 0.0,
    "high_edge": math.inf, "floor": 0.0,
}  # fmt: skip


def voice(seconds: float = 3.0) -> np.ndarray:
    """Syllables of 39 harmonics at a moving pitch, with quiet in between, and a soft breath."""
    rng = np.random.default_rng(1)
    time = np.arange(round(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(150 + 40 * np.sin(5 * time)) / RATE
    syllables = np.maximum(np.sin(2 * np.pi * 2.5 * time), 0) ** 2
    harmonics = sum(np.sin(k * phase + k * k) / k for k in range(1, 40))
    breath = rng.normal(0, 2e-4, len(time))
    return (0.05 * harmonics * syllables + breath).astype(np.float32)


def coloured(num_samples: int, slope: float) -> np.ndarray:
    """Noise of mean square 1 whose power falls with frequency to the power `slope`."""
    spectrum = np.fft.rfft(np.random.default_rng(2).normal(size=num_samples))
    hertz = np.fft.rfftfreq(num_samples, 1 / RATE)
    noise = np.fft.irfft(spectrum * np.maximum(hertz, 50) ** (-slope / 2), num_samples)
    return noise / noise.std()


def echoed(wave: np.ndarray, ratio: float, seconds: float) -> np.ndarray:
    """A wave with an exponentially decaying echo of this energy ratio and reverberation time."""
    time = np.arange(round(1.2 * seconds * RATE)) / RATE
    response = np.random.default_rng(3).normal(size=len(time)) * 10 ** (-3 * time / seconds)
    response *= math.sqrt(ratio) / np.linalg.norm(response)
    response[0] += 1
    return scipy.signal.fftconvolve(wave, response)[: len(wave)]


def telephone(wave: np.ndarray) -> np.ndarray:
    """A wave through a telephone's band, with noise of -90 dB of full scale behind it."""
    band = scipy.signal.butter(12, [300, 3400], "bandpass", fs=RATE, output="sos")
    return scipy.signal.sosfilt(band, wave) + 10**-4.5 * coloured(len(wave), 0)


SOUNDS = {
    "none": (lambda wave: wave, {}),
    "white": (lambda wave: wave + 0.001 * coloured(len(wave), 0), {"noise": 1e-6}),
    "pink": (lambda wave: wave + 0.01 * coloured(len(wave), 1), {"noise": 1e-4, "slope": 1.0}),
    "echo": (lambda wave: echoed(wave, 0.5, 0.4), {"echo": 0.5, "echo_seconds": 0.4}),
    "telephone": (telephone, {"low_edge": 300.0, "high_edge": 3400.0, "floor": 1e-9}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOUNDS)
def test_the_features_are_distributed_as_those_of_sound_under_the_condition(name, kind: Kind):
    torch.manual_seed(0)
    change, conditions = SOUNDS[name]
    wave = voice()
    clean = EXTRACTOR.features(wave)[kind]
    real = EXTRACTOR.features(change(wave).astype(np.float32))[kind]
    normalisation = Normalisation(clean.mean(axis=1), clean.std(axis=1))
    acoustics = Acoustics(PLAIN, kind, FEATURES, normalisation, CPU)
    num_frames = clean.shape[1]
    normalised = normalisation.frames_first(clean[None], np.array([num_frames]), num_frames)
    batch = torch.from_numpy(normalised).float().transpose(1, 2)[None]
    valid = torch.ones(1, 1, 1, num_frames, dtype=torch.bool)
    drawn = Effects(**{key: torch.tensor([v]) for key, v in (NONE | conditions).items()})
    changed = acoustics.apply(batch, valid, drawn)[0, 0].numpy()
    found = changed * normalisation.std[:, None] + normalisation.mean[:, None]

    if name == "none":
        np.testing.assert_array_equal(changed, batch[0, 0].numpy())
        return

    def distance(of: np.ndarray) -> tuple[float, float]:
        """Root mean square over the bins of the differences in mean and in spread over time."""
        apart = of.mean(axis=1) - real.mean(axis=1), of.std(axis=1) - real.std(axis=1)
        return float(np.sqrt(np.mean(apart[0] ** 2))), float(np.sqrt(np.mean(apart[1] ** 2)))

    assert distance(found)[0] < 0.25 * distance(clean)[0]
    assert distance(found)[1] < 0.5 * distance(clean)[1]


def test_a_mel_band_without_any_bin_of_the_fourier_transform_stays_constant():
    """With 128 bands and windows of 25 ms, some of the lowest bands are narrower than a bin."""
    features = FeatureConfig(num_mels=128, window_length=400, hop_length=160)
    clip = FeatureExtractor(features).features(voice())["mel"]
    num_frames = clip.shape[1]
    sums = frame_sums(clip[None], np.array([num_frames]))
    normalisation = Normalisation.from_sums(sums, num_frames)
    is_constant = np.ptp(clip, axis=1) == 0
    assert is_constant.sum() == 3
    acoustics = Acoustics(PLAIN, "mel", features, normalisation, CPU)
    normalised = normalisation.frames_first(clip[None], np.array([num_frames]), num_frames)
    batch = torch.from_numpy(normalised).float().transpose(1, 2)[None]
    valid = torch.ones(1, 1, 1, num_frames, dtype=torch.bool)
    conditions = {"noise": 1e-6, "echo": 0.5, "high_edge": 3400.0, "floor": 1e-9}
    drawn = Effects(**{key: torch.tensor([v]) for key, v in (NONE | conditions).items()})
    changed = acoustics.apply(batch, valid, drawn)
    assert changed.isfinite().all()
    assert changed.abs().max() < 20


def test_each_share_of_the_clips_gets_its_condition_within_the_bounds():
    torch.manual_seed(0)
    unit = Normalisation(np.zeros(64), np.ones(64))
    config = AugmentConfig(noise=0.2, echo=0.4, band_limit=0.6)
    drawn = Acoustics(config, "mel", FEATURES, unit, CPU).draw(4000)
    for values, share in ((drawn.noise, 0.2), (drawn.echo, 0.4), (drawn.floor, 0.6)):
        assert (values > 0).float().mean() == pytest.approx(share, abs=0.03)
    noise_db = 10 * drawn.noise[drawn.noise > 0].log10()
    assert -80 <= noise_db.min() < -78
    assert -32 < noise_db.max() <= -30
    is_narrow = drawn.floor > 0
    assert torch.equal(is_narrow, drawn.high_edge.isfinite())
    assert (drawn.low_edge[is_narrow] > 0).float().mean() == pytest.approx(0.5, abs=0.03)
    assert not drawn.low_edge[~is_narrow].any()


def test_augmented_clips_follow_from_the_seed_and_stay_zero_beyond_their_frames():
    recipe = TrainConfig(
        crop_frames=40,
        augment=AugmentConfig(noise=1.0, echo=1.0, band_limit=1.0, mix_style=0, mixup=0),
    )
    unit = Normalisation(np.zeros(64), np.ones(64))
    raw = np.full((8, 64, 20), -50.0, np.float32)
    clips = Clips.resident(raw, np.full(8, 20), np.zeros(8), unit, CPU)
    augment = Augment(recipe, FEATURES, 2, unit, CPU)

    def batch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return augment(clips, torch.arange(8))[0]

    assert torch.equal(batch(1), batch(1))
    assert not torch.equal(batch(1), batch(2))
    assert (batch(1) != 0).any(dim=(1, 2)).sum(dim=1).max() <= 20
