"""The learning-rate range test (Smith 2015, arXiv 1506.01186), which proposes OneCycle's bounds.

The test trains a new network, and raises the learning rate in every step, from far too small to far
too large. The lower bound is the learning rate at which the loss begins to fall, and the upper
bound is the learning rate at which the loss stops falling."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d

from ser_ray.errors import DivergedError
from ser_ray.shards.read import ShardSet
from ser_ray.training.data import load_fold
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import LrRangeConfig, TrainConfig
from ser_ray.training.trainer import Trainer
from ser_ray.training.world import World

SMOOTHING_STEPS = 8.0
"""Standard deviation, in steps, of the Gaussian window that smooths the loss."""
DIVERGED = 4.0
"""The test ends when the smoothed loss is more than this many times its minimum, as in fastai."""
MIN_FALL = 0.02
"""If the smoothed loss falls by less than this share of its highest value, the test fails."""
FALL_BEGINS, FALL_ENDS = 0.1, 0.9
"""At lr_min, the loss has fallen by the first share of its total fall; at lr_max, by the second."""


@dataclass(frozen=True, slots=True)
class LrRange:
    """The result of a range test.

    Args:
        learning_rates: learning rate of every step.
        losses: training loss of every step.
        smooth: training loss of every step, averaged over neighbouring steps.
        lr_min, lr_max: the proposed bounds.
    """

    learning_rates: list[float]
    losses: list[float]
    smooth: list[float]
    lr_min: float
    lr_max: float


def range_steps(
    recipe: TrainConfig,
    shards: ShardSet,
    pretrained: Pretrained,
    test: LrRangeConfig,
    device: torch.device,
) -> Iterator[tuple[float, float]]:
    """Train, and raise the learning rate by the same factor in each step until the loss diverges.

    Args:
        recipe: the recipe. Its learning rates and number of epochs are not used.
        test: the learning rates and the largest number of steps.

    Yields:
        The learning rate and the training loss of every step. A loss that is not finite ends the
        test and is not yielded.
    """
    data = load_fold(shards, recipe, device)
    # The schedule takes no steps, so the momentum stays that of a training's first step.
    trainer = Trainer(recipe, shards.card, data, pretrained, device, World())
    losses: list[float] = []
    trainer.begin_epoch()
    for rate in np.geomspace(test.lowest, test.highest, test.steps):
        trainer.optimiser.param_groups[0]["lr"] = float(rate)
        loss, _ = trainer.update_weights(next(trainer.batches))
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            return
        yield float(rate), losses[-1]
        if has_diverged(losses):
            return


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the smoothed loss of the last step is far above the minimum so far."""
    smooth = _smooth(losses)
    return bool(smooth[-1] > DIVERGED * smooth.min())


def propose_bounds(
    learning_rates: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray
) -> LrRange:
    """Propose bounds for OneCycle from the learning rates and losses of a range test [steps].

    Raises:
        DivergedError: the loss did not fall enough.
    """
    smooth = _smooth(losses) if len(losses) else np.zeros(1)
    lowest = int(smooth.argmin())
    highest = int(smooth[: lowest + 1].argmax())
    fall = smooth[highest] - smooth[lowest]
    if fall <= MIN_FALL * smooth[highest]:
        raise DivergedError(
            f"the loss did not fall by {MIN_FALL:.0%}: start from a smaller learning rate "
            "(--lowest), or look for broken clips in the shards"
        )
    fallen = (smooth[highest] - smooth[highest : lowest + 1]) / fall
    begins = highest + int((fallen >= FALL_BEGINS).argmax())
    ends = highest + int((fallen >= FALL_ENDS).argmax())
    return LrRange(
        learning_rates=np.asarray(learning_rates).tolist(),
        losses=np.asarray(losses).tolist(),
        smooth=smooth.tolist(),
        lr_min=float(learning_rates[begins]),
        lr_max=float(learning_rates[ends]),
    )


def _smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Average each loss with its neighbours, weighted by a Gaussian window."""
    window = partial(gaussian_filter1d, sigma=SMOOTHING_STEPS, mode="constant", truncate=8)
    return window(np.asarray(losses, dtype=np.float64)) / window(np.ones(len(losses)))
