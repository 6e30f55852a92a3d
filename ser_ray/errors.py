"""The errors that are reported to the user in one line.

Messages name the item and the fault and, where there is one, the next step. `ser_ray.cli` prints
the message in one line and exits with status 2. A file that cannot be used does not end `prepare`
or `predict`. It causes a `ser_ray.features.errors.ClipError`, which is recorded as the outcome of
the file.
"""


class SerRayError(Exception):
    """Base of every error whose message is written for the user, in one line."""

    def __str__(self) -> str:
        # A quoted message of a library may have several lines.
        return " ".join(line.strip() for line in super().__str__().splitlines())


class ConfigError(SerRayError):
    """A setting that is invalid, or cannot be used now. The message says which one and why."""


class LocationError(ConfigError):
    """A location that cannot be opened, because it is wrong or its storage does not respond."""


class CorpusError(SerRayError):
    """A folder, bucket or table that holds no usable corpus, or a download of one that failed."""


class ShardsError(SerRayError):
    """A shard set that is missing, unfinished, in use or not the requested one, or a failed job."""


class CheckpointError(SerRayError):
    """A checkpoint or ImageNet weights that cannot be used, or a run folder that is in use.

    They are missing, damaged, or do not fit the shards or the settings.
    """


class EncoderError(SerRayError):
    """Weights of an encoder that are missing, damaged, too large, or belong to another network."""


class LockLostError(SerRayError):
    """A folder that another process has taken over: what it holds belongs to that process now."""


class MismatchError(CheckpointError):
    """A checkpoint or a run folder that belongs to another training."""


class ResourcesError(SerRayError):
    """A cluster that cannot be joined, or lacks the CPUs, GPUs or files that a command needs."""


class TrackingError(SerRayError):
    """An MLflow store or run that cannot be used."""


class DivergedError(SerRayError):
    """A training whose loss or weights are no longer finite, or whose loss does not fall."""


def first_line(error: Exception) -> str:
    """Return the first 200 characters of the first line of a message, or else the error's type."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def last_line(trace: str) -> str:
    """Return the last line of a traceback, or of a message of Ray, which begins with one."""
    return trace.strip().rpartition("\n")[2]


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

    A wrong setting, a checkpoint or run folder of another training, a folder that another process
    has taken over, a diverged training, and a batch that does not fit into a GPU's memory are
    permanent. Other errors may be temporary, for example if a storage does not respond.
    """
    if isinstance(error, LocationError):
        return False
    # The error of torch is found by its name, because importing torch takes seconds.
    names = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    permanent_kinds = ConfigError | MismatchError | LockLostError | DivergedError
    return isinstance(error, permanent_kinds) or "torch.OutOfMemoryError" in names
