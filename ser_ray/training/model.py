"""The networks and their initial weights: ResNet18 (He 2016), and a head on a speech encoder.

ResNet18 has one input channel, and one output for each label. Its layers and their names are those
of torchvision, so torchvision's weights fit it, and a seed draws the same initial weights (tests
compare both). It is defined here because the import of torchvision, which takes longer than that of
torch, would delay every prediction.

Pretrained weights are downloaded from torchvision or read from a file. The RGB kernels of the first
convolution are *summed*. For a one-channel image, the network then has the output that the original
has for the same image in all three channels.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ser_ray.corpus.folds import ALL
from ser_ray.corpus.words import CORPORA, CorpusKind
from ser_ray.errors import CheckpointError, ConfigError
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.storage.tensors import read_tensors
from ser_ray.training.data import seed_of
from ser_ray.training.recipe import TrainConfig

NETWORK_STRIDE = 32
"""One pixel in the output of the last stage stands for this many bins and frames of the input."""
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
"""torchvision's IMAGENET1K_V1. The name contains the first digits of the file's SHA-256, which the
download checks."""
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which other programs store the weights in a file."""
WRAPPER_PREFIXES = re.compile(r"^((module|model|_orig_mod|backbone|network)\.)+")
"""Prefixes that wrappers of a network put before the names of its weights."""
LAYER_SCALE = 10.0
"""The trained parameters are multiplied by this factor before the softmax that gives the weights of
the encoder's layers, so that an optimiser step changes these weights more."""

N = TypeVar("N", bound=nn.Module)


