"""Speech emotion recognition at scale: the way of a clip, in order.

errors       what a user can cause
progress     bars and lines that show how far a job is
command      the command that a user may give next, with the same settings
storage      paths and URIs, files written completely or not at all, one writer for a folder
local_ray    how Ray is started on this machine
cluster      joining a Ray cluster, or starting one on this machine
corpus       a folder, bucket or table of recordings -> a manifest with one row for each file, and
             the speakers of each fold
features     a recording -> 16 kHz sound without silent ends -> spectrogram, mel, MFCC
shards       the manifest -> Parquet shards of features and the outcome of every file, by Ray Data
training     shards -> tensors that stay in memory -> ResNet18 -> checkpoint, in plain torch
plots        numbers -> figures
inference    a checkpoint -> the emotion in any audio files, ONNX, a model for MLflow, a demo page
tracking     MLflow: runs, registered models, the server of a cluster
evaluation   a checkpoint's answers -> scores, statistics, a model card, pages
distributed  one training as a run, with a folder and a record: in this process, or by several
             workers of Ray Train
search       Ray Tune around the training: searches and cross-validations
api          these steps as Python functions, which `ser_ray` itself offers by name
cli          these steps as verbs of the command line

A folder imports only from itself and from those above it. `import ser_ray` loads none of them.
"""

from typing import TYPE_CHECKING, Any

from ser_ray.version import __version__ as __version__

if TYPE_CHECKING:
    from ser_ray.api import (
        CrossvalConfig,
        DownloadConfig,
        LrRangeConfig,
        PrepareConfig,
        RunConfig,
        SlotConfig,
        TrainConfig,
        TuneConfig,
        compare,
        crossval,
        download,
        evaluate,
        export,
        load_model,
        lr_range,
        open_shards,
        predict_to_table,
        prepare,
        prepare_for,
        recipe_like,
        refit,
        register,
        train,
        tune,
    )

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
    """List the names that a notebook completes."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Import `ser_ray.api` when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'ser_ray' has no attribute {name!r}")
    from ser_ray import api

    return getattr(api, name)
