"""The trained network as prediction runs it: ResNet18 in plain torch, batch norm folded away.

torchvision takes longer to import than torch itself, and prediction needs nothing of it but the
order of twenty convolutions. The weights are those that the checkpoint holds under torchvision's
names; a test compares the outputs with torchvision's own network. Folding (Jacob 2018, section
3.2) multiplies each batch norm into the convolution before it: a fifth of the time less, the same
function up to float rounding.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ser_ray.errors import CheckpointError
from ser_ray.training.checkpoint import MODEL

BATCH_NORM_EPSILON = 1e-5
"""torchvision's, and torch's default."""


class Network(nn.Module):
    """ResNet18 (He 2016) on features: [batch, 1, bins, frames] -> logits [batch, labels].

    Args:
        state: a checkpoint's weights, by torchvision's names.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = _convolution(state, "conv1", "bn1", stride=2)
        self.blocks = nn.Sequential(
            *(
                _Block(state, f"layer{stage}.{block}", stride=2 if stage > 1 and block == 0 else 1)
                for stage in (1, 2, 3, 4)
                for block in (0, 1)
            )
        )
        outputs, inputs = state["fc.weight"].shape
        self.head = nn.Linear(inputs, outputs, device="meta")
        self.head.weight = nn.Parameter(state["fc.weight"].clone())
        self.head.bias = nn.Parameter(state["fc.bias"].clone())

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits of a batch."""
        maps = F.max_pool2d(F.relu(self.stem(features)), kernel_size=3, stride=2, padding=1)
        return self.head(self.blocks(maps).mean(dim=(2, 3)))


class _Block(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, state: dict[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        self.first = _convolution(state, f"{name}.conv1", f"{name}.bn1", stride)
        self.second = _convolution(state, f"{name}.conv2", f"{name}.bn2")
        around = f"{name}.downsample"
        self.around: nn.Module = nn.Identity()
        if f"{around}.0.weight" in state:
            self.around = _convolution(state, f"{around}.0", f"{around}.1", stride)

    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(maps))) + self.around(maps))


def _convolution(state: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> nn.Conv2d:
    """Fold a convolution and the batch norm after it into one convolution with a bias."""
    weight, bias = fuse_conv_bn_weights(
        state[f"{conv}.weight"],
        None,
        state[f"{norm}.running_mean"],
        state[f"{norm}.running_var"],
        BATCH_NORM_EPSILON,
        state[f"{norm}.weight"],
        state[f"{norm}.bias"],
    )
    outputs, inputs, side, _ = weight.shape
    folded = nn.Conv2d(inputs, outputs, side, stride, padding=side // 2, device="meta")
    folded.weight, folded.bias = weight, bias
    return folded


def load_network(checkpoint: Path) -> Network:
    """Read a checkpoint's network, ready to predict on the CPU.

    Raises:
        CheckpointError: the weights are missing, broken or another network's.
    """
    path = checkpoint / MODEL
    try:
        network = Network(load_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be loaded ({error})") from error
    except KeyError as error:
        raise CheckpointError(f"{path}: not a ResNet18's weights ({error} is missing)") from error
    # A third faster on CPUs; torch's stubs lack the argument.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()
