"""The optimiser AdamW and the OneCycle schedule."""

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ser_ray.storage.paths import name_account
from ser_ray.training.recipe import TrainConfig

PREFIX = "optimiser."
"""Prefix of the names of the optimiser's tensors in a checkpoint."""


def build_optimiser(network: nn.Module, recipe: TrainConfig) -> AdamW:
    """Build AdamW for all weights of a network. `one_cycle` sets its learning rate."""
    name_account()  # building an optimiser imports parts of torch that need a user name
    return AdamW(
        network.parameters(), lr=recipe.lr_min, weight_decay=recipe.weight_decay, fused=True
    )


def optimiser_tensors(optimiser: Optimizer) -> dict[str, Tensor]:
    """Return the optimiser's state by names such as `optimiser.0.exp_avg` (first weight)."""
    return {
        f"{PREFIX}{index}.{name}": value
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimiser(optimiser: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the tensors that `optimiser_tensors` returned. Tensors with other names are ignored.

    Raises:
        ValueError, LookupError, RuntimeError: the tensors do not fit the optimiser's weights.
    """
    weights = optimiser.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if not key.startswith(PREFIX):
            continue
        index, name = key.removeprefix(PREFIX).split(".")
        # Fused AdamW requires that each moment has the memory layout of its weight. safetensors
        # maps the file into memory; the copy does not need the file.
        like = value if name == "step" else weights[int(index)]
        state[int(index)][name] = torch.empty_like(like, device="cpu").copy_(value)
    names = {"step", "exp_avg", "exp_avg_sq"}
    if state.keys() != set(range(len(weights))) or any(v.keys() != names for v in state.values()):
        raise ValueError("the optimiser's moments are incomplete")
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def restore_schedule(schedule: OneCycleLR, num_steps: int) -> None:
    """Set the learning rate and momentum of a new schedule to those after `num_steps` steps."""
    if num_steps:
        one_step_before = {"last_epoch": num_steps - 1, "_step_count": num_steps + 1}
        schedule.load_state_dict(schedule.state_dict() | one_step_before)
        schedule.step()


def one_cycle(optimiser: Optimizer, recipe: TrainConfig, total_steps: int) -> OneCycleLR:
    """Build the OneCycle schedule of the learning rate (Smith 2018).

    The first step has `lr_min`, so the earliest possible peak is the second step.
    """
    total_steps = max(total_steps, 2)
    return OneCycleLR(
        optimiser,
        max_lr=recipe.lr_max,
        total_steps=total_steps,
        pct_start=max(recipe.pct_start, 2 / total_steps),
        div_factor=recipe.lr_max / recipe.lr_min,
        final_div_factor=recipe.final_div_factor,
    )
