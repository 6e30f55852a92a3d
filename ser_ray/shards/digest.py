"""Compares files by their bytes or by their samples."""

import hashlib
from collections.abc import Iterator

import numpy as np
from pyarrow import fs

from ser_ray.storage.packed import ROW, read_packed
from ser_ray.storage.paths import filesystem_of

CHUNK = 1 << 20  # bytes per read


def file_digest(path: str) -> str | None:
    """Return 16 hex digits for the bytes of a local file; None if it is remote or unreadable."""
    if "://" in path:
        return None
    digest = hashlib.blake2b(digest_size=8)
    try:
        for chunk in _chunks(path):
            digest.update(chunk)
    except OSError:
        return None
    return digest.hexdigest()


def sample_digest(samples: np.ndarray) -> str:
    """Return 16 hex digits for decoded samples [num_samples], for the column `content`."""
    return hashlib.sha256(samples.data).hexdigest()[:16]


def same_bytes(one: str, other: str) -> bool:
    """Return whether two files have the same bytes."""
    sizes = []
    for path in (one, other):
        filesystem, inside = filesystem_of(path)
        sizes.append(filesystem.get_file_info(inside).size)
    if sizes[0] != sizes[1]:
        return False
    return all(a == b for a, b in zip(_chunks(one), _chunks(other), strict=True))


def _chunks(path: str) -> Iterator[bytes]:
    if ROW in path:
        yield read_packed(path)
        return
    filesystem, inside = filesystem_of(path)
    if filesystem.get_file_info(inside).type != fs.FileType.File:
        return
    with filesystem.open_input_file(inside) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk
