"""Compares files by their bytes or by their samples."""

import hashlib
from functools import partial

import numpy as np

from ser_ray.storage.packed import ROW, read_packed
from ser_ray.storage.paths import filesystem_of


def file_digest(path: str) -> str | None:
    """Return 16 hex digits for the bytes of a local file; None if it is remote or unreadable."""
    try:
        return None if "://" in path else _digest(path)
    except OSError:
        return None


def sample_digest(samples: np.ndarray) -> str:
    """Return 16 hex digits for decoded samples [num_samples], for the column `content`."""
    return hashlib.sha256(samples.data).hexdigest()[:16]


def same_bytes(one: str, other: str) -> bool:
    """Return whether two files have the same bytes."""
    places = [filesystem_of(path) for path in (one, other)]
    sizes = {filesystem.get_file_info(inside).size for filesystem, inside in places}
    return len(sizes) == 1 and _digest(one) == _digest(other)


def _digest(path: str) -> str:
    make = partial(hashlib.blake2b, digest_size=8)
    if ROW in path:
        return make(read_packed(path)).hexdigest()
    filesystem, inside = filesystem_of(path)
    if not filesystem.get_file_info(inside).is_file:  # opening a pipe would wait for its writer
        raise OSError(f"{path}: not a file")
    with filesystem.open_input_file(inside) as stream:
        return hashlib.file_digest(stream, make).hexdigest()
