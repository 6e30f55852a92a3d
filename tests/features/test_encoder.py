"""Pretrained encoders against torchaudio's own `extract_features`, and files of weights."""

import json
import pickle
import re
from dataclasses import asdict, fields, replace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchaudio
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ser_ray.errors import ConfigError, EncoderError
from ser_ray.features.bundles import bundle_card, bundle_names
from ser_ray.features.encoder import (
    MAX_BATCH_SECONDS,
    EncoderWeights,
    batches_by_length,
    hash_of,
)
from ser_ray.features.encoder_card import METADATA, EncoderCard
from tests.clips import voice
from tests.encoders import FAMILIES, tiny_card, tiny_weights, torchaudio_model, write_tiny


def waves(*seconds):
    return [voice(length, 16_000, seed) * (1 + seed) for seed, length in enumerate(seconds)]


def expected(card, wave):
    """The means of torchaudio's layers for a clip by itself, [layers, dim]."""
    tensor = torch.from_numpy(wave)[None]
    if card.normalises:  # as torchaudio's bundles do
        tensor = F.layer_norm(tensor, tensor.shape)
    with torch.inference_mode():
        layers, _ = torchaudio_model(card).extract_features(tensor)
    return torch.cat([layer.mean(dim=1) for layer in layers]).numpy()


@pytest.mark.parametrize(("family", "mode"), FAMILIES)
def test_a_clip_has_the_values_of_torchaudio(family, mode):
    card = tiny_card(family, mode)
    wave = waves(1.3)[0]
    values = tiny_weights(card).build().encode([wave])
    assert values.shape == (1, 2, 16)
    np.testing.assert_allclose(values[0], expected(card, wave), atol=2e-6)
    assert np.abs(values[0, 0] - values[0, 1]).max() > 0.01


@pytest.mark.parametrize(("family", "mode"), FAMILIES)
def test_a_clip_of_a_padded_batch_has_the_values_of_torchaudio_for_it_alone(
    family, mode, monkeypatch
):
    monkeypatch.setitem(MAX_BATCH_SECONDS, "cpu", 60)  # as on a GPU
    card = tiny_card(family, mode)
    clips = waves(1.1, 0.4, 2.0, 0.41)
    values = tiny_weights(card).build().encode(clips)
    for row, wave in zip(values, clips, strict=True):
        np.testing.assert_allclose(row, expected(card, wave), atol=5e-6)


def test_each_bundle_of_torchaudio_is_described():
    assert {"wavlm_base_plus", "hubert_large", "wav2vec2_xlsr_300m"} <= set(bundle_names())
    for name in bundle_names():
        bundle, card = getattr(torchaudio.pipelines, name.upper()), bundle_card(name)
        assert (card.family, card.normalises) == (bundle._model_type, bundle._normalize_waveform)
    assert (card.num_layers, card.dim) == (24, 1024)


def test_the_table_of_bundles_says_what_their_docstrings_say():
    kind = torchaudio.pipelines.Wav2Vec2Bundle
    bundles = {name: getattr(torchaudio.pipelines, name) for name in torchaudio.pipelines.__all__}
    bundles = {name.lower(): item for name, item in bundles.items() if isinstance(item, kind)}
    assert sorted(bundle_names()) == sorted(bundles)
    for name, bundle in bundles.items():
        card, text = bundle_card(name), " ".join(bundle.__doc__.split())
        text = text.replace("10k hours", "10,000 hours").replace("31K hours", "31,000 hours")
        for fact in re.findall(r"[\d,]+(?: hours)?|[A-Z][\w-]+(?: [A-Z]\w+)*", card.trained_on):
            assert fact in text, name
        assert ("fine-tuned for ASR" in text) == ("speech recognition" in card.trained_on), name
        assert "MIT License" in text if card.licence == "MIT License" else "NC 4.0" in text, name


def test_torchaudio_has_the_private_names_that_bundles_are_read_by():
    """If this fails after an upgrade, correct `ser_ray.features.bundles`, which alone uses them."""
    names = {item.name for item in fields(torchaudio.pipelines.Wav2Vec2Bundle)}
    assert names >= {"_model_type", "_params", "_normalize_waveform", "_path"}


def test_a_file_of_this_module_is_whole(tmp_path):
    card = write_tiny(tmp_path / "tiny.safetensors", tiny_card(labelled=("ravdess",)))
    read = EncoderWeights.read(str(tmp_path / "tiny.safetensors"))
    assert read.card == card
    assert read.card.labelled == ("ravdess",)
    named = EncoderWeights.load(f"mine={tmp_path}/tiny.safetensors")
    assert named.card == replace(card, name="mine")
    np.testing.assert_array_equal(named.build().encode(waves(1)), read.build().encode(waves(1)))
    with pytest.raises(ConfigError, match="its name must have lower-case"):
        EncoderWeights.load(f"My-Own={tmp_path}/tiny.safetensors")


