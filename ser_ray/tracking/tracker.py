"""Records one MLflow run. Only the driver does this, not the workers.

A training has one run, even if its workers or its driver are restarted. The tracker sends the
metrics of each epoch in a few batched calls. If the store does not answer at the start, the tracker
raises an error. If the store stops answering later, `flush` logs a warning, and keeps the metrics
until the store answers again. The other methods that use the store raise TrackingError, except
`abandon`.
"""

import logging
import os
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ser_ray.errors import LockLostError, TrackingError
from ser_ray.storage.json_text import to_json
from ser_ray.tracking.database import await_database
from ser_ray.tracking.run_metadata import (
    MAX_TAG_LENGTH,
    NOTE,
    merge_note,
    model_name,
    model_signature,
)
from ser_ray.tracking.store import (
    VARIABLE,
    as_tracking_error,
    connect,
    experiment_id_of,
    resolve_uri,
    set_tracking_uri,
)
from ser_ray.tracking.views import save_view

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Run

METRICS_PER_CALL = 1000
"""MLflow's limit for the metrics of one call."""
RETRY_SECONDS = 5.0
"""Pause between two attempts to reach a store that did not answer."""

logger = logging.getLogger(__name__)


class Tracker:
    """One MLflow run. If its `with` block ends with an error, the run is closed (`abandon`).

    Args:
        uri: tracking store, as `resolve_uri` returns it.
        run_id: id of an existing run.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        from mlflow import MlflowClient

        self.uri, self.run_id = uri, run_id
        self._client = MlflowClient(tracking_uri=uri)
        self._queue: list[Metric] = []
        """Metrics that have not been sent to the store yet."""
        self._epochs: set[int] = set()
        """The epochs that were queued or sent."""
        self._retry_at = 0.0
        """The earliest next attempt, in time.monotonic(); 0 if the last attempt succeeded."""

    @classmethod
    def start(
        cls,
        uri: str,
        experiment: str,
        *,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        dataset: "DatasetInput | None" = None,
        run_id: str = "",
    ) -> "Tracker":
        """Create a run, or resume the run `run_id`.

        The parameters are also stored as the artifact `settings.json`. This shows, before any
        training starts, whether artifacts can be stored.

        Args:
            uri: tracking store, as `resolve_uri` returns it.
            experiment: name of the experiment, which is created if it does not exist.
            name: name of a new run.
            params: parameters of a new run; keys of nested mappings are joined by dots.
            tags: tags of the run (`ser_ray.tracking.run_metadata.run_tags`).
            dataset: input of a new run (`ser_ray.tracking.run_metadata.dataset_of`).
            run_id: id of the run to resume; its name, parameters and input do not change. If
                empty, a new run is created.

        Raises:
            TrackingError: the store does not answer, lacks the run, or cannot store artifacts; or
                the run or the experiment was deleted.
        """
        client = connect(uri, create=True)
        problem = f"{uri}: the tracking store refused the run{f' {run_id}' if run_id else ''}"
        advice = (
            "; check --tracking-uri and --experiment, or give another --name to start a new run"
        )
        with as_tracking_error(problem, advice):
            if run_id:
                tracker = cls(uri, run_id)
                tracker._require_not_deleted()
                client.update_run(run_id, status="RUNNING")
                tracker.set_tags(tags)
            else:
                experiment_id = experiment_id_of(client, uri, experiment)
                save_view(client, experiment_id)
                run = client.create_run(experiment_id, run_name=name, tags=dict(tags))
                tracker = cls(uri, run.info.run_id)
        with tracker:
            if not run_id:
                if dataset is not None:
                    with tracker._writing():
                        client.log_inputs(tracker.run_id, [dataset])
                tracker.log_params(params)
            problem = f"{tracker.read().info.artifact_uri}: MLflow cannot store artifacts here"
            advice = "; make the place writable, or choose another --experiment or --tracking-uri"
            with as_tracking_error(problem, advice):
                client.log_text(tracker.run_id, to_json(params), "settings.json")
        return tracker

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abandon(error)

    @classmethod
    def of_run(cls, uri: str, run_id: str) -> "Tracker":
        """Return a tracker of a run that is in the store.

        Raises:
            TrackingError: the store does not answer, or lacks the run.
        """
        client = connect(uri)
        with as_tracking_error(f"{uri}: run {run_id} cannot be read"):
            client.get_run(run_id)
        return cls(uri, run_id)

    def read(self) -> "Run":
        """Read the run from the store."""
        with self._reading():
            return self._client.get_run(self.run_id)

    def nested_runs(self, tag: str) -> dict[str, "Run"]:
        """Return the runs that are nested in this run and have the tag, by the tag's value."""
        import mlflow

        nested = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        experiment_id = self.read().info.experiment_id
        set_tracking_uri(self.uri)
        with self._reading():
            found = mlflow.search_runs([experiment_id], nested, output_format="list")
            return {run.data.tags[tag]: run for run in found if tag in run.data.tags}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Store parameters. MLflow refuses to change the value of a stored parameter."""
        from mlflow.entities import Param

        listed = [Param(key, str(value)) for key, value in flatten(params).items()]
        with self._writing():
            self._client.log_batch(self.run_id, params=listed)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, timestamp_ms: int, **link: str
    ) -> None:
        """Queue metrics of one step. `flush` or `deliver` sends them.

        MLflow ignores a metric if the run has one with the same name, step, timestamp and value.

        Args:
            link: the model and data set that the metrics belong to, as the arguments `model_id`,
                `dataset_name` and `dataset_digest` of MLflow's `Metric`.
        """
        from mlflow.entities import Metric

        self._queue += [
            Metric(key, value, timestamp_ms, step, **link) for key, value in metrics.items()
        ]

    def log_scores(self, scores: Mapping[str, float], timestamp_ms: int) -> None:
        """Store final scores, linked to the run's data set and, if there is one, to its model.

        MLflow compares models by the scores that are linked to them.

        Raises:
            TrackingError: the store did not accept the scores.
        """
        run, link = self.read(), {}
        if run.inputs and run.inputs.dataset_inputs:
            dataset = run.inputs.dataset_inputs[0].dataset
            link = {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
        if model_id := model_id_of(run):
            link["model_id"] = model_id
        self.log_metrics(scores, 0, timestamp_ms, **link)
        self.deliver()

    def log_epoch(
        self,
        row: Mapping[str, float],
        learning_rates: Sequence[float],
        timestamp_ms: int,
        system_metrics: Mapping[str, Mapping[str, float]] = {},
    ) -> bool:
        """Queue the metrics of one epoch. `flush` or `deliver` sends them.

        An epoch may be repeated after a failure. A repeated epoch is ignored.

        Args:
            row: the epoch's number (`epoch`, from 1) and its metrics, whose names contain a slash.
            learning_rates: learning rate of every step of the epoch; logged as `train/lr`.
            timestamp_ms: when the epoch ended, in milliseconds since 1970.
            system_metrics: metrics of each node, by name; logged as `system/NODE/NAME`.

        Returns:
            Whether the epoch is new.
        """
        epoch = int(row["epoch"])
        if epoch in self._epochs:
            return False
        self._epochs.add(epoch)
        metrics = {name: value for name, value in row.items() if "/" in name}
        self.log_metrics(metrics | flatten({"system": system_metrics}, "/"), epoch, timestamp_ms)
        first_step = (epoch - 1) * len(learning_rates)
        for step, rate in enumerate(learning_rates, start=first_step):
            self.log_metrics({"train/lr": rate}, step, timestamp_ms)
        return True

    def flush(self) -> bool:
        """Try to send the queue to the store; return whether the queue is empty.

        After a failure, calls within RETRY_SECONDS make no attempt.
        """
        if not self._queue:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            self.deliver()
        except TrackingError as error:
            if not self._retry_at:
                logger.warning("%s. The training continues", error)
            self._retry_at = time.monotonic() + RETRY_SECONDS
            return False
        return True

    def deliver(self) -> None:
        """Send the queue to the store.

        Raises:
            TrackingError: the store did not accept all metrics; the rest stays in the queue.
        """
        while self._queue:
            with self._writing():
                self._client.log_batch(self.run_id, metrics=self._queue[:METRICS_PER_CALL])
            self._queue = self._queue[METRICS_PER_CALL:]
        self._retry_at = 0.0

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run. A text that is too long for a tag is cut off."""
        with self._writing():
            for key, value in tags.items():
                self._client.set_tag(self.run_id, key, str(value)[:MAX_TAG_LENGTH])

    def read_text(self, name: str) -> str:
        """Read a text artifact.

        Raises:
            TrackingError: the store does not answer, or the run has no such artifact.
        """
        problem = f"{self.uri}: {name} of run {self.run_id} cannot be read"
        with as_tracking_error(problem), TemporaryDirectory() as folder:
            return Path(self._client.download_artifacts(self.run_id, name, folder)).read_text(
                encoding="utf-8"
            )

    def describe(self, **lines: str) -> None:
        """Replace the given lines of the run's description; an empty text removes its line."""
        note = self.read().data.tags.get(NOTE, "")
        self.set_tags({NOTE: merge_note(note, lines)})

    def log_files(self, files: Mapping[str, Any]) -> None:
        """Store artifacts by path: figures, texts, tables (as CSV), and other values (as JSON)."""
        import pyarrow as pa
        from pyarrow import csv

        with self._writing(), TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if savefig := getattr(content, "savefig", None):
                    savefig(path, dpi=130)
                elif isinstance(content, str):
                    path.write_text(content, encoding="utf-8")
                elif isinstance(content, pa.Table):
                    csv.write_csv(content, path)
                else:
                    path.write_text(to_json(content), encoding="utf-8")
            self._client.log_artifacts(self.run_id, folder)

    def log_model(self, checkpoint: Path, labels: Sequence[str]) -> None:
        """Package the model of a checkpoint directory, and log it under the run's name."""
        from mlflow import pyfunc
        from mlflow.models import Model

        from ser_ray.inference import packaged

        run = self.read()
        set_tracking_uri(self.uri)
        with self._writing():
            # `pyfunc.log_model` would use the active run and experiment of this process.
            model = self._client.create_logged_model(
                run.info.experiment_id,
                name=model_name(str(run.info.run_name)),
                source_run_id=self.run_id,
                params=run.data.params,
            )
            Model.log(
                artifact_path=None,
                flavor=pyfunc,
                run_id=self.run_id,
                model_id=model.model_id,
                loader_module=packaged.__name__,
                data_path=str(checkpoint),
                code_paths=[str(Path(__file__).parents[1])],
                pip_requirements=[
                    f"{item}=={version(item)}" for item in packaged.requirements(checkpoint)
                ],
                signature=model_signature(labels),
                input_example=packaged.example_input(),
            )

    def finish(self, status: str) -> None:
        """Close the run with the status FINISHED, FAILED or KILLED."""
        with self._writing():
            self._client.set_terminated(self.run_id, status)

    def abandon(self, error: BaseException) -> None:
        """Close the run after an error.

        The status is KILLED if the process was stopped, and FAILED otherwise. The run stays open if
        another process has taken over its folder, because that process now uses the run.
        """
        if isinstance(error, LockLostError):
            return
        with suppress(TrackingError):  # a tracking failure must not mask the original error
            is_stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            self.finish("KILLED" if is_stopped else "FAILED")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Wait while the database is locked, and convert errors of reading to TrackingError."""
        await_database(self.uri)
        problem = f"{self.uri}: run {self.run_id} cannot be read"
        with as_tracking_error(problem, "; run the same command again when the store answers"):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Wait while the database is locked, and convert errors of writing to TrackingError."""
        await_database(self.uri)
        problem = f"{self.uri}: run {self.run_id} could not be written"
        advice = (
            "; nothing is lost: the missing records are sent when the store answers again, or when "
            "the same command is run again"
        )
        try:
            with as_tracking_error(problem, advice):
                yield
        except TrackingError as error:
            # MLflow's error has this code if the run was deleted, but also in other cases.
            if getattr(error.__cause__, "error_code", "") == "INVALID_PARAMETER_VALUE":
                with as_tracking_error(problem, advice):
                    self._require_not_deleted()
            raise

    def _require_not_deleted(self) -> None:
        """Raise TrackingError if the run was deleted; MLflow then accepts no records."""
        if self._client.get_run(self.run_id).info.lifecycle_stage == "deleted":
            store = shlex.quote(f"MLFLOW_TRACKING_URI={self.uri}")
            raise TrackingError(
                f"run {self.run_id} was deleted in MLflow: restore it with `env {store} mlflow "
                f"runs restore --run-id {self.run_id}`; the missing records are sent then, or when "
                "the same command is run again"
            )


