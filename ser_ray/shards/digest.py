"""Hashes files and samples, to find out whether they are equal."""

import hashlib
from functools import partial

import numpy as np

from ser_ray.storage.packed import ROW, read_packed
from ser_ray.storage.paths import filesystem_of


def file_digest(path: str) -> str | None:
    """Hash the bytes of a local file to 16 hex digits; None if it is remote or unreadable."""
    try:
        return None if "://" in path else _digest(path)
    except OSError:
        return None


def sample_digest(samples: np.ndarray) -> str:
    """Hash decoded samples [num_samples] to 16 hex digits, for the column `content`."""
    return hashlib.sha256(samples.data).hexdigest()[:16]


def same_bytes(one: str, other: str) -> bool:
    """Return whether two files have the same bytes."""
    files = map(filesystem_of, (one, other))
    sizes = {filesystem.get_file_info(path).size for filesystem, path in files}
    return len(sizes) == 1 and _digest(one) == _digest(other)


def _digest(location: str) -> str:
    new_hash = partial(hashlib.blake2b, digest_size=8)
    if ROW in location:
        return new_hash(read_packed(location)).hexdigest()
    filesystem, path = filesystem_of(location)
    if not filesystem.get_file_info(path).is_file:  # opening a pipe would wait for its writer
        raise OSError(f"{location} is not a file")
    with filesystem.open_input_file(path) as stream:
        return hashlib.file_digest(stream, new_hash).hexdigest()
