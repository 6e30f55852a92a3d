"""The network: ResNet18 (He 2016) with one input channel and one output for each label.

It is torchvision's network, layer for layer and name for name, so torchvision's weights fit it and
a seed gives it the same initial weights (tests compare both). It is defined here because importing
torchvision takes longer than importing torch, and a prediction would wait for it.

Pretrained weights come from torchvision's download or from a file. The RGB kernels of their first
convolution are *summed*: the network then answers to a one-channel image as the original does to
the same image in all three channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ser_ray.errors import CheckpointError

NETWORK_STRIDE = 32
"""Bins, and frames, of the input for every pixel that the network's last stage leaves."""
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
"""torchvision's IMAGENET1K_V1. The name holds the first digits of the file's SHA-256, which are
checked."""
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
COUNTER = "num_batches_tracked"
WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "network.")


class ResNet18(nn.Module):
    """[batch, 1, bins, frames] -> logits [batch, labels], with fresh weights.

    The weights are drawn in torchvision's order, for an RGB network whose first layer is then
    replaced: the same seed gives the same weights as there.
    """

    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512))
        self.fc = nn.Linear(512, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _draw_weights(module)
        self.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
        _draw_weights(self.conv1)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of a batch."""
        maps = F.relu(self.bn1(self.conv1(features)), inplace=True)
        maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(F.adaptive_avg_pool2d(maps, 1).flatten(1))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        # torchvision draws the shortcut's weights before the block's, but names them last.
        downsample: nn.Module | None = None
        if stride > 1:
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(outputs),
            )
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1: nn.Module = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2: nn.Module = nn.BatchNorm2d(outputs)
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        maps = self.bn2(self.conv2(maps))
        return F.relu(maps.add_(shortcut), inplace=True)


def _draw_weights(convolution: nn.Conv2d) -> None:
    # On the meta device there is nothing to draw, but torch would import sympy for it: seconds.
    if not convolution.weight.is_meta:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def to_channels_last(network: ResNet18, device: torch.device) -> ResNet18:
    """Move a network to a device, in the memory layout in which its convolutions are fastest."""
    # torch's stubs lack the argument.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norm(network: ResNet18) -> ResNet18:
    """Multiply each batch norm into the convolution before it (Jacob 2018, section 3.2).

    The result computes the same function up to float rounding, in a fifth less time, and can no
    longer be trained. Changes a network in evaluation mode and returns it.
    """
    for module in list(network.modules()):
        if isinstance(module, (ResNet18, BasicBlock)):
            module.conv1, module.bn1 = _fold(module.conv1, module.bn1), nn.Identity()
        if isinstance(module, BasicBlock):
            module.conv2, module.bn2 = _fold(module.conv2, module.bn2), nn.Identity()
            if module.downsample is not None:
                module.downsample = _fold(*module.downsample.children())
    return network


def _fold(convolution: nn.Module, norm: nn.Module) -> nn.Conv2d:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(convolution, norm)


def supports_bfloat16(device: torch.device, num_bins: int, num_frames: int) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and may train on such inputs in it.

    GPUs and x86 CPUs with AVX512_BF16 or AMX do; others emulate it, which is slow. These CPUs train
    in float32 where the network's last stage leaves a single row or column: for one pixel torch
    2.11 leaves NaN in the weights that meet nothing but padding.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or min(num_bins, num_frames) <= NETWORK_STRIDE:
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Weights to start from: a state dict that fits the network, and a sentence on its origin."""

    origin: str
    state: dict[str, Tensor]


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
    expected = ResNet18(num_labels).state_dict()
    state = _fit(state, expected, origin)
    # Files of before torch 0.4.1 lack the counters, which decide nothing here.
    missing = {key for key in expected.keys() - state.keys() if not key.endswith(COUNTER)}
    fresh = sorted({_layer(key) for key in missing})
    if fresh:
        origin += f"; fresh: {', '.join(fresh)}"
    return Pretrained(origin, state)


def _download_imagenet() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(IMAGENET_URL, progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the ImageNet weights could not be downloaded from {IMAGENET_URL} ({error}): give "
            "--weights PATH with a file of ResNet18 weights, or --weights none to start fresh"
        ) from error


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