def test_weights_of_a_bundle_come_from_a_file_or_the_cache_of_torchaudio(tmp_path, monkeypatch):
    """With a head, older names and torchaudio's wrapper around them, they are the same weights."""
    arguments = tiny_card().arguments | {"aux_num_out": 5}
    small = replace(torchaudio.pipelines.HUBERT_BASE, _params=arguments)
    monkeypatch.setattr(torchaudio.pipelines, "HUBERT_BASE", small)
    state = torchaudio_model(tiny_card(arguments=arguments)).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / small._path)  # as if downloaded
    renamed = {"original0": "weight_g", "original1": "weight_v"}
    old = {
        "model." + key.replace("parametrizations.weight.", "").replace(last, renamed[last])
        if (last := key.rpartition(".")[2]) in renamed
        else "model." + key: value
        for key, value in state.items()
    }
    assert any(key.endswith("conv.weight_g") for key in old)
    torch.save(old, tmp_path / "hubert.pth")
    found = EncoderWeights.load(f"hubert_base={tmp_path}/hubert.pth")
    same = EncoderWeights.from_tensors(tiny_card(), state, "memory")
    assert found.card.weights == same.card.weights
    assert found.card.licence == "MIT License"
    assert EncoderWeights.load("hubert_base").card == found.card


def test_pickled_it_is_arrays_that_encode_alike():
    encoder = tiny_weights().build()
    buffers: list[pickle.PickleBuffer] = []
    content = pickle.dumps(encoder, protocol=5, buffer_callback=buffers.append)
    assert len(content) < 10_000 < sum(buffer.raw().nbytes for buffer in buffers)
    copies = [bytes(buffer.raw()) for buffer in buffers]  # read-only, as those of Ray
    copy = pickle.loads(content, buffers=copies)
    np.testing.assert_array_equal(copy.encode(waves(1)), encoder.encode(waves(1)))


def test_batches_hold_clips_of_about_equal_length():
    lengths = np.array([5, 40, 10, 9, 10, 100, 8])
    batches = [rows.tolist() for rows in batches_by_length(lengths, 40)]
    assert batches == [[0, 6, 3, 2], [4], [1], [5]]
    assert list(batches_by_length(np.array([], int), 40)) == []


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"encoder is wavlm: .*wavlm_base_plus.*NAME=FILE"):
        EncoderWeights.load("wavlm")


def test_without_a_network_the_error_names_the_file_to_fetch(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(EncoderError, match=r"cannot be downloaded.*wavlm_base_plus\.pth"):
        EncoderWeights.load("wavlm_base_plus")


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save(torchaudio_model(tiny_card()).state_dict(), tmp_path / "tiny.pth")
    with pytest.raises(EncoderError, match=r"tiny\.pth: does not hold the weights of hubert_base"):
        EncoderWeights.load(f"hubert_base={tmp_path}/tiny.pth")


def test_changed_weights_do_not_have_the_hash_of_the_card(tmp_path):
    path = tmp_path / "tiny.safetensors"
    card = write_tiny(path)
    tensors = load_file(path)
    tensors[next(iter(tensors))][0] += 1
    save_file(tensors, path, metadata={METADATA: json.dumps(asdict(card))})
    with pytest.raises(EncoderError, match=rf"hash {hash_of(tensors)[:16]}.*{card.weights[:16]}"):
        EncoderWeights.read(str(path))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_what_is_not_weights_is_an_error(tmp_path, suffix):
    path = tmp_path / f"bad.{suffix}"
    with pytest.raises(EncoderError, match="no such file"):
        EncoderWeights.load(f"hubert_base={path}")
    path.write_bytes(b"\x00" * 100)
    for name in ("hubert_base", "mine"):
        with pytest.raises(EncoderError, match="not a readable file of weights"):
            EncoderWeights.load(f"{name}={path}")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(EncoderError, match="is not an encoder file"):
        EncoderWeights.read(str(tmp_path / "other.safetensors"))


def test_an_encoder_that_does_not_fit_is_refused_before_its_weights_are_fetched(monkeypatch):
    monkeypatch.setattr("ser_ray.features.encoder.available_memory", lambda: 2 * 10**9)
    monkeypatch.setattr("ser_ray.features.encoder.download", lambda _: pytest.fail("fetched"))
    with pytest.raises(EncoderError, match=r"wavlm_large needs 2\.5 GB .* 2\.0 GB free"):
        EncoderWeights.load("wavlm_large")


def test_a_card_that_no_constructor_takes_is_an_error():
    arguments = tiny_card().arguments | {"encoder_num_heads": 3}
    with pytest.raises(EncoderError, match="cannot be built by torchaudio"):
        EncoderWeights.from_tensors(tiny_card(arguments=arguments), {}, "memory")
    for size in (10**6, 0, float("inf"), "16"):
        arguments = tiny_card().arguments | {"encoder_embed_dim": size}
        with pytest.raises(ConfigError, match="both must be whole numbers"):
            EncoderCard.from_dict(asdict(tiny_card(arguments=arguments)))
