"""Augmentation: random changes of a training batch, made on the device of the batch.

Noise, echo and narrow channels are in `acoustics`; the other changes are here. The fields of
`recipe.AugmentConfig` set how strong each change is. All random numbers come from torch's
generators, which the training seeds from (seed, epoch, step) before each step. If the clips are
resident, every worker augments the complete batch and then keeps its share, so the augmented clips
do not depend on the number of workers. For streamed clips, see `streaming`.
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

VARIANCE_EPSILON = 1e-5
"""MixStyle adds this to each variance before it takes the square root."""


class Augment:
    """Augments a batch, in this order: random crop; echo, noise and narrow channel (`Acoustics`);
    MixStyle (Zhou 2021); gain; SpecAugment (Park 2019); mixup (Zhang 2018). The features of an
    encoder get only mixup.

    Args:
        recipe: sets the kind of features and the strength of each change.
        features: defines the frames and the bins.
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
        config = recipe.augment if recipe.feature in KINDS else only_mixup(recipe.augment)
        self.crop_frames, self.num_labels = recipe.window_frames, num_labels
        self.random_crop = config.random_crop
        # MixStyle hides differences between speakers, which helps only if new speakers are tested.
        self.mix_style = 0.0 if recipe.protocol == "random" else config.mix_style
        self.gain_db = config.gain_db
        self.gain_response = gain_response(recipe.feature, features, normalisation, device)
        self.acoustics: Acoustics | None = None
        if config.noise or config.echo or config.band_limit:
            self.acoustics = Acoustics(config, recipe.feature, features, normalisation, device)
        self.mask = SpecAugment(
            n_time_masks=config.time_masks,
            time_mask_param=min(config.time_mask_frames, self.crop_frames),
            n_freq_masks=config.freq_masks,
            freq_mask_param=round(config.freq_mask_share * len(normalisation.std)),
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
        surplus = clips.num_frames[rows] - self.crop_frames
        place = torch.rand(len(rows), device=rows.device) if self.random_crop else 0.5
        # The crop of a shorter clip starts at or before the first frame of the clip.
        starts = surplus.clamp(max=0) + ((surplus.abs() + 1) * place).long()
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


def only_mixup(config: AugmentConfig) -> AugmentConfig:
    """Switch off every augmentation but mixup, because the others need frames."""
    return replace(
        config, noise=0, echo=0, band_limit=0, mix_style=0, gain_db=0, time_masks=0, freq_masks=0
    )


def _mix(values: Tensor, weight: float) -> Tensor:
    """Mix every clip with the one before it in the batch (mixup, Zhang 2018, equation 2).

    torchvision's MixUp computes the same, but takes 1.5 s to import.
    """
    return values.roll(1, 0) * (1 - weight) + values * weight


def _mix_style(batch: Tensor, valid: Tensor, probability: float) -> Tensor:
    """Mix the mean and deviation of each bin over time with those of another clip in the batch.

    Args:
        batch: normalised features [batch, 1, bins, frames].
        valid: mask of the frames that belong to a clip [batch, 1, 1, frames]. Other frames stay 0.
        probability: how probable it is that a clip is changed.
    """
    frames = valid.sum(dim=3, keepdim=True).clamp(min=1)
    mean = batch.sum(dim=3, keepdim=True) / frames
    centred = (batch - mean) * valid
    std = (centred.square().sum(dim=3, keepdim=True) / frames + VARIANCE_EPSILON).sqrt()
    drawn, weight = torch.rand(2, len(batch), 1, 1, 1, device=batch.device)
    weight = torch.where(drawn < probability, weight, 1.0)
    mean, new_std = (weight * own + (1 - weight) * own.flip(0) for own in (mean, std))
    return (centred / std * new_std + mean) * valid


def gain_response(
    kind: str, features: FeatureConfig, normalisation: Normalisation, device: torch.device
) -> Tensor:
    """Return how much each normalised bin changes if the level of the clip rises by 1 dB [bins].

    For MFCCs, the change is the orthonormal DCT of a vector of `num_mels` ones: sqrt(num_mels) in
    coefficient 0, and 0 elsewhere.
    """
    response = torch.ones(len(normalisation.std), device=device)
    if kind == "mfcc":
        response = torch.zeros_like(response)
        response[0] = math.sqrt(features.num_mels)
    return response / torch.as_tensor(normalisation.std, dtype=torch.float32, device=device)
