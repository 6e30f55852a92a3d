"""Computes the probabilities of clips, for validation, evaluation and prediction.

A clip is covered by crops as long as a training crop. A clip that was too long for one row of the
shards has several rows, and each row is covered in this way. The probabilities of a clip are the
mean of the probabilities of its crops.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ser_ray.training.data import Clips
from ser_ray.training.recipe import TrainConfig

MIN_BATCH_SIZE = 32
"""Smallest batch of windows, even if the recipe's batches are smaller."""


@torch.inference_mode()
def predict_clips(
    network: nn.Module,
    clips: Clips,
    rows: np.ndarray,
    config: TrainConfig,
    num_labels: int,
) -> np.ndarray:
    """Compute the probabilities of clips: logits in float32, softmax and means in float64.

    Args:
        network: [batch, 1, bins, frames] -> logits [batch, num_labels], on the clips' device.
        clips: all clips.
        rows: numbers of the clips to score [scored]: rows of `clips`, or of their `owners`.
        config: the recipe, whose `window_frames` is the length of a crop.
        num_labels: number of the network's outputs.

    Returns:
        float64 [scored, num_labels], rows summing to 1.
    """
    was_training = network.training
    network.eval()
    device = clips.labels.device
    num_frames = clips.num_frames.cpu().numpy()
    owners = np.arange(len(clips)) if clips.owners is None else clips.owners
    place = np.full(len(owners), -1, dtype=np.int64)
    place[rows] = np.arange(len(rows))
    position = place[owners]  # of each window among the scored clips
    sums = torch.zeros(len(rows), num_labels, dtype=torch.float64, device=device)
    counts = torch.zeros(len(rows), 1, dtype=torch.float64, device=device)
    batch_size = max(config.batch_size, MIN_BATCH_SIZE)
    # Copy all indices before the first batch: a copy to the device waits for its queued work.
    batches = [
        [torch.from_numpy(values).to(device) for values in (clip, start, position[clip])]
        for clip, start in window_batches(
            num_frames, np.flatnonzero(position >= 0), config.window_frames, batch_size
        )
    ]
    for clip, start, where in batches:
        batch, _ = clips.crop(clip, start, config.window_frames)
        logits = network(batch.contiguous(memory_format=torch.channels_last))
        sums.index_add_(0, where, logits.double().softmax(dim=1))
        counts.index_add_(0, where, torch.ones_like(sums[where, :1]))
    network.train(was_training)
    return (sums / counts).cpu().numpy()


def window_starts(num_frames: int, crop_frames: int) -> list[int]:
    """First frames of the windows that cover a clip.

    A clip that fits into one window is centred in it, so the start is 0 or negative. A longer clip
    is covered from end to end by as few evenly spaced windows as possible.
    """
    spare = num_frames - crop_frames
    if spare <= 0:
        return [spare // 2]
    count = -(-num_frames // crop_frames)
    return [round(index * spare / (count - 1)) for index in range(count)]


def window_batches(
    num_frames: np.ndarray, rows: np.ndarray, crop_frames: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (clip, first frame) of all windows of the given clips in batches, int64 [batch] each.

    Args:
        num_frames: valid frames of all clips [clips].
        rows: indices of the clips to cover [rows].
        crop_frames: length of a window.
        batch_size: largest number of windows in a batch.
    """
    pairs = [
        (clip, start)
        for clip in rows
        for start in window_starts(int(num_frames[clip]), crop_frames)
    ]
    for first in range(0, len(pairs), batch_size):
        batch = np.asarray(pairs[first : first + batch_size], dtype=np.int64)
        yield batch[:, 0], batch[:, 1]
