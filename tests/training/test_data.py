"""Crops, normalisation, the order of an epoch, and each augmentation against a known answer."""

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ser_ray.features.config import FeatureConfig, Kind
from ser_ray.training.augment import Augment, gain_response
from ser_ray.training.data import (
    Clips,
    Normalisation,
    epoch_order,
    frame_sums,
    load_fold,
    sampling_weights,
    seed_of,
    steps_per_epoch,
)
from ser_ray.training.parts import select_rows
from ser_ray.training.recipe import TrainConfig
from tests.conftest import PLAIN, cut_into_windows, make_memory_shards

CPU = torch.device("cpu")
FEATURES = FeatureConfig()


def plain(crop_frames: int, feature: Kind = "mel", **augment: Any) -> TrainConfig:
    """A recipe with only the given augmentations."""
    changed = dataclasses.replace(PLAIN, **({"random_crop": False} | augment))
    return TrainConfig(crop_frames=crop_frames, feature=feature, augment=changed)


def unit(num_bins: int) -> Normalisation:
    """A normalisation that changes nothing."""
    return Normalisation(np.zeros(num_bins), np.ones(num_bins))


def ramp_clips() -> Clips:
    """Two clips of 5 and 9 frames and 3 bins, whose values are the frame's index plus one."""
    raw = np.tile(np.arange(1, 10, dtype=np.float32), (2, 3, 1))
    return Clips.resident(raw, np.array([5, 9]), np.array([0, 1]), unit(3), CPU)


def test_a_crop_is_cut_from_the_clip_and_padded_beyond_it():
    crops, valid = ramp_clips().crop(torch.tensor([0, 1]), torch.tensor([-1, 6]), 4)
    assert crops.shape == (2, 1, 3, 4)
    assert crops[0, 0, 0].tolist() == [0, 1, 2, 3]
    assert crops[1, 0, 2].tolist() == [7, 8, 9, 0]
    assert valid[1, 0, 0].tolist() == [True, True, True, False]


def test_normalisation_is_measured_over_the_valid_frames():
    rng = np.random.default_rng(0)
    features = rng.normal(5, 3, (4, 6, 20)).astype(np.float32)
    lengths = np.array([20, 3, 11, 8])
    valid = np.concatenate([clip[:, :n] for clip, n in zip(features, lengths, strict=True)], axis=1)
    measured = Normalisation.from_sums(frame_sums(features, lengths), lengths.sum())
    np.testing.assert_allclose(measured.mean, valid.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(measured.std, valid.std(axis=1), rtol=1e-4)


def test_normalisation_reads_training_rows_only(memory_shards):
    config = TrainConfig(protocol="speaker-3")
    before = load_fold(memory_shards, config, CPU)
    rows = np.concatenate([before.split.validation, before.split.test])
    memory_shards.values[rows] += 100
    after = load_fold(memory_shards, config, CPU)
    np.testing.assert_array_equal(before.normalisation.mean, after.normalisation.mean)


def test_rows_do_not_depend_on_the_order_of_the_shards(memory_shards):
    config = TrainConfig(protocol="speaker-3")
    shuffled = np.random.default_rng(0).permutation(len(memory_shards.table))
    table = memory_shards.table
    again = table.take(shuffled)
    for side in ("train", "validation", "test"):
        one = table["take"].take(getattr(select_rows(table, config), side))
        two = again["take"].take(getattr(select_rows(again, config), side))
        assert one.to_pylist() == two.to_pylist()


@given(st.integers(0, 5), st.integers(0, 5), st.integers(1, 80))
def test_the_order_of_an_epoch_is_a_reproducible_permutation(seed, epoch, rows):
    order = epoch_order(seed, epoch, rows)
    assert sorted(order.tolist()) == list(range(rows))
    assert torch.equal(order, epoch_order(seed, epoch, rows))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"a sad": 600, "a calm": 300, "b sad": 100}),
        ({"balanced": True}, {"a sad": 600 / 1.4, "a calm": 500, "b sad": 100 / 1.4}),
        ({"corpus_balance": 1.0}, {"a sad": 1000 / 3, "a calm": 500 / 3, "b sad": 500}),
        ({"corpus_balance": 0.5}, {"a sad": 500, "a calm": 250, "b sad": 250}),
    ],
)
def test_an_epoch_draws_labels_and_corpora_as_often_as_the_recipe_says(settings, expected):
    """900 clips of corpus a and 100 of b: with the balance 0.5, a has 30 of 40 parts."""
    kinds = np.repeat(list(expected), [600, 300, 100])
    corpora, _, emotions = np.char.partition(kinds, " ").T
    table = pa.table([corpora, emotions], ["corpus", "emotion"])
    weights = sampling_weights(table, TrainConfig(**settings))
    drawn = [kinds[epoch_order(0, epoch, 1000, weights).numpy()] for epoch in range(40)]
    for kind, count in expected.items():
        mean = np.mean(np.stack(drawn) == kind) * 1000
        assert mean == pytest.approx(count, abs=15 if settings else 1e-9)


