"""Where a training runs and what it is called, apart from its recipe. Importing this is cheap."""

from dataclasses import dataclass
from typing import Literal

from ser_ray.errors import ConfigError

Ingest = Literal["auto", "resident", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where a training runs, what it is called and where it is recorded."""

    workers: str = "1"
    """Data-parallel workers: a number, or a range like 1..4 to use what the cluster has."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Train on GPUs, one a worker, or on CPUs; auto takes GPUs where the cluster has any."""
    ingest: Ingest = "auto"
    """Keep the clips in each worker's memory, or read the training clips anew in every epoch; auto
    streams what would fill more than half of a worker's memory. Concerns `train` alone."""
    name: str = ""
    """Name of the run; the same name goes on where it stopped. Derived from the recipe if empty."""
    storage: str = "ser-ray-out/runs"
    """Folder or URI for checkpoints; on several nodes, one that all of them reach."""
    experiment: str = "ser-ray"
    """MLflow experiment."""
    tracking_uri: str = ""
    """MLflow tracking server or database; MLFLOW_TRACKING_URI or a local sqlite file if empty."""
    audio: bool = True
    """Put the sound of the validation clips that the report shows into it."""
    max_failures: int = 3
    """Times that lost workers are replaced before the run gives up."""

    def __post_init__(self) -> None:
        fewest, most = self.worker_range
        if not 1 <= fewest <= most:
            raise ConfigError(
                f"workers is {self.workers}: it must be at least 1, and a range goes upwards"
            )
        if self.max_failures < -1:
            raise ConfigError(
                f"max_failures is {self.max_failures}: it must be -1 (no limit) or more"
            )
        if "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"name is {self.name!r}: it becomes a folder's name, so no / and no ."
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers that `workers` allows.

        Raises:
            ConfigError: it is neither a number nor a range.
        """
        fewest, mark, most = self.workers.partition("..")
        try:
            return int(fewest), int(most if mark else fewest)
        except ValueError:
            raise ConfigError(
                f"workers is {self.workers!r}: it must be a number like 2 or a range like 1..4"
            ) from None
