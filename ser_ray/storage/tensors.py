"""Reads weights from untrusted files: safetensors, or the output of `torch.save`."""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

DAMAGED = (
    EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
    pickle.UnpicklingError, struct.error, SafetensorError,
)  # fmt: skip
"""Errors that the libraries raise for files that are damaged or hold no weights."""


def read_tensors(path: Path) -> Any:
    """Return the content of a file of weights, usually {name: tensor}. Code in it is not run.

    Raises:
        ValueError: the file is damaged or holds no weights.
        OSError: the file cannot be read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(str(error)) from error
