"""The network: torchvision's ResNet18 with its first and last layers replaced.

One input channel instead of three, one output for each label. Pretrained weights come from
torchvision's download or from a file; the first convolution's RGB kernels are *summed*, so that the
network answers to a one-channel image as the original does to the same image in all three channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet18_Weights, resnet18

from ser_ray.errors import CheckpointError

NETWORK_STRIDE = 32
"""Bins, and frames, of a picture for every pixel that the network's last stage leaves of it."""
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"
WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "network.")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What a network starts from: a state dict that fits it and a sentence on its origin."""

    origin: str
    state: dict[str, Tensor]


def build_network(num_labels: int) -> ResNet:
    """ResNet18 (He 2016) with fresh weights: [batch, 1, bins, frames] -> logits [batch, labels]."""
    network = resnet18(num_classes=num_labels)
    network.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    return network


def read_pretrained(weights: str, num_labels: int) -> Pretrained:
    """Read the weights that `TrainConfig.weights` names.

    Layers that the source lacks start fresh and are named in `origin`; its last layer is always
    replaced, unless it has as many outputs as there are labels.

    Raises:
        CheckpointError: no network for `imagenet`, no such file, not weights, or wrong shapes.
    """
    if weights == "none":
        return Pretrained("fresh weights", {})
    if weights == "imagenet":
        state, origin = _download_imagenet(), "ImageNet (torchvision IMAGENET1K_V1)"
    else:
        state, origin = _read_state(Path(weights).expanduser()), f"weights of {Path(weights).name}"
    expected = build_network(num_labels).state_dict()
    state = _fit(state, expected, origin)
    # Files of before torch 0.4.1 lack the counters, which decide nothing here.
    missing = {key for key in expected.keys() - state.keys() if not key.endswith(COUNTER)}
    fresh = sorted({_layer(key) for key in missing})
    if fresh:
        origin += f"; fresh: {', '.join(fresh)}"
    return Pretrained(origin, state)


def _download_imagenet() -> dict[str, Tensor]:
    url = ResNet18_Weights.IMAGENET1K_V1.url
    try:
        state = torch.hub.load_state_dict_from_url(url, progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the ImageNet weights could not be fetched from {url} ({error}): take "
            "--weights PATH with a file of ResNet18 weights, or --weights none to start fresh"
        ) from error
    return state


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; --weights takes imagenet, none or a file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable weights file ({error})") from error
    for key in WRAPPER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named weights")
    return {_strip(str(k)): v for k, v in content.items() if isinstance(v, Tensor)}


def _strip(key: str) -> str:
    while (prefix := next(filter(key.startswith, WRAPPER_PREFIXES), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def _fit(state: dict[str, Tensor], expected: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Keep what belongs to the network, with the first convolution summed to one channel."""
    state = {key: value for key, value in state.items() if key in expected}
    if not any(key.startswith(("conv1", "layer")) for key in state):
        raise CheckpointError(f"{origin}: holds no layer of a ResNet18 (conv1, layer1, ...)")
    first = state.get("conv1.weight")
    if first is not None and first.shape[1:2] == (3,):
        state["conv1.weight"] = first.sum(dim=1, keepdim=True)
    if state.get("fc.weight") is None or state["fc.weight"].shape != expected["fc.weight"].shape:
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    wrong = [
        f"{key} is {list(value.shape)}, a ResNet18 has {list(expected[key].shape)}"
        for key, value in state.items()
        if value.shape != expected[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{origin}: {len(wrong)} shapes differ: {'; '.join(wrong[:3])}")
    return state


def _layer(key: str) -> str:
    return key.split(".", 1)[0]