def model_id_of(run: "Run") -> str:
    """Return the id of the model that a run logged last; empty if it logged none."""
    models = run.outputs.model_outputs if run.outputs else []
    return str(models[-1].model_id) if models else ""


def has_run(uri: str, run_id: str) -> bool:
    """Return whether a store answers and has a run; `uri` is as `resolve_uri` returns it."""
    try:
        Tracker.of_run(uri, run_id)
    except TrackingError:
        return False
    return True


def store_of_run(tracking_uri: str, recorded_uri: str, run_id: str) -> str:
    """Return the store to use for a run, in the form that `resolve_uri` returns.

    This is the user's store if it has the run, and otherwise the recorded store. The recorded
    address may be outdated: a store can be moved or copied, and a server can get another address.
    If neither store has the run, the store that the user named is returned, because the error must
    be about this store.

    Args:
        tracking_uri: the user's store, as `resolve_uri` takes it.
        recorded_uri: the store that the training recorded beside its checkpoint.
        run_id: id of the run.
    """
    uri = resolve_uri(tracking_uri)
    if uri == recorded_uri or has_run(uri, run_id):
        return uri
    is_named = bool(tracking_uri or os.environ.get(VARIABLE))
    return uri if is_named and not has_run(recorded_uri, run_id) else recorded_uri


def run_to_resume(uri: str, record: Mapping[str, Any]) -> str:
    """Return the id of the run that a run folder's record names; empty if a new run is needed.

    The record may contain another address of the same store: a store can be moved together with the
    folder, and a server can have several addresses. Therefore, if the addresses differ, the run is
    looked up in the store.

    Args:
        uri: tracking store, as `resolve_uri` returns it.
        record: the record (`ser_ray.distributed.run_folder.RunFolder.record`).
    """
    run_id = str(record.get("run_id", ""))
    if not run_id or record["tracking_uri"] == uri or has_run(uri, run_id):
        return run_id
    logger.warning(
        "%s: the earlier run %s is not in this store but in %s; a new run is recorded here",
        uri,
        run_id,
        record["tracking_uri"],
    )
    return ""


def flatten(values: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return nested mappings as one dict, whose keys are the nested keys joined by `separator`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            inner = flatten(value, separator)
            flat |= {f"{key}{separator}{name}": item for name, item in inner.items()}
        else:
            flat[key] = value
    return flat


def now_ms() -> int:
    """Return the time in milliseconds since 1970, which is MLflow's unit."""
    return time.time_ns() // 1_000_000
