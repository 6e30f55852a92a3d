"""Computes the probabilities of clips, for validation, evaluation and prediction.

Windows with the length of a training crop cover each row of the shards. A clip that was too long
for one row has several rows. The probabilities of a clip are the mean over the windows of its rows.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ser_ray.training.data import Clips
from ser_ray.training.recipe import TrainConfig

MIN_BATCH_SIZE = 32
"""Smallest number of windows in a full batch, even if the recipe's batch size is smaller."""


@torch.inference_mode()
def predict_clips(
    network: nn.Module,
    clips: Clips,
    selected: np.ndarray,
    recipe: TrainConfig,
    num_labels: int,
) -> np.ndarray:
    """Compute the probabilities of clips: logits in float32, softmax and means in float64.

    Args:
        network: [batch, 1, bins, frames] -> logits [batch, num_labels], on the clips' device.
        clips: all clips.
        selected: indices of the clips to score [scored], as in `clips.owners`.
        recipe: its `window_frames` is the length of a window.
        num_labels: number of the network's outputs.

    Returns:
        float64 [scored, num_labels], whose rows sum to 1.
    """
    was_training = network.training
    network.eval()
    device = clips.labels.device
    owners = np.arange(len(clips)) if clips.owners is None else clips.owners
    position_of_clip = np.full(len(owners), -1, dtype=np.int64)
    position_of_clip[selected] = np.arange(len(selected))
    position = position_of_clip[owners]  # position in `selected` of the clip of each row, or -1
    windows = window_batches(
        clips.num_frames.cpu().numpy(),
        np.flatnonzero(position >= 0),
        recipe.window_frames,
        max(recipe.batch_size, MIN_BATCH_SIZE),
    )
    # Copy all indices before the first batch, because a copy waits for the device's queued work.
    batches = [
        [torch.from_numpy(values).to(device) for values in (rows, starts, position[rows])]
        for rows, starts in windows
    ]
    sums = torch.zeros(len(selected), num_labels, dtype=torch.float64, device=device)
    counts = torch.zeros(len(selected), 1, dtype=torch.float64, device=device)
    for rows, starts, positions in batches:
        batch, _ = clips.crop(rows, starts, recipe.window_frames)
        logits = network(batch.contiguous(memory_format=torch.channels_last))
        sums.index_add_(0, positions, logits.double().softmax(dim=1))
        counts.index_add_(0, positions, torch.ones_like(sums[positions, :1]))
    network.train(was_training)
    return (sums / counts).cpu().numpy()


def window_starts(num_frames: int, crop_frames: int) -> list[int]:
    """Return the first frame of each window that covers a row of `num_frames` valid frames.

    A row that fits into one window is centred in it, so the start is 0 or negative. A longer row is
    covered from its first to its last frame by as few evenly spaced windows as possible.
    """
    surplus = num_frames - crop_frames
    if surplus <= 0:
        return [surplus // 2]
    count = math.ceil(num_frames / crop_frames)
    return [round(index * surplus / (count - 1)) for index in range(count)]


def window_batches(
    num_frames: np.ndarray, rows: np.ndarray, crop_frames: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the windows of the given rows in batches: row and first frame, both int64 [batch].

    Args:
        num_frames: number of valid frames of all rows of the clips.
        rows: the rows to cover.
        crop_frames: length of a window.
        batch_size: largest number of windows in a batch.
    """
    pairs = [
        (row, start) for row in rows for start in window_starts(int(num_frames[row]), crop_frames)
    ]
    for first in range(0, len(pairs), batch_size):
        batch = np.asarray(pairs[first : first + batch_size], dtype=np.int64)
        yield batch[:, 0], batch[:, 1]
