"""Speech emotion recognition at scale.

The modules and folders. Each of them imports only itself and those above it.

errors       errors that a user can cause
progress     progress bars and log lines
grouping     groups items that fit into memory together
command      builds the command that a verb suggests as the next step
storage      paths and URIs, atomic writes, one writer for a folder
cluster      joins a Ray cluster or starts Ray here; CPUs, GPUs and shared files
corpus       a folder, bucket or table of recordings -> a manifest with one row for each file, and
             the speakers of each fold
features     a recording -> 16 kHz sound without silent ends -> spectrogram, mel, MFCC
shards       the manifest -> Parquet shards of features and the outcome of every file, by Ray Data
training     shards -> tensors in memory -> ResNet18 -> checkpoint, in plain torch
plots        numbers -> figures
inference    a checkpoint -> the emotion in audio files, ONNX, a model for MLflow, a demo page
tracking     MLflow: runs, registered models, the server of a cluster
evaluation   the predictions of a checkpoint -> scores, statistics, a model card, pages
distributed  one training with a run folder and an MLflow run, in this process or on Ray Train
search       searches and cross-validations on Ray Tune
api          these steps as Python functions, such as `ser_ray.train`
cli          these steps as verbs of the command line

`import ser_ray` imports none of them.
"""

import logging
import warnings
from typing import TYPE_CHECKING, Any

from ser_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from ser_ray.api import *  # noqa: F403 - the names in __all__

__all__ = [
    "CrossvalConfig",
    "DownloadConfig",
    "LrRangeConfig",
    "PrepareConfig",
    "RunConfig",
    "SlotConfig",
    "TrainConfig",
    "TuneConfig",
    "compare",
    "crossval",
    "download",
    "evaluate",
    "export",
    "load_model",
    "lr_range",
    "open_shards",
    "predict_to_table",
    "prepare",
    "prepare_for",
    "recipe_like",
    "refit",
    "register",
    "train",
    "tune",
]


def __dir__() -> list[str]:
    """Return the names that a notebook completes."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import `ser_ray.api` when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'ser_ray' has no attribute {name!r}")
    # In a notebook without ipywidgets, tqdm and Ray ask for it when they are imported. Nothing here
    # draws with it.
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("ray.widgets").setLevel(logging.ERROR)
    from ser_ray import api

    return getattr(api, name)
