"""A model's name to a local directory with its checkpoint.

A model is named by
- the folder or URI of a checkpoint, or of a finished run,
- a run's name or id, or `runs:/ID/model`,
- a registered version: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ser_ray.errors import TrackingError
from ser_ray.tracking.store import LOCAL_STORE, connect, resolve_uri, search_runs, store_answers
from ser_ray.training.checkpoint import local_checkpoint

if TYPE_CHECKING:
    from mlflow import MlflowClient

ADVICE = (
    "; name a checkpoint's or run's folder, a run's name or id, runs:/ID/model or "
    "models:/NAME@ALIAS, and the store with --tracking-uri"
)
_MLFLOW_SCHEMES = ("models:/", "runs:/")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@contextmanager
def local_model(model: str | Path, tracking_uri: str = "") -> Iterator[Path]:
    """Yield a model as a local checkpoint directory, downloaded until the block ends if necessary.

    Args:
        model: any of the names above.
        tracking_uri: store in which ids and names are looked up, as `resolve_uri` takes it.

    Raises:
        TrackingError: there is no such run or registered model.
        CheckpointError: the folder's storage does not answer.
    """
    location = str(model)
    if not _is_location(location):
        run_folder = LOCAL_STORE / "runs" / location
        if not run_folder.is_dir():
            with TemporaryDirectory() as folder:
                yield fetch_checkpoint(location, tracking_uri, Path(folder))
            return
        location = str(run_folder)
    with local_checkpoint(location) as checkpoint:
        yield checkpoint


def fetch_checkpoint(model: str, tracking_uri: str, folder: Path) -> Path:
    """Download the checkpoint in a packaged model into an empty folder; returns its directory.

    Args:
        model: name or id of the run that logged it, `runs:/ID/model`, or a registered version.
        tracking_uri: as `resolve_uri` takes it.

    Raises:
        TrackingError: there is no such run, model or alias, or the store does not answer.
    """
    uri = resolve_uri(tracking_uri)
    try:
        client = connect(uri)
    except TrackingError as error:
        raise TrackingError(
            f"{model}: no checkpoint here, and it cannot be looked up in MLflow: {error}"
        ) from error
    import mlflow

    with store_answers(f"{model}: no such model in {uri}", ADVICE):
        path = mlflow.artifacts.download_artifacts(_artifact(client, model), dst_path=str(folder))
        flavour = mlflow.models.Model.load(path).flavors.get("python_function", {})
    if "data" not in flavour:
        raise TrackingError(f"{model}: this model in {uri} is not one of ser_ray's{ADVICE}")
    return Path(path, flavour["data"])


def _is_location(model: str) -> bool:
    """Whether a model is named by a path or URI."""
    if model.startswith(_MLFLOW_SCHEMES):
        return False
    return "/" in model or Path(model).exists()


def _artifact(client: "MlflowClient", model: str) -> str:
    """Return the URI that MLflow gives to a model."""
    if model.startswith("models:/"):
        return model
    run_id = model.removeprefix("runs:/").removesuffix("/model")
    if model.startswith("runs:/") or _RUN_ID.fullmatch(model):
        return _require_model(client, run_id)
    for experiment in client.search_experiments():
        found = search_runs(client, experiment.experiment_id, f"attributes.run_name = '{model}'")
        for run in found:
            return _require_model(client, run.info.run_id)
    raise TrackingError(f"{model}: no checkpoint here, and no run of this name in MLflow{ADVICE}")


def _require_model(client: "MlflowClient", run_id: str) -> str:
    if model := model_of(client, run_id):
        return model
    raise TrackingError(f"{run_id}: this run has no model{ADVICE}")


def model_of(client: "MlflowClient", run_id: str) -> str:
    """URI of the model that a run logged last; empty if it logged none."""
    outputs = client.get_run(run_id).outputs
    models = outputs.model_outputs if outputs else []
    return f"models:/{models[-1].model_id}" if models else ""