def test_labels_and_corpora_are_balanced_together():
    counts = {"a sad": 500, "a calm": 100, "b calm": 100, "b happy": 20}
    kinds = np.repeat(list(counts), list(counts.values()))
    corpora, _, emotions = np.char.partition(kinds, " ").T
    table = pa.table([corpora, emotions], ["corpus", "emotion"])
    weights = sampling_weights(table, TrainConfig(balanced=True, corpus_balance=1.0))
    assert weights is not None
    shares = (weights / weights.sum()).numpy()
    for names in (corpora, emotions):
        found = [shares[names == name].sum() for name in np.unique(names)]
        np.testing.assert_allclose(found, 1 / len(found), atol=1e-3)


def test_a_part_names_only_the_speakers_of_its_channel():
    clips = make_memory_shards(speakers=12).table
    silent = pc.and_(pc.equal(clips["speaker"], "02"), pc.equal(clips["channel"], "speech"))
    clips = clips.set_column(
        clips.schema.get_field_index("channel"), "channel", pc.if_else(silent, "song", "speech")
    )
    for fold in range(3):
        parts = select_rows(
            clips, TrainConfig(protocol="speaker-3", fold=fold, train_channel="speech")
        )
        named = parts.train_speakers + parts.validation_speakers + parts.test_speakers
        assert sorted(named) == [f"{n:02d}" for n in range(1, 13) if n != 2]


def test_seeds_of_different_steps_differ():
    assert len({seed_of(s, e, k) for s in range(4) for e in range(20) for k in range(50)}) == 4000


@pytest.mark.parametrize(("rows", "batch", "steps"), [(100, 32, 3), (32, 32, 1), (5, 32, 1)])
def test_steps_per_epoch(rows, batch, steps):
    assert steps_per_epoch(rows, batch) == steps


def test_without_augmentation_the_batch_is_the_plain_crop():
    clips = ramp_clips()
    batch, targets = Augment(plain(9), FEATURES, 2, unit(3), CPU)(clips, torch.tensor([1]))
    assert batch[0, 0, 0].tolist() == list(range(1, 10))
    assert targets.tolist() == [[0, 1]]


@pytest.mark.parametrize(("crop", "first", "last"), [(5, 3, 7), (3, 4, 6), (13, 0, 0)])
def test_without_random_crop_clips_are_centred(crop, first, last):
    augment = Augment(plain(crop), FEATURES, 2, unit(3), CPU)
    batch, _ = augment(ramp_clips(), torch.tensor([1, 1, 1, 1]))
    assert batch[:, 0, 0, 0].tolist() == [first] * 4
    assert batch[:, 0, 0, -1].tolist() == [last] * 4


