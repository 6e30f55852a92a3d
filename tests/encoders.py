"""Tiny speech encoders of random weights, with the parts of the real families."""

from pathlib import Path
from typing import Any, Literal

import torch
import torchaudio

from ser_ray.features.encoder import EncoderWeights
from ser_ray.features.encoder_card import EncoderCard

Family = Literal["Wav2Vec2", "WavLM"]
FAMILIES: list[tuple[Family, str]] = [
    ("Wav2Vec2", "group_norm"), ("Wav2Vec2", "layer_norm"),
    ("WavLM", "group_norm"), ("WavLM", "layer_norm"),
]  # fmt: skip


def tiny_card(family: Family = "Wav2Vec2", mode: str = "group_norm", **changes: Any) -> EncoderCard:
    """A card of two layers of 16 values; each frame is 25 ms of sound, one every 20 ms."""
    is_large = mode == "layer_norm"
    arguments: dict[str, Any] = {
        "extractor_mode": mode,
        "extractor_conv_layer_config": [[8, 10, 5], [8, 3, 2], [8, 3, 2], [8, 3, 4], [8, 5, 4]],
        "extractor_conv_bias": is_large,
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 2,
        "encoder_num_layers": 2,
        "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 32,
        "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": is_large,
        "encoder_layer_drop": 0.1,
        "aux_num_out": None,
    }
    if family == "WavLM":
        arguments |= {"encoder_num_buckets": 32, "encoder_max_distance": 80}
    values: dict[str, Any] = {
        "name": "tiny", "family": family, "arguments": arguments, "normalises": is_large,
        "licence": "MIT License", "trained_on": "random numbers",
    }  # fmt: skip
    return EncoderCard(**(values | changes))


def torchaudio_model(card: EncoderCard, seed: int = 0) -> Any:
    """The network as torchaudio builds it, with random weights that are all in use."""
    torch.manual_seed(seed)
    build = {"Wav2Vec2": torchaudio.models.wav2vec2_model, "WavLM": torchaudio.models.wavlm_model}
    model = build[card.family](**card.arguments)
    for value in model.parameters():  # norms and biases that are not the identity
        if value.ndim == 1:
            torch.nn.init.normal_(value, 0.5, 0.3)
        else:
            value.data *= 2.0  # clips differ more
    return model.eval()


def tiny_weights(card: EncoderCard | None = None, seed: int = 0) -> EncoderWeights:
    """Weights with their hash in the card."""
    card = card or tiny_card()
    model = torchaudio_model(card, seed)
    return EncoderWeights.from_tensors(card, model.state_dict(), "memory")


def write_tiny(path: Path, card: EncoderCard | None = None, seed: int = 0) -> EncoderCard:
    """Write a tiny encoder's file, and return its card."""
    weights = tiny_weights(card, seed)
    weights.write(path)
    return weights.card
