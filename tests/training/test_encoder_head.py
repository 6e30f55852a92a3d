"""A head on the layers of an encoder: the layers that it finds, and what is as for pictures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ser_ray.errors import ConfigError
from ser_ray.training.checkpoint import read_card, read_layer_weights
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import load_fold
from ser_ray.training.model import EncoderHead, require_unseen_labels
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.streaming import resident_bytes
from tests.conftest import make_memory_shards
from tests.encoders import tiny_card
from tests.training.test_trainer import trained

INFORMATIVE = 3
CONFIG = TrainConfig(feature="tiny", protocol="speaker-3", epochs=20, batch_size=8)


def layered_shards(informative=INFORMATIVE, **card):
    """Six layers of 24 values, noise and the speaker's level, of which one knows the emotion."""
    shards = make_memory_shards(speakers=12, per_emotion=4)
    rng = np.random.default_rng(5)
    arguments = tiny_card().arguments | {"encoder_num_layers": 6, "encoder_embed_dim": 24}
    shards.card.encoders = (tiny_card(arguments=arguments, weights="ab" * 32, **card),)
    emotions = [shards.card.labels.index(name) for name in shards.table["emotion"].to_pylist()]
    speakers = np.array(shards.table["speaker"].to_pylist(), float)
    values = rng.normal(0, 0.2, (len(emotions), 6, 24)) + 0.02 * speakers[:, None, None]
    directions = rng.normal(0, 1, (4, 24))
    values[:, informative] += 0.15 * directions[emotions]
    shards.values = values.astype(np.float16)
    return shards


def test_the_head_is_the_weighted_sum_of_layers_and_a_linear_layer():
    torch.manual_seed(0)
    head = EncoderHead(3, 4, num_labels=2)
    with torch.no_grad():
        head.layers.copy_(torch.tensor([0.05, -0.02, 0.0]))
    x = torch.randn(5, 3, 4)
    scaled = np.exp(10 * np.array([0.05, -0.02, 0.0]))
    weights = scaled / scaled.sum()
    np.testing.assert_allclose(head.layer_weights.detach().numpy(), weights, rtol=1e-5)
    mixed = np.einsum("l,bld->bd", weights, x.numpy())
    expected = mixed @ head.fc.weight.detach().numpy().T + head.fc.bias.detach().numpy()
    found = head(x.reshape(5, 1, 12, 1)).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    deep = EncoderHead(3, 4, num_labels=2, num_units=7)
    assert [value.shape for value in deep.parameters() if value.ndim == 2] == [(7, 4), (2, 7)]


@pytest.mark.parametrize("informative", [0, INFORMATIVE])
def test_training_finds_the_layer_that_knows_the_emotion(tmp_path, informative):
    run = trained(layered_shards(informative), tmp_path, CONFIG)
    assert run.reports[-1].row["val/ua"] > 0.8
    directory = tmp_path / "20"
    weights = np.array(read_layer_weights(directory, read_card(directory)))
    assert weights.argmax() == informative
    assert weights[informative] > 2 * np.delete(weights, informative).max()


def test_every_value_of_every_layer_is_normalised_over_the_training_clips():
    shards = layered_shards()
    data = load_fold(shards, CONFIG, torch.device("cpu"))
    raw = shards.values.reshape(len(shards.values), -1)[data.split.train].astype(np.float64)
    np.testing.assert_allclose(data.normalisation.mean, raw.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(data.normalisation.std, raw.std(axis=0), atol=1e-6)
    assert data.train.features.shape == (len(raw), 1, 6 * 24)
    assert data.train.num_frames.unique().tolist() == [1]


def test_streamed_clips_are_the_resident_ones(tmp_path):
    shards = layered_shards()
    rows = [
        trained(shards, tmp_path / name, replace(CONFIG, epochs=2, batch_size=128), stream=stream)
        .reports[-1]
        .row["val/loss"]
        for name, stream in (("stream", map), ("resident", None))
    ]
    assert rows[0] == pytest.approx(rows[1], rel=0.05)
    assert resident_bytes(shards, CONFIG) < shards.values.nbytes


def test_a_hidden_layer_and_a_resumed_training(tmp_path: Path):
    config = replace(CONFIG, epochs=4, head_units=16)
    whole = trained(layered_shards(), tmp_path / "whole", config)
    resumed = trained(layered_shards(), tmp_path / "again", config, resume=tmp_path / "whole/2")
    assert resumed.reports[-1].row["val/loss"] == whole.reports[-1].row["val/loss"]
    card = read_card(tmp_path / "whole/4")
    assert card.encoder == layered_shards().card.encoders[0]
    assert card.network == "a head with 16 hidden units"
    assert card.initial_weights == "fresh weights"
    assert CheckpointCard.from_json(card.to_json()).encoder == card.encoder


def test_other_weights_of_the_encoder_do_not_resume_a_training(tmp_path):
    trained(layered_shards(), tmp_path / "whole", replace(CONFIG, epochs=2))
    other = layered_shards()
    other.card.encoders = (replace(other.card.encoders[0], weights="cd" * 32),)
    with pytest.raises(Exception, match=r"encoder differs: weights is 'abab.*instead of 'cdcd"):
        trained(other, tmp_path / "again", replace(CONFIG, epochs=2), resume=tmp_path / "whole/1")


def test_an_encoder_that_has_seen_the_labels_is_refused_for_new_speakers():
    encoder = tiny_card(labelled=("ravdess", "table"))
    with pytest.raises(ConfigError, match=r"labels of RAVDESS, so .*--allow-seen-labels"):
        require_unseen_labels(CONFIG, encoder, ["ravdess", "synthetic"])
    with pytest.raises(ConfigError, match=r"labels of RAVDESS and a custom corpus, so "):
        require_unseen_labels(CONFIG, encoder, ["table", "ravdess"])
    require_unseen_labels(replace(CONFIG, allow_seen_labels=True), encoder, ["ravdess"])
    require_unseen_labels(replace(CONFIG, protocol="random"), encoder, ["ravdess"])
    require_unseen_labels(CONFIG, encoder, ["synthetic"])
