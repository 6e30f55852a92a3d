"""Settings of a run that are not part of its recipe. This module imports no slow library."""

from dataclasses import dataclass
from typing import Literal

from ser_ray.errors import ConfigError
from ser_ray.features.config import require_range, require_valid

Ingest = Literal["auto", "resident", "stream"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How a run is named, executed, stored and recorded."""

    workers: str = "1"
    """Number of data-parallel workers, or a range such as 1..4 to use as many as the cluster has
    room for."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Train on GPUs or on CPUs. auto uses GPUs if there are any. Each worker of `train` has one
    GPU; `tune` and `crossval` can share a GPU between trials."""
    ingest: Ingest = "auto"
    """Keep the training clips in each worker's memory (resident), or read them again in every epoch
    (stream). auto streams if the clips need more than half of a worker's memory. Only `train`
    uses this setting."""
    name: str = ""
    """Name of the run. The same verb with this name resumes the run, but `lr-range` starts a new
    run, NAME-2. If empty, the name is made from the settings: the same settings on the same data
    give the same name."""
    storage: str = "ser-ray-out/runs"
    """Folder or URI for run folders. On a cluster, every node must be able to reach it."""
    experiment: str = "ser-ray"
    """MLflow experiment to record the run in."""
    tracking_uri: str = ""
    """MLflow tracking server or database. If empty, the variable MLFLOW_TRACKING_URI is used, or
    else an SQLite file in ser-ray-out."""
    audio: bool = True
    """The report contains the audio of the clips that it shows; `--no-audio` leaves the audio out
    of the report."""
    keep_encoder: bool = True
    """Copy the weights of the encoder, if the model has one, into the model's folder;
    `--no-keep-encoder` stores only the location and hash of the encoder's weights."""
    max_failures: int = 3
    """Largest number of times that lost workers are replaced, or that a failed training or trial
    is retried. -1 means no limit. Losses by a preemption are not counted."""

    def __post_init__(self) -> None:
        require_valid(self)
        min_workers, max_workers = self.worker_range
        if min_workers < 1 or max_workers < min_workers:
            raise ConfigError(
                f"workers is {self.workers}: it must be at least 1, and a range must not decrease"
            )
        require_range(self, "max_failures", low=-1)
        if "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"name is {self.name!r}: it becomes the name of a folder, so it must not contain / "
                "or start with ."
            )

    @property
    def worker_range(self) -> tuple[int, int]:
        """The smallest and the largest number of workers that `workers` allows.

        Raises:
            ConfigError: `workers` is neither a number nor a range.
        """
        smallest, dots, largest = self.workers.partition("..")
        try:
            return int(smallest), int(largest if dots else smallest)
        except ValueError:
            raise ConfigError(
                f"workers is {self.workers!r}: it must be a number like 2 or a range like 1..4"
            ) from None
