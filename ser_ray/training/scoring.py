"""Clips to probabilities: what validation, evaluation and the loop share."""

import numpy as np
import torch
from torch import nn

from ser_ray.training.config import TrainConfig
from ser_ray.training.data import Clips, window_batches


@torch.inference_mode()
def predict_clips(
    network: nn.Module,
    clips: Clips,
    rows: np.ndarray,
    config: TrainConfig,
    num_labels: int,
) -> np.ndarray:
    """Probabilities of some clips: the mean over the windows that cover each, in float32.

    Args:
        rows: indices of the clips to score [scored].

    Returns:
        float64 [scored, labels], rows summing to 1.
    """
    was_training = network.training
    network.eval()
    device = clips.labels.device
    num_frames = clips.num_frames.cpu().numpy()
    position = np.zeros(len(clips), dtype=np.int64)
    position[rows] = np.arange(len(rows))
    sums = torch.zeros(len(rows), num_labels, dtype=torch.float64, device=device)
    counts = torch.zeros(len(rows), 1, dtype=torch.float64, device=device)
    batch_size = max(config.batch_size, 32)
    # All of them before the first batch: a copy to the device waits for the work that it has.
    batches = [
        [torch.from_numpy(values).to(device) for values in (clip, start, position[clip])]
        for clip, start in window_batches(num_frames, rows, config.crop_frames, batch_size)
    ]
    for clip, start, where in batches:
        batch, _ = clips.crop(clip, start, config.crop_frames)
        logits = network(batch.contiguous(memory_format=torch.channels_last))
        sums.index_add_(0, where, logits.double().softmax(dim=1))
        counts.index_add_(0, where, torch.ones_like(sums[where, :1]))
    network.train(was_training)
    return (sums / counts).cpu().numpy()
