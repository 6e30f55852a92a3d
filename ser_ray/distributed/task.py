"""The description of a training, in this process or on a cluster."""

from dataclasses import dataclass

from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.shards.read import ShardSet
from ser_ray.training.model import Pretrained
from ser_ray.training.recipe import TrainConfig


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """Recipe, shards, folder and settings of a training."""

    folder: RunFolder
    """Holds the checkpoints; the training resumes from the newest one."""
    config: TrainConfig
    shards: ShardSet
    pretrained: Pretrained
    """The weights to start from."""
    run: RunConfig
