"""Augmentation of a training batch, on the batch's device.

Everything is drawn from torch's generator of that device, which the loop seeds from (seed, epoch,
step) before each step, and for the whole batch at once: every worker augments all of it and keeps
its stride, so the augmented clips do not depend on the number of workers.
"""

import math

import torch
from torch import Tensor
from torchaudio.transforms import SpecAugment
from torchvision.transforms.v2 import MixUp

from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import Clips, Normalisation

MIN_VARIANCE = 1e-5
"""Of a bin over a clip's frames, in squared standard deviations of the corpus."""
VTLP_BOUNDARY = 0.6
"""Frequency up to which VTLP multiplies, as a share of half the sample rate. It is
F_hi of the paper: 4.8 kHz of 8, above the formants that matter most."""


class Augment:
    """Random crop, MixStyle (Zhou 2021), level, tempo and voice, SpecAugment (Park 2019) and mixup
    (Zhang 2018), in this order.

    Args:
        recipe: what to draw, and from what feature.
        features: what fixes the frequencies of the bins.
        num_labels: how many labels there are.
        gain_response: change of every normalised bin for +1 dB of level [bins].
    """

    def __init__(
        self,
        recipe: TrainConfig,
        features: FeatureConfig,
        num_labels: int,
        gain_response: Tensor,
    ) -> None:
        config, crop_frames, num_bins = recipe.augment, recipe.crop_frames, len(gain_response)
        self.crop_frames = crop_frames
        self.num_labels = num_labels
        self.random_crop = config.random_crop
        self.mix_style = config.mix_style
        self.gain_db = config.gain_db
        self.gain_response = gain_response
        self.tempo = config.tempo
        self.kind, self.features = recipe.feature, features
        self.vtlp = config.vtlp if recipe.feature != "mfcc" else 0.0
        self.longest = math.ceil(crop_frames * (1 + self.tempo))
        self.mask = SpecAugment(
            n_time_masks=config.time_masks,
            time_mask_param=min(config.time_mask_frames, crop_frames),
            n_freq_masks=config.freq_masks,
            freq_mask_param=round(config.freq_mask_share * num_bins),
            iid_masks=True,
            zero_masking=True,  # 0 is the mean of normalised features
        )
        self.mix = MixUp(alpha=config.mixup, num_classes=num_labels) if config.mixup else None

    def __call__(self, clips: Clips, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Draw the batch of these rows.

        Args:
            clips: the training clips.
            rows: clips of the batch [batch], on the clips' device.

        Returns:
            Features [batch, 1, bins, crop_frames] float32 and target probabilities
            [batch, labels].
        """
        lengths = (self.crop_frames * _around_one(self.tempo, rows)).round().long()
        spare = clips.num_frames[rows] - lengths
        draw = torch.rand(len(rows), device=rows.device) if self.random_crop else 0.5
        # A longer clip is cut at random, a shorter one lies at random inside the crop.
        starts = spare.clamp(max=0) + ((spare.abs() + 1) * draw).long()
        batch, valid = clips.crop(rows, starts, self.longest)
        if self.mix_style:
            batch = _mix_style(batch, valid, self.mix_style)
        if self.gain_db:
            gain = (torch.rand(len(rows), 1, 1, 1, device=rows.device) * 2 - 1) * self.gain_db
            batch = batch + gain * self.gain_response[:, None] * valid
        if self.tempo or self.vtlp:
            factors = _around_one(self.vtlp, rows)
            bins = vtlp_bins(factors, self.kind, self.features) if self.vtlp else None
            batch = _resample(batch, lengths / self.longest, bins, self.crop_frames)
        batch = self.mask(batch)
        labels = clips.labels[rows]
        if self.mix is not None and len(rows) > 1:
            mixed, targets = self.mix(batch, labels)
            return mixed, targets
        return batch, torch.nn.functional.one_hot(labels, self.num_labels).float()


def _around_one(spread: float, rows: Tensor) -> Tensor:
    """Draw a factor within 1 ± spread for every row [rows]."""
    return 1 + (torch.rand(len(rows), device=rows.device) * 2 - 1) * spread


def _mix_style(batch: Tensor, valid: Tensor, share: float) -> Tensor:
    """Move a share of the clips towards another clip's mean and spread over time in every bin.

    Of [batch, 1, bins, frames] the `valid` frames [batch, 1, 1, frames] count; the others stay 0.
    """
    frames = valid.sum(dim=3, keepdim=True).clamp(min=1)
    mean = batch.sum(dim=3, keepdim=True) / frames
    apart = (batch - mean) * valid
    spread = (apart.square().sum(dim=3, keepdim=True) / frames + MIN_VARIANCE).sqrt()
    drawn, weight = torch.rand(2, len(batch), 1, 1, 1, device=batch.device)
    weight = torch.where(drawn < share, weight, 1.0)
    mean, new = (weight * own + (1 - weight) * own.flip(0) for own in (mean, spread))
    return (apart / spread * new + mean) * valid


def _resample(batch: Tensor, frames: Tensor, bins: Tensor | None, num_frames: int) -> Tensor:
    """Read a batch at other frames and bins, linearly between them.

    Args:
        batch: [batch, 1, bins, any].
        frames: share of the frames, from the first, that fill the result [batch].
        bins: bin, with fractions, that each bin of the result is read from [batch, bins]; None
            leaves the bins as they are.
        num_frames: frames of the result.

    Returns:
        [batch, 1, bins, num_frames].
    """
    shape = (*batch.shape[:3], num_frames)
    move = torch.zeros(len(batch), 2, 3, device=batch.device)
    move[:, 0, 0], move[:, 0, 2], move[:, 1, 1] = frames, frames - 1, 1
    grid = torch.nn.functional.affine_grid(move, list(shape), align_corners=False)
    if bins is not None:
        # grid_sample counts from -1 to 1, from the first bin's edge to the last one's.
        grid[..., 1] = ((2 * bins + 1) / shape[2] - 1)[:, :, None]
    return torch.nn.functional.grid_sample(batch, grid, align_corners=False)


def vtlp_bins(factors: Tensor, kind: Kind, features: FeatureConfig) -> Tensor:
    """Bin that each bin is read from, so that frequencies are warped by some factors.

    A factor moves a tone at f hertz to `warp_frequency(f, factor)`; its inverse, which is needed
    here, is the warp by 1 / factor.

    Args:
        factors: [batch].
        kind: spectrogram or mel.
        features: what fixes the frequencies of the bins.

    Returns:
        Bins with fractions [batch, bins].
    """
    nyquist, num_bins = features.sample_rate / 2, features.num_bins(kind)
    bins = torch.arange(num_bins, device=factors.device)
    if kind == "spectrogram":
        per_bin = nyquist / (num_bins - 1)
        source = warp_frequency(bins * per_bin, 1 / factors[:, None], nyquist) / per_bin
    else:  # band i is centred on corner i + 1 of num_mels + 2, evenly spaced on the mel scale
        lowest, highest = (
            2595 * math.log10(1 + hertz / 700) for hertz in (features.f_min, nyquist)
        )
        per_bin = (highest - lowest) / (num_bins + 1)
        hertz = 700 * (10 ** ((lowest + (bins + 1) * per_bin) / 2595) - 1)
        warped = warp_frequency(hertz, 1 / factors[:, None], nyquist)
        source = (2595 * torch.log10(1 + warped / 700) - lowest) / per_bin - 1
    return source.clamp(0, num_bins - 1)


def warp_frequency(hertz: Tensor, factor: Tensor, nyquist: float) -> Tensor:
    """Warp frequencies piecewise linearly (Jaitly and Hinton 2013, section 3).

    Up to a boundary a frequency is multiplied by the factor; from there on a straight line leads
    to half the sample rate, which stays where it is.
    """
    boundary = VTLP_BOUNDARY * nyquist * factor.clamp(max=1)
    slope = (nyquist - boundary) / (nyquist - boundary / factor)
    return torch.where(
        hertz <= boundary / factor, hertz * factor, nyquist - slope * (nyquist - hertz)
    )


def gain_response(
    kind: Kind, num_mels: int, normalisation: Normalisation, device: torch.device
) -> Tensor:
    """What +1 dB of level adds to every normalised bin [bins].

    Log-power bins all rise by 1 dB; of the orthonormal DCT of `num_mels` such rises only
    coefficient 0 is not zero, but sqrt(num_mels).
    """
    rise = torch.ones(len(normalisation.std), device=device)
    if kind == "mfcc":
        rise = torch.zeros_like(rise)
        rise[0] = math.sqrt(num_mels)
    return rise / torch.as_tensor(normalisation.std, dtype=torch.float32, device=device)
