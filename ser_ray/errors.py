"""The errors that a user can cause.

Every message names the item, the fault and the next step. `ser_ray.cli` prints the message in one
line and exits with status 2. A file that cannot be used does not end `prepare` or `predict`. It
causes a `ser_ray.features.errors.ClipError`, which is recorded as the outcome of the file.
"""


class SerRayError(Exception):
    """Base of every error whose message is written for the user, in one line."""

    def __str__(self) -> str:
        # A quoted message of a library may have several lines.
        return " ".join(line.strip() for line in super().__str__().splitlines())


class ConfigError(SerRayError):
    """An invalid setting. The message names the field, its value and what is allowed."""


class LocationError(ConfigError):
    """A location that cannot be opened, because it is wrong or its storage does not respond."""


class CorpusError(SerRayError):
    """A folder, bucket or table that holds no usable corpus."""


class ShardsError(SerRayError):
    """A shard set that is missing, unfinished, in use or not the requested one."""


class CheckpointError(SerRayError):
    """A checkpoint that is missing or damaged, or does not fit the shards or the settings."""


class EncoderError(SerRayError):
    """Weights of a pretrained encoder that are missing or damaged, or belong to another network."""


class MismatchError(CheckpointError):
    """A checkpoint or a run folder that belongs to another training."""


class ResourcesError(SerRayError):
    """A cluster that cannot be joined, or lacks the CPUs, GPUs or files that a command needs."""


class TrackingError(SerRayError):
    """An MLflow store or run that cannot be used."""


class DivergedError(SerRayError):
    """A training whose loss or weights are no longer finite, or whose loss does not fall."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the error's type if there is no message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def last_line(error: Exception) -> str:
    """Return the last line of an error's message; Ray's messages begin with a traceback."""
    return str(error).strip().rpartition("\n")[2]


def wrapped_error(error: Exception) -> SerRayError | None:
    """Return the SerRayError that an error of a Ray task or of Ray Train wraps, if there is one."""
    wrapped = [
        getattr(error, "cause", None),
        *getattr(error, "worker_failures", {}).values(),
        getattr(error, "controller_failure", None),
    ]
    return next((each for each in wrapped if isinstance(each, SerRayError)), None)


def is_permanent(error: BaseException) -> bool:
    """Return whether a retry will fail in the same way.

    A wrong setting, a checkpoint of another training, a diverged training, and a batch that does
    not fit into a GPU's memory are permanent. Other errors may be temporary, for example if a
    storage does not respond.
    """
    if isinstance(error, LocationError):
        return False
    # The error of torch is found by its name, because importing torch takes seconds.
    names = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    is_permanent_kind = isinstance(error, ConfigError | MismatchError | DivergedError)
    return is_permanent_kind or "torch.OutOfMemoryError" in names
