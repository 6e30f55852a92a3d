"""Augmentation with noise, echo and narrow channels, computed on the power of the features.

The shards hold features, not sound. Sound that is added to a clip adds its expected power in every
frame and bin, so the batch is converted from normalised dB to power, changed there, and converted
back. The sum of two sounds also fluctuates. For one bin of the Fourier transform, with power S of
the clip and expected power N of Gaussian noise, the power of the sum has mean S + N and variance
N² + 2SN (a noncentral chi-squared distribution with two degrees of freedom). A mel band sums
several bins, which divides the relative variance by the number of independent bins. The power is
drawn from the gamma distribution with this mean and variance. The late echo of a room is
noise-like (Polack 1988), so it is added in the same way.

For `mfcc`, the inverse DCT of the coefficients gives a smoothed mel spectrogram in dB, and the DCT
of its change gives the change of the coefficients.

All levels are relative to full scale (dBFS), because the features keep the recording's level.
`ser_ray.features.conditions` makes similar conditions of sound itself, to test a model.
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
"""Mean square of the noise in dB, drawn uniformly. The range goes from a studio to a loud fan; the
median clip of RAVDESS has -38 dB."""
NOISE_SLOPE = (0.0, 2.0)
"""The power spectrum is proportional to 1 / frequency**slope: 0 is white, 1 pink, 2 brown."""
ECHO_DB = (-15.0, 3.0)
"""Energy of the echo relative to the direct sound."""
ECHO_SECONDS = (0.1, 0.8)
"""Reverberation time: the echo falls by 60 dB in this time. Drawn uniformly on a log scale."""
LOW_EDGE = (50.0, 400.0)
"""Lower edge of a narrow channel in hertz, drawn uniformly on a log scale for half of the clips.
The other half has none. A telephone passes 300 to 3400 Hz."""
HIGH_EDGE = (2500.0, 7000.0)
"""Upper edge of a narrow channel in hertz, drawn uniformly on a log scale."""
EDGE_ORDER = 12
"""Order of the Butterworth filters at both edges: 72 dB per octave."""
CHANNEL_FLOOR_DB = (-110.0, -70.0)
"""Mean square in dB of the white noise that a codec or rounding adds after a narrow channel.
Rounding to 16 bits adds -101 dB."""
HANN_POWER = 0.375
"""Mean square of the Hann window."""
HANN_CORRELATION = (1.0, 4 / 9, 1 / 36)
"""Correlation of the power of white noise between bins that are 0, 1 and 2 apart, for a Hann
window. The sum over both sides is 1.94."""
CORNER_HERTZ = 50.0
"""Below this frequency, the power spectrum of coloured noise is constant."""


class Conditions(NamedTuple):
    """The acoustic conditions of each clip of a batch. Every tensor has the shape [batch]."""

    noise: Tensor
    """Mean square of the noise; 0 is none."""
    slope: Tensor
    """The noise's power spectrum is proportional to 1 / frequency**slope."""
    echo: Tensor
    """Energy of the echo, relative to the clip's; 0 is none."""
    echo_seconds: Tensor
    """Reverberation time."""
    low: Tensor
    """Lower edge of the channel in hertz; 0 is none."""
    high: Tensor
    """Upper edge of the channel in hertz; infinity is none."""
    floor: Tensor
    """Mean square of the white noise after the channel; 0 is none."""


