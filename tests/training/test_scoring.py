"""The windows of a clip, and that a clip's score does not depend on the other clips."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.training.data import Clips
from ser_ray.training.model import ResNet18
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.scoring import predict_clips, window_batches, window_starts


@given(st.integers(1, 2000), st.integers(1, 400))
def test_windows_cover_every_frame_and_reach_both_ends(num_frames, crop):
    starts = window_starts(num_frames, crop)
    covered = np.zeros(num_frames, bool)
    for start in starts:
        covered[max(start, 0) : max(start + crop, 0)] = True
    assert covered.all()
    assert len(starts) == max(1, -(-num_frames // crop))
    if num_frames >= crop:
        assert starts[0] == 0
        assert starts[-1] + crop == num_frames


def test_window_batches_contain_every_window_once():
    num_frames = np.array([10, 25, 7])
    batches = list(window_batches(num_frames, np.array([0, 1, 2]), crop_frames=10, batch_size=2))
    pairs = [(int(c), int(s)) for clip, start in batches for c, s in zip(clip, start, strict=True)]
    assert pairs == [(0, 0), (1, 0), (1, 8), (1, 15), (2, -2)]
    assert max(len(clip) for clip, _ in batches) == 2


def test_a_clips_probabilities_are_the_mean_of_its_windows_whatever_else_is_scored():
    torch.manual_seed(0)
    features, lengths = torch.randn(9, 90, 20).half(), torch.randint(5, 91, (9,))
    for clip, length in zip(features, lengths, strict=True):
        clip[length:] = 0
    clips = Clips(features, lengths, torch.zeros(9, dtype=torch.long))
    config, network = TrainConfig(crop_frames=40), ResNet18(3)
    found = predict_clips(network, clips, np.array([7, 2, 4]), config, 3)
    assert network.training
    network.eval()
    for row, probabilities in zip((7, 2, 4), found, strict=True):
        length = int(lengths[row])
        clip = features[row, :length].float().T
        if length <= 40:
            left = (40 - length + 1) // 2
            windows = torch.nn.functional.pad(clip, (left, 40 - length - left))[None]
        else:
            windows = torch.stack([clip[:, s : s + 40] for s in window_starts(length, 40)])
        with torch.no_grad():
            expected = network(windows[:, None]).softmax(dim=1).mean(dim=0)
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_the_windows_of_a_long_clip_have_one_answer():
    """It is the mean over the crops of all its windows, and does not depend on other clips."""
    torch.manual_seed(0)
    features, lengths = torch.randn(5, 60, 20).half(), torch.tensor([60, 60, 30, 40, 20])
    alone = Clips(features, lengths, torch.tensor([0, 0, 1, 2, 2]))
    together = replace(alone, owners=np.array([0, 0, 1, 2, 2]))
    assert list(together.first_rows) == [0, 2, 3]
    config, network = TrainConfig(crop_frames=40), ResNet18(3)
    single = predict_clips(network, alone, np.arange(5), config, 3)
    # Windows 0 and 1 have two crops each, the others one.
    means = [single[:2].mean(axis=0), single[2], single[3:].mean(axis=0)]
    for rows in ([0, 1, 2], [2, 0], [1]):
        found = predict_clips(network, together, np.array(rows), config, 3)
        np.testing.assert_allclose(found, [means[row] for row in rows], atol=1e-6)
