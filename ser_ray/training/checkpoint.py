"""Checkpoints: a directory that describes itself.

    model.safetensors      the network's weights (the averaged ones where averaging is on)
    card.json              what they are: recipe, labels, normalisation, protocol and fold, data
    training_state.pt      what going on needs: optimiser, schedule, progress (weights_only)

A directory is written whole and then handed over to storage; one that lacks a file or does not fit
is refused with the difference named.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.models import ResNet

from ser_ray.errors import CheckpointError
from ser_ray.features.config import FeatureConfig
from ser_ray.training.config import TrainConfig
from ser_ray.training.data import Normalisation
from ser_ray.training.model import build_network

SCHEMA_VERSION = 1
CARD, MODEL, STATE = "card.json", "model.safetensors", "training_state.pt"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointCard:
    """Everything a reader must know of the weights beside it."""

    labels: tuple[str, ...]
    """Label of every output."""
    config: TrainConfig
    """The recipe."""
    features: FeatureConfig
    """How a clip becomes what the network sees."""
    normalisation: Normalisation
    """Applied to the features before the network."""
    corpus: str
    """ravdess, stand-in or table."""
    shards_fingerprint: str
    """Identity of the shard set trained on."""
    split: dict[str, Any]
    """The protocol and fold in words, whether speaker-dependent, the speakers of each side."""
    initial_weights: str
    """Where the network started."""

    @property
    def trained_on(self) -> str:
        """The corpus in words, as it is shown beside every score."""
        return {"ravdess": "RAVDESS", "stand-in": "the synthetic stand-in corpus"}.get(
            self.corpus, "an own corpus"
        )

    def to_json(self) -> str:
        """Serialise."""
        values = asdict(self) | {
            "schema_version": SCHEMA_VERSION,
            "normalisation": {
                "mean": self.normalisation.mean.tolist(),
                "std": self.normalisation.std.tolist(),
            },
        }
        return json.dumps(values, indent=2)

    @classmethod
    def from_json(cls, text: str) -> "CheckpointCard":
        """Read what `to_json` wrote.

        Raises:
            CheckpointError: another schema version.
        """
        values = json.loads(text)
        version = values.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"the card has schema version {version}, this program reads {SCHEMA_VERSION}: "
                "use the ser-ray version that wrote it, or train again"
            )
        normalisation = values.pop("normalisation")
        return cls(
            labels=tuple(values.pop("labels")),
            config=TrainConfig.from_dict(values.pop("config")),
            features=FeatureConfig(**values.pop("features")),
            normalisation=Normalisation(
                np.asarray(normalisation["mean"]), np.asarray(normalisation["std"])
            ),
            **values,
        )

    def require_same(self, other: "CheckpointCard", where: str) -> None:
        """Refuse to go on from a checkpoint of another training.

        Raises:
            CheckpointError: names the first field that differs.
        """
        mine, theirs = json.loads(self.to_json()), json.loads(other.to_json())
        for key in ("labels", "features", "shards_fingerprint", "split", "config"):
            if mine[key] != theirs[key]:
                raise CheckpointError(
                    f"{where}: its {key} is {_short(theirs[key], mine[key])}; give the run another "
                    "--name to start afresh, or restore what it was trained with"
                )


def write_checkpoint(
    directory: Path, card: CheckpointCard, weights: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write a whole checkpoint into an existing directory."""
    save_file({key: value.contiguous() for key, value in weights.items()}, directory / MODEL)
    torch.save(state, directory / STATE)
    (directory / CARD).write_text(card.to_json())


def read_card(directory: Path) -> CheckpointCard:
    """Read a checkpoint's card.

    Raises:
        CheckpointError: no checkpoint there, or its card cannot be read.
    """
    path = directory / CARD
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: no checkpoint here (no {CARD}); ser-ray train writes one and prints "
            "where it is"
        )
    try:
        return CheckpointCard.from_json(path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint's card ({error})") from error


def read_network(directory: Path, card: CheckpointCard) -> ResNet:
    """Build the network of a checkpoint, in evaluation mode, on the CPU.

    Raises:
        CheckpointError: the weights are missing, broken or another network's.
    """
    network = build_network(len(card.labels))
    try:
        network.load_state_dict(load_file(directory / MODEL))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory / MODEL}: cannot be loaded ({reason})") from error
    return network.eval()


def read_state(directory: Path) -> dict[str, Any]:
    """Read what a training needs to go on, the network's own weights included, on the CPU.

    Raises:
        CheckpointError: missing or broken.
    """
    path = directory / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state["network"] is None:
            state["network"] = load_file(directory / MODEL)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    return state


def _short(theirs: Any, mine: Any) -> str:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = [key for key in mine if theirs.get(key) != mine[key]]
        return ", ".join(f"{key} {theirs.get(key)!r} instead of {mine[key]!r}" for key in names[:3])
    return f"{theirs!r} instead of {mine!r}"
