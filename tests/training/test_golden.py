"""Small trainings have the losses they have always had, so that no change moves results unseen.

`golden.json` holds the losses and learning rates of every epoch. A change that is meant to move
them writes the file again:

    python -m tests.training.test_golden
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch

from ser_ray.shards.read import ShardSet
from ser_ray.training.loop import MakeSnapshot, fit
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import TrainConfig
from ser_ray.training.trainer import EpochReport
from tests.conftest import PLAIN, make_memory_shards

GOLDEN = Path(__file__).with_name("golden.json")
METRICS = ("train/loss", "val/loss", "lr")
MARGIN = 5e-5
"""Relative. The losses of another instruction set (AVX2, none) differed by up to 6e-6."""
CONFIG = TrainConfig(
    protocol="speaker-3",
    epochs=3,
    batch_size=8,
    crop_frames=24,
    weights="none",
    seed=7,
    lr_min=1e-6,
    lr_max=2e-5,
)
"""Adam turns the rounding of other machines into other steps: low rates keep them small."""
RECIPES = {
    "default": CONFIG,
    "plain": replace(CONFIG, augment=PLAIN, label_smoothing=0.0, weight_decay=100.0),
    "quiet": replace(CONFIG, augment=replace(CONFIG.augment, noise=0.0, echo=0.0, band_limit=0.0)),
    "balanced": replace(CONFIG, balanced=True, feature="mfcc"),
}
"""Crops as short as the last stage of the network are trained in float32 on all CPUs."""


def metrics_of(recipe: TrainConfig) -> list[list[float]]:
    """Train ResNet18 in float32 on one CPU, and return the metrics of every epoch."""
    reports: list[EpochReport] = []

    def record(epoch: EpochReport | None, make_snapshot: MakeSnapshot) -> None:
        assert epoch is not None
        reports.append(epoch)

    shards = cast(ShardSet, make_memory_shards(speakers=6, per_emotion=1, seed=3))
    fit(recipe, shards, Pretrained("fresh weights", {}), record)
    assert not any(report.row["bfloat16"] for report in reports)
    return [[report.row[name] for name in METRICS] for report in reports]


@pytest.mark.parametrize("name", RECIPES)
def test_the_losses_are_those_of_the_golden_run(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert metrics_of(RECIPES[name]) == [pytest.approx(row, rel=MARGIN) for row in golden[name]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    content = {name: metrics_of(recipe) for name, recipe in RECIPES.items()}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
