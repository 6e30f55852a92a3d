"""The network: ResNet18 (He 2016) with one input channel and one output for each label.

Its layers and their names are torchvision's, so torchvision's weights fit it and a seed gives it
the same initial weights (tests compare both). It is defined here because importing torchvision
takes longer than importing torch, which would delay every prediction.

Pretrained weights come from torchvision's download or from a file. The RGB kernels of their first
convolution are *summed*: the network then answers a one-channel image as the original answers the
same image in all three channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ser_ray.corpus.folds import ALL
from ser_ray.corpus.words import CORPORA
from ser_ray.errors import CheckpointError, ConfigError
from ser_ray.features.encoder_card import EncoderCard
from ser_ray.shards.card import ShardCard
from ser_ray.storage.tensors import read_tensors
from ser_ray.training.data import seed_of
from ser_ray.training.recipe import TrainConfig

NETWORK_STRIDE = 32
"""Bins and frames of the input for each pixel of the last stage's output."""
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"
"""torchvision's IMAGENET1K_V1. The name holds the first digits of the file's SHA-256, which are
checked."""
WRAPPER_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which other programs store the weights in a file."""
WRAPPER_PREFIXES = ("module.", "model.", "_orig_mod.", "backbone.", "network.")
"""Prefixes that wrappers of a network put before the names of its weights."""
LAYER_SCALE = 10.0
"""The trained parameters of the layer weights are multiplied by this factor before the softmax, so
an optimiser step changes the weights more."""
COUNTER = "num_batches_tracked"
"""Name of a batch norm's counter of batches."""

N = TypeVar("N", bound=nn.Module)


class ResNet18(nn.Module):
    """Maps features [batch, 1, bins, frames] to logits [batch, labels].

    The initial weights are drawn in torchvision's order, for an RGB network whose first layer is
    then replaced, so a seed gives the same weights as in torchvision.
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


class EncoderHead(nn.Module):
    """Maps an encoder's layers [batch, 1, layers * dim, 1] to logits [batch, labels].

    The output is computed from a weighted sum of the layers, as in SUPERB (Yang 2021) and EmoBox
    (Ma 2024). The weights are the softmax of trained parameters. A linear layer follows, with a
    hidden layer before it if `num_units` is above 0.
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
        """Compute the logits of a batch."""
        mixed = (features.reshape(-1, *self.shape) * self.layer_weights[:, None]).sum(dim=1)
        return self.fc(self.hidden(mixed))


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
    # On the meta device there is nothing to draw, and torch spends seconds on importing sympy.
    if not convolution.weight.is_meta:
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")


def to_channels_last(network: N, device: torch.device) -> N:
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
    """Whether to train on inputs of this size in bfloat16 on this device.

    GPUs and x86 CPUs with AVX512_BF16 or AMX multiply bfloat16 in hardware. Other CPUs emulate it,
    which is slow. All CPUs train in float32 if the output of the network's last stage is a single
    row or column, because torch 2.11 computes NaN gradients for kernels that cover only padding.
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
    """Weights to start from: a state dict that fits the network, and a sentence on its origin."""

    origin: str
    state: dict[str, Tensor]


FRESH = Pretrained("fresh weights", {})


def new_network(
    num_labels: int, encoder: EncoderCard | None, head_units: int
) -> ResNet18 | EncoderHead:
    """Build a ResNet18, or a head on the encoder if there is one, with torch's random numbers."""
    if encoder is None:
        return ResNet18(num_labels)
    return EncoderHead(encoder.num_layers, encoder.dim, num_labels, head_units)


def build_network(
    config: TrainConfig,
    pretrained: Pretrained,
    num_labels: int,
    device: torch.device,
    encoder: EncoderCard | None = None,
) -> ResNet18 | EncoderHead:
    """Build a network on a device, with initial weights drawn from the recipe's seed.

    Pretrained weights replace the drawn ones.
    """
    torch.manual_seed(seed_of(config.seed))
    network = new_network(num_labels, encoder, config.head_units)
    network.load_state_dict(network.state_dict() | pretrained.state)
    return to_channels_last(network, device)


def initial_weights(config: TrainConfig, shards: ShardCard) -> Pretrained:
    """Read the initial weights of a training on these shards.

    Raises:
        ConfigError: the shards lack the feature, or its encoder was trained with labels of the
            corpus.
        CheckpointError: the weights cannot be read.
    """
    encoder = shards.encoder_of(config.feature)
    if encoder is None:
        return read_pretrained(config.weights, len(shards.labels))
    tests_new_speakers = config.protocol not in ("random", ALL)
    has_seen = shards.corpus in encoder.labelled or (
        shards.corpus == "several" and encoder.labelled
    )
    if tests_new_speakers and has_seen and not config.allow_seen_labels:
        raise ConfigError(
            f"feature is {encoder.name}: this encoder was trained with labels of "
            f"{CORPORA[shards.corpus]}, so the speakers that {config.protocol} tests are not new "
            "to it; choose another encoder, or give --allow-seen-labels"
        )
    return FRESH


def read_pretrained(weights: str, num_labels: int) -> Pretrained:
    """Read the weights that `TrainConfig.weights` names.

    Layers that the source lacks get fresh weights and are named in `origin`. The last layer is kept
    only if it has as many outputs as there are labels.

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
    missing = {key for key in expected.keys() - state.keys() if not key.endswith(COUNTER)}
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
    return {_strip(str(k)): v for k, v in content.items() if isinstance(v, Tensor)}


def _strip(key: str) -> str:
    while (prefix := next(filter(key.startswith, WRAPPER_PREFIXES), None)) is not None:
        key = key.removeprefix(prefix)
    return key


def _fit(state: dict[str, Tensor], expected: dict[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Select the network's own weights, and sum the first convolution to one channel."""
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