class ResNet18(nn.Module):
    """Maps features [batch, 1, bins, frames] to logits [batch, labels].

    The constructor first draws torchvision's weights for RGB images, and then replaces the first
    layer by one for a single channel. All other weights of a seed are then those of torchvision.
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
        """Return the logits of a batch."""
        maps = F.relu(self.bn1(self.conv1(features)), inplace=True)
        maps = F.max_pool2d(maps, kernel_size=3, stride=2, padding=1)
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.fc(F.adaptive_avg_pool2d(maps, 1).flatten(1))


class EncoderHead(nn.Module):
    """Maps the layers of an encoder [batch, 1, layers * dim, 1] to logits [batch, labels].

    The encoder is frozen. The head computes a sum of the encoder's layers, weighted by the softmax
    of one trained parameter for each layer (as in SUPERB, Yang 2021). If `num_units` is above 0, a
    hidden layer follows. A linear layer computes the logits.
    """

    def __init__(self, num_layers: int, dim: int, num_labels: int, num_units: int = 0) -> None:
        super().__init__()
        self.shape = num_layers, dim
        self.layers = nn.Parameter(torch.zeros(num_layers))
        self.hidden: nn.Module = nn.Identity()
        if num_units:
            self.hidden = nn.Sequential(nn.Linear(dim, num_units), nn.ReLU())
        self.fc = nn.Linear(num_units or dim, num_labels)

    @property
    def layer_weights(self) -> Tensor:
        """Weight of each layer [layers]; they sum to 1."""
        return (LAYER_SCALE * self.layers).softmax(dim=0)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of a batch."""
        mixed = (features.reshape(-1, *self.shape) * self.layer_weights[:, None]).sum(dim=1)
        return self.fc(self.hidden(mixed))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, and a shortcut around both."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        # As in torchvision, the shortcut's weights are drawn first, but are the last in the module.
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
        """Map [batch, inputs, height, width] to [batch, outputs, height/stride, width/stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = F.relu(self.bn1(self.conv1(maps)), inplace=True)
        maps = self.bn2(self.conv2(maps))
        return F.relu(maps.add_(shortcut), inplace=True)


def _draw_weights(convolution: nn.Conv2d) -> None:
    # On the meta device there is nothing to draw, and the call would import sympy for seconds.
    if not convolution.weight.is_meta:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def to_channels_last(network: N, device: torch.device) -> N:
    """Move a network to a device, in the memory layout with the fastest convolutions."""
    # The type stubs of torch lack this argument.
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fold_batch_norm(network: ResNet18) -> ResNet18:
    """Merge each batch norm with the convolution before it (Jacob 2018, section 3.2).

    The network must be in evaluation mode. It is changed in place: it computes the same function up
    to rounding, takes a fifth less time, and has no batch norm, so it should not be trained
    further.
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
    """Return whether to train on inputs of this size in bfloat16 on this device.

    Many GPUs, and x86 CPUs with AVX512_BF16 or AMX, multiply bfloat16 in hardware. All other CPUs
    are treated as too slow, although some ARM CPUs also multiply bfloat16. If the output of the
    last stage is a single row or column, all CPUs train in float32, because torch 2.11 computes NaN
    gradients for kernels that cover only padding.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or min(num_bins, num_frames) <= NETWORK_STRIDE:
        return False
    # torch before 2.11 has no function for the capabilities of a CPU.
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@dataclass(frozen=True, slots=True)
class Pretrained:
    """Initial weights by name, and their origin in words. Missing weights are drawn at random."""

    origin: str
    state: dict[str, Tensor]


FRESH = Pretrained("fresh weights", {})


def new_network(
    num_labels: int, encoder: EncoderCard | None, head_units: int
) -> ResNet18 | EncoderHead:
    """Build a head on the encoder, or a ResNet18 if there is no encoder, with random weights."""
    if encoder is None:
        return ResNet18(num_labels)
    return EncoderHead(encoder.num_layers, encoder.dim, num_labels, head_units)


def build_network(
    recipe: TrainConfig,
    pretrained: Pretrained,
    num_labels: int,
    device: torch.device,
    encoder: EncoderCard | None = None,
) -> ResNet18 | EncoderHead:
    """Build a network on a device. Weights that `pretrained` lacks are drawn from the seed."""
    torch.manual_seed(seed_of(recipe.seed))
    network = new_network(num_labels, encoder, recipe.head_units)
    network.load_state_dict(network.state_dict() | pretrained.state)
    return to_channels_last(network, device)


def require_unseen_labels(
    recipe: TrainConfig, encoder: EncoderCard, kinds: Iterable[CorpusKind]
) -> None:
    """Raise if new speakers are tested with an encoder that was trained with labels of the corpora.

    Args:
        recipe: the recipe. Its protocol decides whether new speakers are tested.
        encoder: the encoder.
        kinds: the kind of each corpus in the shards.

    Raises:
        ConfigError: the encoder may have seen the test speakers.
    """
    seen = sorted(CORPORA[kind] for kind in {*kinds} & {*encoder.labelled})
    if seen and recipe.protocol not in ("random", ALL) and not recipe.allow_seen_labels:
        raise ConfigError(
            f"feature is {encoder.name}: this encoder was trained with labels of "
            f"{' and '.join(seen)}, so {recipe.protocol} may test speakers that it has seen; "
            "choose another encoder, or give --allow-seen-labels"
        )


def read_pretrained(weights: str, num_labels: int) -> Pretrained:
    """Read the weights that `TrainConfig.weights` names.

    The last layer is left out if its number of outputs is not the number of labels. `origin` names
    the layers that are missing, which get fresh weights.

    Raises:
        CheckpointError: the ImageNet weights cannot be downloaded, or the file does not exist,
            holds no weights, or holds weights of other shapes.
    """
    if weights == "none":
        return FRESH
    if weights == "imagenet":
        state, origin = _download_imagenet(), "ImageNet (torchvision IMAGENET1K_V1)"
    else:
        state, origin = _read_state(Path(weights).expanduser()), f"weights of {Path(weights).name}"
    expected = ResNet18(num_labels).state_dict()
    state = _fit(state, expected, origin)
    # Files from before torch 0.4.1 lack the batch-norm counters, which have no effect here.
    missing = {
        key for key in expected.keys() - state.keys() if not key.endswith(".num_batches_tracked")
    }
    if missing:
        origin += f"; fresh: {', '.join(sorted({key.split('.')[0] for key in missing}))}"
    return Pretrained(origin, state)


def _download_imagenet() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(IMAGENET_URL, progress=False, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"the ImageNet weights could not be downloaded from {IMAGENET_URL} ({error}): give "
            "--weights PATH with a file of ResNet18 weights, or --weights none for fresh weights"
        ) from error


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; --weights takes imagenet, none, a file or a model"
        )
    try:
        content = read_tensors(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable weights file ({error})") from error
    for key in WRAPPER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not named weights")
    return {
        WRAPPER_PREFIXES.sub("", str(key)): value
        for key, value in content.items()
        if isinstance(value, Tensor)
    }


def _fit(state: dict[str, Tensor], expected: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Select the weights that the network has, and sum the first convolution to one channel."""
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