class Acoustics:
    """Adds noise, an echo or a narrow channel to a share of the clips of a batch.

    Args:
        config: the share of the clips that gets noise, an echo or a narrow channel.
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
        variances = np.einsum("bk,kl,bl->b", weights, _bin_correlation(num_bins), weights)
        self.config, self.device = config, device
        self.mean, self.std = (
            to_device(values)[:, None] for values in (normalisation.mean, normalisation.std)
        )
        self.weights = to_device(weights.T)  # [fft bins, bins]
        self.independent = to_device(weights.sum(axis=1) ** 2 / variances)[:, None]
        self.hertz = torch.linspace(0, features.sample_rate / 2, num_bins, device=device)
        self.frame_seconds = features.hop_length / features.sample_rate
        self.white_power = HANN_POWER * features.window_length
        self.dct: Tensor | None = None  # [coefficients, mel bands]
        if kind == "mfcc":
            self.dct = create_dct(features.num_mfcc, features.num_mels, "ortho").T.to(device)

    def __call__(self, batch: Tensor, valid: Tensor) -> Tensor:
        """Draw conditions and apply them, as `apply` does."""
        return self.apply(batch, valid, self.draw(len(batch)))

    def draw(self, size: int) -> Conditions:
        """Draw the conditions of `size` clips with torch's generator of the device."""
        config = self.config

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(size, device=self.device)

        def log_uniform(low: float, high: float) -> Tensor:
            return uniform(math.log(low), math.log(high)).exp()

        def has(share: float) -> Tensor:
            return torch.rand(size, device=self.device) < share

        is_narrow = has(config.band_limit)
        return Conditions(
            noise=has(config.noise) * from_decibels(uniform(*NOISE_DB)),
            slope=uniform(*NOISE_SLOPE),
            echo=has(config.echo) * from_decibels(uniform(*ECHO_DB)),
            echo_seconds=log_uniform(*ECHO_SECONDS),
            low=is_narrow * has(0.5) * log_uniform(*LOW_EDGE),
            high=torch.where(is_narrow, log_uniform(*HIGH_EDGE), math.inf),
            floor=is_narrow * from_decibels(uniform(*CHANNEL_FLOOR_DB)),
        )

    def apply(self, batch: Tensor, valid: Tensor, drawn: Conditions) -> Tensor:
        """Apply conditions to a batch: first the echo, then the noise, then the channel.

        Args:
            batch: normalised features [batch, 1, bins, frames].
            valid: mask of the frames that belong to a clip [batch, 1, 1, frames]. The other frames
                stay 0.
            drawn: conditions of the clips.

        Returns:
            Normalised features [batch, 1, bins, frames].
        """
        decibels = batch.squeeze(1) * self.std + self.mean
        if self.dct is not None:
            decibels = self.dct.T @ decibels
        clip = from_decibels(decibels) * valid.squeeze(1)
        added = self._echo(clip, drawn) + self._noise(drawn.noise, drawn.slope)
        passed, floor = self._passed(drawn), self._noise(drawn.floor, torch.zeros_like(drawn.slope))
        power = self._draw_sum(clip * passed, added * passed + floor)
        change = 10 * power.clamp(min=POWER_FLOOR).log10() - decibels
        if self.dct is not None:
            change = self.dct @ change
        untouched = (drawn.noise == 0) & (drawn.echo == 0) & drawn.high.isinf() & (drawn.low == 0)
        change = torch.where(untouched[:, None, None], 0.0, change / self.std)
        return batch + change.unsqueeze(1) * valid

    def _noise(self, mean_square: Tensor, slope: Tensor) -> Tensor:
        """Expected power of noise [batch, bins, 1]."""
        spectrum = self.hertz.clamp(min=CORNER_HERTZ) ** -slope[:, None]
        spectrum = spectrum / spectrum.mean(dim=1, keepdim=True)
        power = self.white_power * mean_square[:, None] * spectrum
        return (power @ self.weights).unsqueeze(2)

    def _echo(self, clip: Tensor, drawn: Conditions) -> Tensor:
        """Expected power of the echo of `clip` [batch, bins, frames]: an exponential decay."""
        frames = torch.arange(clip.shape[2], device=self.device)
        later = frames - frames[:, None]  # [from, to]
        rate = math.log(1e6) * self.frame_seconds / drawn.echo_seconds[:, None, None]
        decay = torch.where(later >= 0, torch.exp(-rate * later.clamp(min=0)), 0.0)
        decay = decay * (1 - torch.exp(-rate))  # the whole tail has the energy of the clip
        return drawn.echo[:, None, None] * (clip @ decay)

    def _passed(self, drawn: Conditions) -> Tensor:
        """Share of the power that passes the channel [batch, bins, 1]."""
        hertz = self.hertz.clamp(min=1.0)
        passed = 1 / (1 + (hertz / drawn.high[:, None]) ** (2 * EDGE_ORDER))
        passed = passed / (1 + (drawn.low[:, None] / hertz) ** (2 * EDGE_ORDER))
        return (passed @ self.weights / self.weights.sum(dim=0)).unsqueeze(2)

    def _draw_sum(self, clip: Tensor, added: Tensor) -> Tensor:
        """Draw the power of a clip with Gaussian noise of expected power `added`."""
        spread = added * (added + 2 * clip)
        # Where nothing is added, the distribution's shape parameter would be infinite.
        shape = self.independent * (clip + added).square() / spread.clamp(min=1e-30)
        shape = shape.clamp(min=1e-3, max=1e6)
        drawn = Gamma(shape, shape, validate_args=False).sample()
        return torch.where(added > 0, drawn, 1.0) * (clip + added)


def from_decibels(decibels: Tensor) -> Tensor:
    """Convert dB to power."""
    return 10 ** (decibels / 10)


def _bin_correlation(num_bins: int) -> np.ndarray:
    """Correlation of the power of white noise between bins [bins, bins]."""
    correlation = np.zeros((num_bins, num_bins))
    for apart, value in enumerate(HANN_CORRELATION):
        side = np.full(num_bins - apart, value)
        correlation += np.diag(side, apart) + (np.diag(side, -apart) if apart else 0)
    return correlation
