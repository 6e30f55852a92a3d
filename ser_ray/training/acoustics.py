"""The augmentation with noise, echo and narrow channels, computed on the power of the features.

`recipe.AugmentConfig` says how many clips get each effect, and the constants below say how strong
it is. `augment` applies this module to the training batches of spectrogram, mel and mfcc. To test a
model, `ser_ray.features.conditions` adds similar effects to the sound itself.

The shards hold features, not sound. Noise that is added to a sound adds its expected power to every
frame and bin. Therefore `Acoustics` converts a batch from normalised dB to power, changes the
power, and converts it back.

The power of a sum of two sounds also fluctuates. If S is the power of the clip in one bin of the
Fourier transform, and N is the expected power of Gaussian noise, their sum has mean power S + N and
variance N² + 2SN (noncentral chi-squared distribution with two degrees of freedom). A mel band sums
several bins, which divides the relative variance by the number of independent bins. The power is
drawn from the gamma distribution with this mean and variance. The late echo of a room resembles
noise (Polack 1988), so it is added in the same way.

For `mfcc`, the inverse DCT of the coefficients gives a smoothed mel spectrogram in dB. The change
is computed on this spectrogram, and the DCT of the change is added to the coefficients.

The levels of noise are relative to full scale (dBFS), because the features keep the level of the
recording.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Gamma
from torchaudio.functional import create_dct

from ser_ray.features.config import FeatureConfig
from ser_ray.features.mel import POWER_FLOOR, mel_bands
from ser_ray.training.data import Normalisation
from ser_ray.training.recipe import AugmentConfig

NOISE_DB = (-80.0, -30.0)
"""Range of the noise level (mean square in dBFS), drawn uniformly. -80 dBFS is the noise of a
studio, and -30 dBFS is the noise of a loud fan. The median clip of RAVDESS has -38 dBFS."""
NOISE_SLOPE = (0.0, 2.0)
"""Range of the slope of the noise, drawn uniformly. The power spectrum is proportional to
1 / frequency**slope: 0 is white, 1 pink and 2 brown noise."""
ECHO_DB = (-15.0, 3.0)
"""Range of the energy of the echo relative to the direct sound, in dB, drawn uniformly."""
ECHO_SECONDS = (0.1, 0.8)
"""Range of the time in which the echo falls by 60 dB, drawn uniformly on a log scale."""
LOW_EDGE = (50.0, 400.0)
"""Range of the lower edge of a narrow channel in hertz, drawn uniformly on a log scale. Half of the
narrow channels have no lower edge. A telephone passes 300 to 3400 Hz."""
HIGH_EDGE = (2500.0, 7000.0)
"""Range of the upper edge of a narrow channel in hertz, drawn uniformly on a log scale."""
EDGE_ORDER = 12
"""Order of the Butterworth filter at each edge. Order 12 is 72 dB per octave."""
CHANNEL_FLOOR_DB = (-110.0, -70.0)
"""Range of the level in dBFS, drawn uniformly, of the white noise that a codec or rounding adds
after a narrow channel. Rounding to 16 bits adds -101 dBFS."""
TINY = 1e-30
"""Replaces a denominator of 0, as for a mel band without any bin of the Fourier transform."""
HANN_POWER = 0.375
"""Mean square of the Hann window."""
HANN_CORRELATION = (1.0, 4 / 9, 1 / 36)
"""Correlation of the power of white noise between bins that are 0, 1 and 2 apart, for a Hann
window. Because of this correlation, not all bins of a mel band are independent."""
CORNER_HERTZ = 50.0
"""Below this frequency, the power spectrum of coloured noise is constant."""


class Effects(NamedTuple):
    """The effects on each clip of a batch. Every tensor has the shape [batch]."""

    noise: Tensor
    """Mean square of the noise; 0 is no noise."""
    slope: Tensor
    """The power spectrum of the noise is proportional to 1 / frequency**slope."""
    echo: Tensor
    """Energy of the echo relative to that of the clip; 0 is no echo."""
    echo_seconds: Tensor
    """Reverberation time."""
    low_edge: Tensor
    """Lower edge of the channel in hertz; 0 if it has none."""
    high_edge: Tensor
    """Upper edge of the channel in hertz; infinity if it has none."""
    floor: Tensor
    """Mean square of the white noise after the channel; 0 is no noise."""


class Acoustics:
    """Adds noise, echo and narrow channels to random clips of a batch.

    Args:
        config: the shares of the clips that get noise, an echo and a narrow channel.
        kind: kind of the features.
        features: defines the frames and the bins.
        normalisation: how the batches are normalised.
        device: where the batches are.
    """

    def __init__(
        self,
        config: AugmentConfig,
        kind: str,
        features: FeatureConfig,
        normalisation: Normalisation,
        device: torch.device,
    ) -> None:
        def to_device(values: np.ndarray) -> Tensor:
            return torch.as_tensor(values, dtype=torch.float32, device=device)

        num_bins = features.num_bins("spectrogram")
        weights = np.eye(num_bins) if kind == "spectrogram" else mel_bands(features)
        by_distance = np.pad(HANN_CORRELATION, (0, num_bins - len(HANN_CORRELATION)))
        bins = np.arange(num_bins)
        correlation = by_distance[np.abs(np.subtract.outer(bins, bins))]
        # Variance of the power of white noise, relative to one bin of the Fourier transform.
        variances = np.einsum("bk,kl,bl->b", weights, correlation, weights)
        self.config, self.device = config, device
        self.mean, self.std = (
            to_device(values)[:, None] for values in (normalisation.mean, normalisation.std)
        )
        self.weights = to_device(weights.T)  # [fft bins, bins]
        num_independent = weights.sum(axis=1) ** 2 / np.maximum(variances, TINY)
        self.num_independent = to_device(num_independent)[:, None]
        self.hertz = torch.linspace(0, features.sample_rate / 2, num_bins, device=device)
        self.frame_seconds = features.hop_length / features.sample_rate
        self.white_power = HANN_POWER * features.window_length
        self.dct: Tensor | None = None  # [coefficients, mel bands]
        if kind == "mfcc":
            self.dct = create_dct(features.num_mfcc, features.num_mels, "ortho").T.to(device)

    def __call__(self, batch: Tensor, valid: Tensor) -> Tensor:
        """Draw effects and apply them to a batch, with the shapes of `apply`."""
        return self.apply(batch, valid, self.draw(len(batch)))

    def draw(self, num_clips: int) -> Effects:
        """Draw the effects on each clip with torch's random generator of the device."""
        config = self.config

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(num_clips, device=self.device)

        def log_uniform(low: float, high: float) -> Tensor:
            return uniform(math.log(low), math.log(high)).exp()

        def has(share: float) -> Tensor:
            return torch.rand(num_clips, device=self.device) < share

        is_narrow = has(config.band_limit)
        return Effects(
            noise=has(config.noise) * from_decibels(uniform(*NOISE_DB)),
            slope=uniform(*NOISE_SLOPE),
            echo=has(config.echo) * from_decibels(uniform(*ECHO_DB)),
            echo_seconds=log_uniform(*ECHO_SECONDS),
            low_edge=is_narrow * has(0.5) * log_uniform(*LOW_EDGE),
            high_edge=torch.where(is_narrow, log_uniform(*HIGH_EDGE), math.inf),
            floor=is_narrow * from_decibels(uniform(*CHANNEL_FLOOR_DB)),
        )

    def apply(self, batch: Tensor, valid: Tensor, effects: Effects) -> Tensor:
        """Apply effects to a batch: first the echo, then the noise, then the channel.

        Args:
            batch: normalised features [batch, 1, bins, frames].
            valid: mask of the frames that belong to a clip [batch, 1, 1, frames]. The other frames
                stay 0.
            effects: the effects on each clip.

        Returns:
            Normalised features [batch, 1, bins, frames].
        """
        decibels = batch.squeeze(1) * self.std + self.mean
        if self.dct is not None:
            decibels = self.dct.T @ decibels
        clip = from_decibels(decibels) * valid.squeeze(1)
        added = self._echo(clip, effects) + self._noise(effects.noise, effects.slope)
        passed = self._passed_share(effects)
        floor = self._noise(effects.floor, torch.zeros_like(effects.slope))
        power = self._draw_sum(clip * passed, added * passed + floor)
        change = 10 * power.clamp(min=POWER_FLOOR).log10() - decibels
        if self.dct is not None:
            change = self.dct @ change
        is_narrow = (effects.low_edge > 0) | effects.high_edge.isfinite()
        has_effect = (effects.noise > 0) | (effects.echo > 0) | is_narrow
        # Clips without an effect must not change, not even by rounding.
        change = torch.where(has_effect[:, None, None], change / self.std, 0.0)
        return batch + change.unsqueeze(1) * valid

    def _noise(self, mean_square: Tensor, slope: Tensor) -> Tensor:
        """Return the expected power of noise [batch, bins, 1]."""
        spectrum = self.hertz.clamp(min=CORNER_HERTZ) ** -slope[:, None]
        spectrum = spectrum / spectrum.mean(dim=1, keepdim=True)
        power = self.white_power * mean_square[:, None] * spectrum
        return (power @ self.weights).unsqueeze(2)

    def _echo(self, clip: Tensor, effects: Effects) -> Tensor:
        """Return the expected power of the echo of a clip; both are [batch, bins, frames]."""
        frames = torch.arange(clip.shape[2], device=self.device)
        delay = frames - frames[:, None]  # from the frame of the row to the frame of the column
        rate = math.log(1e6) * self.frame_seconds / effects.echo_seconds[:, None, None]
        decay = torch.where(delay >= 0, torch.exp(-rate * delay.clamp(min=0)), 0.0)
        decay = decay * (1 - torch.exp(-rate))  # the sum over an endless time is 1
        return effects.echo[:, None, None] * (clip @ decay)

    def _passed_share(self, effects: Effects) -> Tensor:
        """Return the share of the power that passes the channel [batch, bins, 1]."""
        hertz = self.hertz.clamp(min=1.0)
        passed = 1 / (1 + (hertz / effects.high_edge[:, None]) ** (2 * EDGE_ORDER))
        passed = passed / (1 + (effects.low_edge[:, None] / hertz) ** (2 * EDGE_ORDER))
        return (passed @ self.weights / self.weights.sum(dim=0).clamp(min=TINY)).unsqueeze(2)

    def _draw_sum(self, clip: Tensor, added: Tensor) -> Tensor:
        """Draw the power of the sum of a clip and Gaussian noise of expected power `added`."""
        variance = added * (added + 2 * clip)
        # The clamps keep the shape parameter of the distribution finite if nothing is added.
        shape = self.num_independent * (clip + added).square() / variance.clamp(min=TINY)
        shape = shape.clamp(min=1e-3, max=1e6)
        ratio = Gamma(shape, shape, validate_args=False).sample()  # its mean is 1
        return torch.where(added > 0, ratio, 1.0) * (clip + added)


def from_decibels(decibels: Tensor) -> Tensor:
    """Convert dB to power."""
    return 10 ** (decibels / 10)
