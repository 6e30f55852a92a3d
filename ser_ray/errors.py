"""The errors a user can cause.

Every message names the item, says what is wrong with it and what to do next; `ser_ray.cli`
prints it in one line and exits with status 2. A single bad clip is not an error of the run: see
`ser_ray.features.errors.ClipError`, which becomes a row of the outcomes.
"""


class SerRayError(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(SerRayError):
    """A setting that cannot be: names the field, what it got and what is allowed."""


class LocationError(ConfigError):
    """A location that cannot be opened: it is wrong, or its storage does not answer now."""


class CorpusError(SerRayError):
    """A folder, bucket or table that holds no usable corpus."""


class ShardsError(SerRayError):
    """A shard set that is missing, unfinished, in use or not what was asked for."""


class CheckpointError(SerRayError):
    """A checkpoint that is missing, broken or does not fit."""


class MismatchError(CheckpointError):
    """A checkpoint or a run's folder that belongs to another training."""


class ResourcesError(SerRayError):
    """More CPUs or GPUs asked for than the cluster has."""


class TrackingError(SerRayError):
    """An MLflow store or run that cannot be used."""


class DivergedError(SerRayError):
    """A loss or a weight that is not a finite number any more."""


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would fail in the same way.

    That is so where the error lies in the recipe, the shards or the checkpoint. Any other error,
    such as a storage that does not answer, may not come again.
    """
    permanent = isinstance(error, ConfigError | MismatchError | DivergedError)
    return permanent and not isinstance(error, LocationError)
