"""What a training trains, wherever it runs."""

from dataclasses import dataclass

from ser_ray.distributed.run_config import Ingest
from ser_ray.distributed.run_folder import RunFolder
from ser_ray.shards.read import ShardSet
from ser_ray.training.config import TrainConfig
from ser_ray.training.model import Pretrained


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingTask:
    """A training, for `ser_ray.distributed.local` or `ser_ray.distributed.group`."""

    folder: RunFolder
    """Holds the checkpoints; the training resumes from the newest one."""
    config: TrainConfig
    shards: ShardSet
    pretrained: Pretrained
    """The weights to start from."""
    ingest: Ingest = "resident"
    """How a worker gets its training clips (`ser_ray.distributed.ingest`)."""
    max_failures: int = 0
    """How often it starts again after a failure (`ser_ray.distributed`); -1 sets no limit."""
