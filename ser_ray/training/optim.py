"""What moves the weights beside AdamW: the OneCycle schedule, SAM's perturbation and the EMA."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ser_ray.training.config import TrainConfig


def one_cycle(optimiser: Optimizer, config: TrainConfig, total_steps: int) -> OneCycleLR:
    """Schedule the learning rate of every step of a training (Smith 2018).

    The first step has `lr_min`, so the peak is the second step at the earliest.
    """
    total_steps = max(total_steps, 2)
    return OneCycleLR(
        optimiser,
        max_lr=config.lr_max,
        total_steps=total_steps,
        pct_start=max(config.pct_start, 2 / total_steps),
        div_factor=config.lr_max / config.lr_min,
        final_div_factor=config.final_div_factor,
    )


@contextmanager
def sam_perturbation(network: nn.Module, rho: float) -> Iterator[None]:
    """Move the weights up their gradient by `rho`, as a norm over all of them (Foret 2021, eq. 2).

    On leaving, the weights are what they were. Meanwhile batch norm keeps its statistics, which are
    those of the unmoved weights.
    """
    weights: list[Tensor] = list(network.parameters())
    gradients = [value.grad for value in weights if value.grad is not None]
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        before = [value.clone() for value in weights]
        scale = rho / (get_total_norm(gradients) + 1e-12)
        torch._foreach_add_(weights, torch._foreach_mul(gradients, scale))
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


def update_ema(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move an exponential moving average of a network's weights and buffers one step on.

    torch's AveragedModel does the same, but copies a counter to the device in every step, and so
    waits for the device.
    """
    averaged, current = average.state_dict(), network.state_dict()
    floats = [key for key, value in averaged.items() if value.is_floating_point()]
    torch._foreach_lerp_(
        [averaged[key] for key in floats], [current[key] for key in floats], 1 - decay
    )
    for key in averaged.keys() - floats:
        averaged[key].copy_(current[key])
