"""Augmentation of a training batch, on the batch's device.

All random numbers come from torch's generator of that device, which the loop seeds from (seed,
epoch, step) before each step. Every worker augments the complete batch and keeps its share, so the
augmented clips do not depend on the number of workers.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Beta
from torchaudio.transforms import SpecAugment

from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.training.acoustics import Acoustics
from ser_ray.training.data import Clips, Normalisation
from ser_ray.training.recipe import AugmentConfig, TrainConfig

MIN_VARIANCE = 1e-5
"""MixStyle adds this to the variance of each normalised bin over the frames of a clip."""


class Augment:
    """Augments a batch by a random crop, noise, echo and narrow channels (`Acoustics`), MixStyle
    (Zhou 2021), gain, SpecAugment (Park 2019) and mixup (Zhang 2018), in this order. The features
    of an encoder get only mixup.

    Args:
        recipe: the recipe, with the strength of each augmentation and the feature kind.
        features: defines the frequencies of the bins.
        num_labels: number of labels.
        normalisation: how the clips are normalised.
        device: where the clips are.
    """

    def __init__(
        self,
        recipe: TrainConfig,
        features: FeatureConfig,
        num_labels: int,
        normalisation: Normalisation,
        device: torch.device,
    ) -> None:
        config = recipe.augment if recipe.feature in KINDS else mixup_alone(recipe.augment)
        crop_frames, num_bins = recipe.window_frames, len(normalisation.std)
        self.crop_frames = crop_frames
        self.num_labels = num_labels
        self.random_crop = config.random_crop
        # MixStyle hides differences between speakers, which helps only with new speakers.
        self.mix_style = 0.0 if recipe.protocol == "random" else config.mix_style
        self.gain_db = config.gain_db
        self.gain_response = gain_response(recipe.feature, features, normalisation, device)
        self.acoustics = (
            Acoustics(config, recipe.feature, features, normalisation, device)
            if config.noise or config.echo or config.band_limit
            else None
        )
        self.mask = SpecAugment(
            n_time_masks=config.time_masks,
            time_mask_param=min(config.time_mask_frames, crop_frames),
            n_freq_masks=config.freq_masks,
            freq_mask_param=round(config.freq_mask_share * num_bins),
            iid_masks=True,
            zero_masking=True,  # 0 is the mean of normalised features
        )
        alpha = torch.tensor(config.mixup)
        self.mixup_weights = Beta(alpha, alpha) if config.mixup else None

    def __call__(self, clips: Clips, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Crop and augment clips.

        Args:
            clips: the training clips.
            rows: indices of the batch's clips [batch], on the clips' device.

        Returns:
            Features [batch, 1, bins, crop_frames] float32 and target probabilities
            [batch, labels].
        """
        spare = clips.num_frames[rows] - self.crop_frames
        draw = torch.rand(len(rows), device=rows.device) if self.random_crop else 0.5
        # A longer clip is cut at a random frame, and a shorter one is placed at random in the crop.
        starts = spare.clamp(max=0) + ((spare.abs() + 1) * draw).long()
        batch, valid = clips.crop(rows, starts, self.crop_frames)
        if self.acoustics is not None:
            batch = self.acoustics(batch, valid)
        if self.mix_style:
            batch = _mix_style(batch, valid, self.mix_style)
        if self.gain_db:
            gain = (torch.rand(len(rows), 1, 1, 1, device=rows.device) * 2 - 1) * self.gain_db
            batch = batch + gain * self.gain_response[:, None] * valid
        batch = self.mask(batch)
        targets = torch.nn.functional.one_hot(clips.labels[rows], self.num_labels).float()
        if self.mixup_weights is not None and len(rows) > 1:
            weight = float(self.mixup_weights.sample())
            return _mix(batch, weight), _mix(targets, weight)
        return batch, targets


def mixup_alone(config: AugmentConfig) -> AugmentConfig:
    """Switch off every augmentation but mixup: the others need features with a time axis."""
    return replace(
        config, noise=0, echo=0, band_limit=0, mix_style=0, gain_db=0, time_masks=0, freq_masks=0
    )


def _mix(values: Tensor, weight: float) -> Tensor:
    """Mix every clip with the one before it in the batch (mixup, Zhang 2018, equation 2).

    torchvision's MixUp computes the same, but needs 1.5 s to import.
    """
    return values.roll(1, 0) * (1 - weight) + values * weight


def _mix_style(batch: Tensor, valid: Tensor, share: float) -> Tensor:
    """Mix each bin's mean and deviation over time with those of another clip, for a share of clips.

    Args:
        batch: normalised features [batch, 1, bins, frames].
        valid: mask of the frames that belong to a clip [batch, 1, 1, frames]. Other frames stay 0.
        share: probability that a clip is changed.
    """
    frames = valid.sum(dim=3, keepdim=True).clamp(min=1)
    mean = batch.sum(dim=3, keepdim=True) / frames
    centred = (batch - mean) * valid
    std = (centred.square().sum(dim=3, keepdim=True) / frames + MIN_VARIANCE).sqrt()
    drawn, weight = torch.rand(2, len(batch), 1, 1, 1, device=batch.device)
    weight = torch.where(drawn < share, weight, 1.0)
    mean, new_std = (weight * own + (1 - weight) * own.flip(0) for own in (mean, std))
    return (centred / std * new_std + mean) * valid


def gain_response(
    kind: str, features: FeatureConfig, normalisation: Normalisation, device: torch.device
) -> Tensor:
    """Compute the change of every normalised bin for +1 dB of level [bins].

    Every log-power bin rises by 1 dB. The orthonormal DCT of `num_mels` such rises is
    sqrt(num_mels) in coefficient 0, and 0 in all others.
    """
    rise = torch.ones(len(normalisation.std), device=device)
    if kind == "mfcc":
        rise = torch.zeros_like(rise)
        rise[0] = math.sqrt(features.num_mels)
    return rise / torch.as_tensor(normalisation.std, dtype=torch.float32, device=device)