def test_gain_raises_every_bin_of_the_valid_frames_by_its_response():
    torch.manual_seed(0)
    response, scaled = (
        torch.tensor([1.0, 0.5, 0.25]),
        Normalisation(np.zeros(3), np.array([1, 2, 4])),
    )
    clips, rows = ramp_clips(), torch.zeros(64, dtype=torch.long)
    quiet, _ = Augment(plain(9), FEATURES, 2, scaled, CPU)(clips, rows)
    loud, _ = Augment(plain(9, gain_db=6.0), FEATURES, 2, scaled, CPU)(clips, rows)
    gain = (loud - quiet)[:, 0, :, 2:7]  # its five frames lie in the middle
    torch.testing.assert_close(gain, gain[:, :1, :1] * response[:, None].expand(3, 5))
    assert gain[:, 0, 0].min() == pytest.approx(-6, abs=0.6)
    assert gain[:, 0, 0].max() == pytest.approx(6, abs=0.6)
    assert torch.equal(loud[..., :2], quiet[..., :2])


def test_mix_style_moves_a_bin_to_another_clips_mean_and_spread():
    torch.manual_seed(0)
    raw = torch.randn(2, 3, 40) * torch.tensor([1.0, 3.0])[:, None, None] + torch.tensor(
        [[-5.0, 0.0, 2.0], [4.0, 1.0, 2.0]]
    ).unsqueeze(2)
    lengths = np.array([40, 30])
    clips = Clips.resident(raw.numpy(), lengths, np.array([0, 1]), unit(3), CPU)
    rows = torch.tensor([0, 1])
    before = clips.crop(rows, torch.zeros(2, dtype=torch.long), 40)[0][:, 0]
    augment = Augment(plain(40, mix_style=1.0), FEATURES, 2, unit(3), CPU)
    for _ in range(20):
        after, targets = augment(clips, rows)
        after = after[:, 0]
        assert targets.tolist() == [[1, 0], [0, 1]]
        after[1] = after[1].roll(-5, dims=1)  # the shorter clip lies in the middle
        assert (after[1, :, 30:] == 0).all()
        for one, length in enumerate(lengths):
            x, y = before[one, :, :length], after[one, :, :length]
            other = before[1 - one, :, : lengths[1 - one]]
            # Every bin has the same course over time, and the same share of the other clip.
            torch.testing.assert_close(
                (y - y.mean(1, keepdim=True)) / y.std(1, keepdim=True),
                (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),
                atol=1e-2,
                rtol=0,
            )
            shares = (y.mean(1) - x.mean(1)) / (other.mean(1) - x.mean(1))
            assert shares[:2] == pytest.approx(float(shares[0]), abs=1e-2)
            assert -1e-3 <= float(shares[0]) <= 1.001
    known = dataclasses.replace(plain(40, mix_style=1.0), protocol="random")
    unmixed, _ = Augment(known, FEATURES, 2, unit(3), CPU)(clips, rows)
    assert torch.equal(unmixed[0, 0], before[0])


def test_masks_zero_frames_and_bins():
    torch.manual_seed(0)
    ones = Clips(torch.ones(1, 40, 20).half(), torch.tensor([40]), torch.tensor([0]))
    rows = torch.zeros(200, dtype=torch.long)
    in_time, _ = Augment(plain(40, time_masks=1, time_mask_frames=10), FEATURES, 2, unit(20), CPU)(
        ones, rows
    )
    in_bins, _ = Augment(plain(40, freq_masks=1, freq_mask_share=0.5), FEATURES, 2, unit(20), CPU)(
        ones, rows
    )
    frames, bins = (in_time == 0).sum(3)[:, 0], (in_bins == 0).sum(2)[:, 0]
    assert (frames == frames[:, :1]).all()  # whole frames
    assert 5 < frames.max() < 10
    assert (bins == bins[:, :1]).all()
    assert 5 < bins.max() < 10


