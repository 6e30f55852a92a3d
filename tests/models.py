"""A checkpoint made from scratch, and a small network, for tests that need any of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ser_ray.corpus.ravdess.names import EMOTIONS
from ser_ray.features.config import FeatureConfig
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.training.checkpoint import CARD, MODEL
from ser_ray.training.checkpoint_card import CheckpointCard
from ser_ray.training.data import Normalisation
from ser_ray.training.model import EncoderHead, ResNet18
from ser_ray.training.recipe import TrainConfig

LABELS = EMOTIONS[:4]
FEATURES = FeatureConfig(num_mels=32, num_mfcc=13, hop_length=320, max_seconds=3.0)
CONFIG = TrainConfig(protocol="speaker-3", crop_frames=64, weights="none")


class SmallNetwork(nn.Module):
    """A network with convolutions and batch norm that takes a thousandth of ResNet18's time."""

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 5, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        # Only with several channels in and out do memory formats differ.
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.fc = nn.Linear(8 * 6, num_labels)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        maps = torch.relu(self.norm(self.conv(batch)))
        return self.fc(torch.relu(self.inner(maps)).mean(dim=3).flatten(1))


def make_checkpoint(directory: Path, *, seed: int = 0, **changes: object) -> CheckpointCard:
    """Write an untrained network whose answers differ from clip to clip, and its card."""
    torch.manual_seed(seed)
    network = ResNet18(len(LABELS))
    for name, value in network.named_buffers():  # as after training: no batch norm is the identity
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    torch.nn.init.normal_(network.fc.weight, std=0.3)
    values = {
        "labels": LABELS,
        "config": CONFIG,
        "features": FEATURES,
        "normalisation": Normalisation(np.full(32, -40.0), np.full(32, 20.0)),
        "corpus": "table",
        "shards_fingerprint": "f00d",
        "split": {
            "label": "speaker-3 fold 0 (speaker-independent)",
            "speaker_dependent": False,
            "train_speakers": ["01", "02"],
            "validation_speakers": ["03", "04"],
            "test_speakers": ["05", "06"],
        },
        "initial_weights": "fresh weights",
    } | changes
    card = CheckpointCard(**values)  # type: ignore[arg-type]
    directory.mkdir(parents=True, exist_ok=True)
    save_file(network.state_dict(), directory / MODEL)
    (directory / CARD).write_text(card.to_json())
    return card


def make_encoder_checkpoint(directory: Path, encoder: EncoderCard) -> None:
    """Write an untrained head on an encoder, and its card."""
    torch.manual_seed(0)
    head = EncoderHead(encoder.num_layers, encoder.dim, len(LABELS))
    torch.nn.init.normal_(head.fc.weight, std=1.0)
    make_checkpoint(
        directory,
        config=replace(CONFIG, feature=encoder.name),
        normalisation=Normalisation(np.zeros(encoder.num_values), np.full(encoder.num_values, 0.1)),
        encoder=encoder,
        temperature=0.8,
    )
    save_file(head.state_dict(), directory / MODEL)
