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

from ser_ray.features.config import Kind
from ser_ray.training.config import AugmentConfig
from ser_ray.training.data import Clips, Normalisation


class Augment:
    """Random crop, level, SpecAugment (Park 2019) and mixup (Zhang 2018), in this order.

    Args:
        gain_response: change of every normalised bin for +1 dB of level [bins].
    """

    def __init__(
        self, config: AugmentConfig, crop_frames: int, num_labels: int, gain_response: Tensor
    ) -> None:
        num_bins = len(gain_response)
        self.crop_frames = crop_frames
        self.num_labels = num_labels
        self.gain_db = config.gain_db
        self.gain_response = gain_response
        self.mask = SpecAugment(
            n_time_masks=config.time_masks,
            time_mask_param=min(config.time_mask_frames, crop_frames),
            n_freq_masks=config.bin_masks,
            freq_mask_param=round(config.bin_mask_share * num_bins),
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
        spare = clips.num_frames[rows] - self.crop_frames
        draw = torch.rand(len(rows), device=rows.device)
        # A longer clip is cut at random, a shorter one lies at random inside the crop.
        starts = spare.clamp(max=0) + (draw * (spare.abs() + 1)).long()
        batch, valid = clips.take(rows, starts, self.crop_frames)
        if self.gain_db:
            gain = (torch.rand(len(rows), 1, 1, 1, device=rows.device) * 2 - 1) * self.gain_db
            batch = batch + gain * self.gain_response[:, None] * valid
        batch = self.mask(batch)
        labels = clips.labels[rows]
        if self.mix is not None and len(rows) > 1:
            mixed, targets = self.mix(batch, labels)
            return mixed, targets
        return batch, torch.nn.functional.one_hot(labels, self.num_labels).float()


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
