"""The mel filter bank. `training` imports this module without those that read sound."""

import numpy as np

from ser_ray.features.config import FeatureConfig

POWER_FLOOR = 1e-10
"""Lower powers are replaced by this value: -100 dB."""


def mel_bands(config: FeatureConfig) -> np.ndarray:
    """Return triangular filters `[mels, bins]` of height 1, evenly spaced on the HTK mel scale."""
    top = config.sample_rate / 2
    lowest, highest = (2595 * np.log10(1 + hertz / 700) for hertz in (config.f_min, top))
    corners = 700 * (10 ** (np.linspace(lowest, highest, config.num_mels + 2) / 2595) - 1)
    frequencies = np.linspace(0, top, config.num_bins("spectrogram"))
    left, peak, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - left) / (peak - left), (right - frequencies) / (right - peak)
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)
