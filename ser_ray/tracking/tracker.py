"""MLflow. The only module that imports it.

A training has one run, however often its workers or its driver die. The tracker lives in the driver
and talks to the store in a few batched calls an epoch. A store that cannot be reached at the start
is an error; one that goes away later costs nothing but a warning, and what was not delivered is
delivered when it answers again.
"""

import getpass
import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from ser_ray.errors import TrackingError
from ser_ray.storage.json_text import to_json
from ser_ray.version import __version__

LOCAL_STORE = Path("ser-ray-out")
"""Where the database and the artifacts go when no server is named."""
ATTEMPT_SECONDS = 10
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
"""MLflow's own limits of one batch."""
RETRY_SECONDS = 5.0
"""Rest between two attempts to reach a store that did not answer."""
TAG_BYTES = 5000
PACKAGES = ("ray", "torch", "torchvision", "torchaudio", "numpy", "pyarrow", "mlflow")

logger = logging.getLogger(__name__)


def resolve_uri(tracking_uri: str) -> str:
    """The store to use: the one named, the environment's, else a sqlite file beside the output.

    Raises:
        TrackingError: it holds a password, which would be written into every run and checkpoint.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(uri).password:
        raise TrackingError(
            f"the tracking URI of {urlsplit(uri).hostname} holds a password: give it in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials; "
            "for a database, in the database's own password file"
        )
    return uri or f"sqlite:///{(LOCAL_STORE / 'mlflow.db').absolute()}"


def ui_command(uri: str) -> str:
    """What opens the MLflow UI on a store."""
    if uri.startswith("http"):
        return f"open {uri}"
    return f"mlflow ui --backend-store-uri {uri}"


class Tracker:
    """One MLflow run.

    Args:
        uri: tracking store, as `resolve_uri` gives it.
        run_id: the run; it exists.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        from mlflow import MlflowClient

        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(tracking_uri=uri)
        self._waiting: list[tuple[str, float, int, int]] = []
        self._retry_at = 0.0
        """When to try again, of time.monotonic; 0 while the store answers."""

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str = "",
    ) -> "Tracker":
        """Open a run, or go on with the one of `run_id`.

        Raises:
            TrackingError: the store cannot be reached or the run is not in it.
        """
        configure_mlflow_client()
        require_reachable(uri)
        from mlflow import MlflowClient
        from mlflow.entities import Param

        problem = f"{uri}: the tracking store refused the run{f' {run_id}' if run_id else ''}"
        advice = (
            "; check --tracking-uri and --experiment, or give another --name to start a new run"
        )
        with store_answers(problem, advice):
            client = MlflowClient(tracking_uri=uri)
            if run_id:
                client.update_run(run_id, status="RUNNING")
                return cls(uri, run_id)
            experiment_id = _experiment_id(client, uri, experiment)
            run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
            listed = [Param(key, str(value)) for key, value in flatten(params).items()]
            for first in range(0, len(listed), PARAMS_PER_CALL):
                batch = listed[first : first + PARAMS_PER_CALL]
                client.log_batch(run.info.run_id, params=batch)
        return cls(uri, run.info.run_id)

    @classmethod
    def of_run(cls, uri: str, run_id: str) -> "Tracker":
        """The tracker of a run that was recorded, perhaps elsewhere.

        Raises:
            TrackingError: the store cannot be reached, or the run is not in it.
        """
        configure_mlflow_client()
        database = uri.removeprefix("sqlite:///")
        if database != uri and not Path(database).is_file():  # MLflow would make one
            raise TrackingError(f"{uri}: no such file on this machine")
        require_reachable(uri)
        with store_answers(f"{uri}: run {run_id} is not to be had"):
            tracker = cls(uri, run_id)
            tracker._client.get_run(run_id)
        return tracker

    @property
    def experiment_id(self) -> str:
        """Id of the run's experiment."""
        return str(self._client.get_run(self.run_id).info.experiment_id)

    @property
    def run_name(self) -> str:
        """Name of the run."""
        with self._delivering():
            return str(self._client.get_run(self.run_id).info.run_name)

    def log_metrics(self, metrics: Mapping[str, float], step: int, timestamp_ms: int) -> None:
        """Queue metrics of one step, until `flush` or `deliver`.

        MLflow ignores a metric that it already has: same name, step, timestamp and value.
        """
        self._waiting += [(name, value, timestamp_ms, step) for name, value in metrics.items()]

    def log_epoch(
        self,
        row: Mapping[str, float],
        learning_rates: Sequence[float],
        timestamp_ms: int,
        system_metrics: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        """Queue everything that one epoch reported, until `flush` or `deliver`.

        Args:
            row: the epoch's number (`epoch`, from 1) and its metrics.
            learning_rates: one per step of the epoch; logged as `lr_step` over all steps.
            timestamp_ms: when the epoch ended, as `now_ms` gives it.
            system_metrics: for each node its metrics by name; logged as `system/NODE/NAME`.
        """
        epoch = int(row["epoch"])
        metrics = {name: value for name, value in row.items() if name != "epoch"}
        for node, values in (system_metrics or {}).items():
            metrics |= {f"system/{node}/{name}": value for name, value in values.items()}
        self.log_metrics(metrics, epoch, timestamp_ms)
        first_step = (epoch - 1) * len(learning_rates)
        for step, rate in enumerate(learning_rates, start=first_step):
            self.log_metrics({"lr_step": rate}, step, timestamp_ms)

    def flush(self) -> bool:
        """Try to deliver what is waiting; says whether all of it was.

        A store that did not answer is left alone for a while.
        """
        if not self._waiting:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.deliver()
        except TrackingError as error:
            if not self._retry_at:
                logger.warning("%s; until then metrics are kept and training goes on", error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def deliver(self) -> None:
        """Deliver what is waiting.

        Raises:
            TrackingError: the store did not take all of it; the rest goes on waiting.
        """
        from mlflow.entities import Metric

        while self._waiting:
            batch = self._waiting[:METRICS_PER_CALL]
            with self._delivering():
                self._client.log_batch(
                    self.run_id, metrics=[Metric(n, v, t, s) for n, v, t, s in batch]
                )
            self._waiting = self._waiting[METRICS_PER_CALL:]
        self._retry_at = 0.0

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with self._delivering():
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, str(value)[:TAG_BYTES])

    def log_files(self, files: Mapping[str, Any]) -> None:
        """Store artifacts by their path in the run: figures, text, tables, and values as JSON."""
        import pyarrow as pa
        from matplotlib.figure import Figure
        from pyarrow import csv

        with self._delivering(), TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Figure):
                    content.savefig(path, dpi=130)
                elif isinstance(content, str):
                    path.write_text(content)
                elif isinstance(content, pa.Table):
                    csv.write_csv(content, path)
                else:
                    path.write_text(to_json(content))
            self._client.log_artifacts(self.run_id, folder)

    def log_model(self, checkpoint: Path, labels: Sequence[str]) -> None:
        """Store the packaged model of a checkpoint directory in the run."""
        import mlflow

        from ser_ray.inference import packaged

        mlflow.set_tracking_uri(self.uri)
        with self._delivering(), mlflow.start_run(run_id=self.run_id):
            mlflow.pyfunc.log_model(
                name="model",
                loader_module=packaged.__name__,
                data_path=str(checkpoint),
                code_paths=[str(Path(__file__).parents[1])],
                pip_requirements=[f"{name}=={version(name)}" for name in packaged.REQUIREMENTS],
                signature=_signature(labels),
                input_example=packaged.example_input(),
            )

    def finish(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED."""
        with self._delivering():
            self._client.set_terminated(self.run_id, status)

    def abandon(self, error: BaseException) -> None:
        """Close the run that an error ended: KILLED where somebody stopped it, else FAILED.

        The error is what is to be told, so a store that does not answer is not.
        """
        with suppress(TrackingError):
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self.finish("KILLED" if stopped else "FAILED")

    def _delivering(self) -> AbstractContextManager[None]:
        return store_answers(
            f"{self.uri}: run {self.run_id} could not be written",
            "; nothing is lost: what is missing is delivered when it answers again, or when the "
            "same command is given then",
        )


def recipe_of_run(run_id: str, tracking_uri: str) -> dict[str, Any]:
    """The recipe that a run recorded, as `TrainConfig.to_dict` wrote it.

    Raises:
        TrackingError: no such run, it holds no recipe, or the store cannot be reached.
    """
    configure_mlflow_client()
    import mlflow

    uri = resolve_uri(tracking_uri)
    require_reachable(uri)
    mlflow.set_tracking_uri(uri)
    advice = (
        "; name the store with --tracking-uri, and the id of a run that ser-ray train or tune "
        "recorded"
    )
    with store_answers(f"{run_id}: no run with a recipe in {uri}", advice):
        recipe: dict[str, Any] = json.loads(
            mlflow.artifacts.load_text(f"runs:/{run_id}/config.json")
        )
    return recipe


def name_like(run_id: str, changed_recipe: str = "") -> str:
    """Name of a run that trains the recipe of another one.

    Args:
        run_id: the other run.
        changed_recipe: fingerprint of the recipe, where it differs from the other run's.
    """
    return f"like-{run_id[:12]}" + (f"-{changed_recipe[:8]}" if changed_recipe else "")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def provenance() -> dict[str, str]:
    """What ran where: versions, git commit, machine and Ray job, as tags."""
    tags = {f"version.{name}": version(name) for name in PACKAGES}
    tags["version.ser_ray"] = __version__
    tags["mlflow.user"] = _user()
    tags["mlflow.source.name"] = Path(sys.argv[0]).name
    tags["version.python"] = platform.python_version()
    tags["hardware.machine"] = f"{platform.machine()}, {os.cpu_count()} CPUs"
    tags["command"] = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:TAG_BYTES]
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["git.commit"] = commit + ("-dirty" if _git("status", "--porcelain") else "")
    return tags


def _user() -> str:
    """Name of the user, or the number of one without an account, as containers often have."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        return str(os.getuid())


def now_ms() -> int:
    """Milliseconds since 1970, as MLflow dates metrics."""
    return time.time_ns() // 1_000_000


def _signature(labels: Sequence[str]) -> Any:
    """What the packaged model takes and gives, as `ser_ray.inference.packaged` says."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array

    samples = Array(DataType.double)
    inputs: dict[str, Any] = {
        "path": "string",
        "audio": "binary",
        "waveform": samples,
        "sample_rate": "double",
    }
    outputs = [("string", "emotion"), *(("double", label) for label in labels)]
    outputs += [("string", "status"), ("string", "reason")]
    return ModelSignature(
        Schema([ColSpec(kind, name, required=False) for name, kind in inputs.items()]),
        Schema([ColSpec(kind, name) for kind, name in outputs]),
    )


def _git(*arguments: str) -> str:
    package = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _experiment_id(client: Any, uri: str, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment {name!r} is deleted: restore it in the UI, or choose another with "
                "--experiment"
            )
        return str(found.experiment_id)
    artifacts = None
    if uri.startswith("sqlite:"):
        # MLflow's own default, ./mlruns, depends on the directory the program runs in.
        folder = Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        artifacts = (folder / name.replace("/", "_")).absolute().as_uri()
    kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view for training
    return str(client.create_experiment(name, artifact_location=artifacts, tags=kind))


def require_reachable(uri: str) -> None:
    """Make the folder of a local database, or check that a server answers this client.

    The client asks, so that its credentials, certificates and proxies count.

    Raises:
        TrackingError: the folder cannot be made, or no server answers.
    """
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"{uri}: {folder} cannot be made ({error})") from error
    if not uri.startswith("http"):
        return
    from mlflow import MlflowClient

    advice = (
        "; start one with `mlflow server`, give the user and password of a closed one in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave --tracking-uri out to "
        "record in a local file"
    )
    with store_answers(f"{uri}: no MLflow server answers", advice):
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def configure_mlflow_client() -> None:
    """Set MLflow's client to fail in seconds, not minutes, and to keep quiet, unless told."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(ATTEMPT_SECONDS))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


@contextmanager
def store_answers(problem: str, advice: str = "") -> Iterator[None]:
    """Turn whatever MLflow and its stores raise into one error: problem, reason, way out.

    Raises:
        TrackingError: the store cannot be reached, is none, or has not got what is asked for.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise TrackingError(f"{problem} ({first_line(error)}){advice}") from error


def first_line(error: Exception) -> str:
    """An error's message without what libraries add below it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
