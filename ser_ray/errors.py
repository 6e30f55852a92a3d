"""The errors a user can cause.

Every message names the item, says what is wrong with it and what to do next; `ser_ray.cli`
prints it in one line and exits with status 2. A single bad clip is not an error of the run: see
`ser_ray.features.errors.ClipError`, which becomes a row of the outcomes.
"""


class SerRayError(Exception):
    """Base of every error whose message is written for the user, in one line."""

    def __str__(self) -> str:
        # A library's message that is quoted in it may have several lines.
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
    """A checkpoint that is missing, damaged or does not fit."""


class EncoderError(SerRayError):
    """Weights of a pretrained encoder that are missing, damaged or of another network."""


class MismatchError(CheckpointError):
    """A checkpoint or a run's folder that belongs to a different training run."""


class ResourcesError(SerRayError):
    """A cluster that cannot be joined, or lacks the CPUs, GPUs or files that a command needs."""


class TrackingError(SerRayError):
    """An MLflow store or run that cannot be used."""


class DivergedError(SerRayError):
    """A loss or a weight that is no longer a finite number."""


def first_line(error: Exception) -> str:
    """First line of an error's message; libraries add details below it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def last_line(error: Exception) -> str:
    """Last line of an error's message; Ray's begin with a trace."""
    return str(error).strip().rpartition("\n")[2]


def is_permanent(error: BaseException) -> bool:
    """Whether another attempt would fail in the same way.

    It would if the recipe, the shards or the checkpoint are at fault, or if a batch does not fit
    into a GPU's memory. Any other error, such as a storage that does not respond, may be temporary.
    """
    if isinstance(error, LocationError):
        return False
    # Looked up by name, because importing torch takes seconds.
    names = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]
    is_ours = isinstance(error, ConfigError | MismatchError | DivergedError)
    return is_ours or "torch.OutOfMemoryError" in names