def test_the_seed_determines_the_augmentation():
    config = TrainConfig(
        crop_frames=6,
        augment=dataclasses.replace(
            PLAIN,
            mix_style=0.5,
            gain_db=6,
            time_masks=2,
            time_mask_frames=3,
            freq_masks=2,
            mixup=0.2,
        ),
    )
    augment = Augment(config, FEATURES, 2, unit(3), CPU)
    clips, rows = ramp_clips(), torch.tensor([0, 1, 1, 0])

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return augment(clips, rows)[0]

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_mixup_is_torchvisions_bit_for_bit():
    from torchvision.transforms.v2 import MixUp

    clips = Clips(torch.randn(4, 5, 2), torch.full((4,), 5), torch.tensor([0, 1, 2, 1]))
    rows = torch.arange(4)
    torch.manual_seed(1)
    plain_batch, _ = Augment(plain(5), FEATURES, 3, unit(2), CPU)(clips, rows)
    torch.manual_seed(1)
    mixed, targets = Augment(plain(5, mixup=0.2), FEATURES, 3, unit(2), CPU)(clips, rows)
    torch.manual_seed(1)
    Augment(plain(5), FEATURES, 3, unit(2), CPU)(clips, rows)  # what is drawn before the weight
    expected = MixUp(alpha=0.2, num_classes=3)(plain_batch, clips.labels)
    assert torch.equal(mixed, expected[0])
    assert torch.equal(targets, expected[1])


def test_mixup_mixes_targets_as_it_mixes_clips():
    torch.manual_seed(0)
    clips = Clips(
        torch.tensor([0.0, 1.0]).reshape(2, 1, 1).repeat(1, 4, 2).half(),
        torch.tensor([4, 4]),
        torch.tensor([0, 1]),
    )
    batch, targets = Augment(plain(4, mixup=1.0), FEATURES, 2, unit(2), CPU)(
        clips, torch.tensor([0, 1])
    )
    # Clip 1 is all ones and clip 0 all zeros: a pixel is the weight of label 1.
    torch.testing.assert_close(batch[:, 0, 0, 0], targets[:, 1])
    assert 0 < targets[0, 1] < 1


@pytest.mark.parametrize("kind", ["mel", "mfcc"])
def test_gain_response_equals_the_difference_of_a_louder_recording(kind):
    import torchaudio

    rng = np.random.default_rng(0)
    wave = torch.from_numpy(rng.normal(0, 0.1, 16_000).astype(np.float32))
    mel_power = torchaudio.transforms.MelSpectrogram(16_000, n_fft=640, n_mels=40)(wave)
    louder = 10 * torch.log10(mel_power * 10**0.3)  # 3 dB
    plain = 10 * torch.log10(mel_power)
    if kind == "mfcc":
        dct = torchaudio.functional.create_dct(13, 40, "ortho").T
        louder, plain = dct @ louder, dct @ plain
    std = np.full(len(plain), 2.0)
    features, normalisation = FeatureConfig(num_mels=40, num_mfcc=13), Normalisation(std, std)
    response = gain_response(kind, features, normalisation, CPU)
    expected = ((louder - plain) / 2.0).mean(dim=1)
    torch.testing.assert_close(3 * response, expected, atol=1e-3, rtol=1e-3)


def test_a_long_clip_trains_as_windows_and_is_scored_once():
    memory: Any = make_memory_shards()
    config = TrainConfig(protocol="speaker-3", crop_frames=8)
    uncut = load_fold(memory, config, CPU)
    times = np.where(np.arange(len(memory.table)) % 3 == 0, 3, 1)  # windows of each clip
    rows = np.repeat(np.arange(len(memory.table)), times)
    cut: Any = cut_into_windows(memory, times)
    data = load_fold(cut, config, CPU)
    assert len(data.train) == times[uncut.split.train].sum()
    assert list(rows[data.split.validation]) == list(uncut.split.validation)
    assert list(rows[data.split.test]) == list(uncut.split.test)
    assert set(cut.table["window"].take(data.split.test).to_pylist()) == {0}
    assert len(data.validation) == times[uncut.split.validation].sum()
    first = data.validation.first_rows
    assert len(first) == len(uncut.validation)
    torch.testing.assert_close(data.validation.labels[first], uncut.validation.labels)
