"""Chooses the tracking store, connects to it, and converts its errors to TrackingError."""

import logging
import os
import re
import shlex
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

from ser_ray.errors import TrackingError, first_line
from ser_ray.storage.paths import name_account
from ser_ray.tracking.database import SCHEME, artifacts_of, database_of, open_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_STORE = Path("ser-ray-out")
"""Folder of the database and the artifacts if no store is named."""
VARIABLE = "MLFLOW_TRACKING_URI"
REQUEST_SECONDS = 10
"""How long to wait for a server's answer."""


def resolve_uri(tracking_uri: str) -> str:
    """Return the store to use: the argument, the environment variable, or a local sqlite file.

    A relative path in a URI is made absolute, because run folders and checkpoints record the URI.
    An address without a scheme, such as localhost:5000, gets http://.

    Raises:
        TrackingError: the URI is malformed, or contains a password, which runs and checkpoints
            would record.
    """
    uri = tracking_uri or os.environ.get(VARIABLE, "")
    if re.match(r"[\w.-]+:\d+(/|$)", uri):
        uri = f"http://{uri}"
    try:
        parts = urlsplit(uri)
        if uri.startswith("http"):
            _ = parts.port, (parts.hostname or "").encode("idna")  # both can raise ValueError
    except ValueError as error:
        raise TrackingError(
            f"{uri}: this is not the address of an MLflow server ({error}); check --tracking-uri, "
            f"or the variable {VARIABLE}"
        ) from error
    if parts.password:
        raise TrackingError(
            f"the tracking URI of {parts.hostname} contains a password. For a server, set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead, or write them to "
            "~/.mlflow/credentials. For a database, use the database's own password file"
        )
    return _absolute(uri or f"{SCHEME}{LOCAL_STORE / 'mlflow.db'}")


def _absolute(uri: str) -> str:
    """Make the path of a sqlite file or of a folder in a URI absolute."""
    if uri.startswith(SCHEME):
        return f"{SCHEME}{Path(uri.removeprefix(SCHEME)).expanduser().absolute()}"
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(uri.removeprefix("file:")).absolute().as_uri()
    if uri.startswith((".", "~")):
        return str(Path(uri).expanduser().absolute())
    return uri


def connect(uri: str, *, create: bool = False) -> "MlflowClient":
    """Return MLflow's client for a store, after checking that the store answers.

    MLflow sends the request that checks a server, so the check also covers credentials,
    certificates and proxies. Afterwards, functions of MLflow that take no client use this store.

    Args:
        uri: a store, as `resolve_uri` returns it.
        create: whether to create the file of a local database if it does not exist.

    Raises:
        TrackingError: the server does not answer or refuses the request, or the database does not
            exist or cannot be opened.
    """
    configure_mlflow_client()
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request_safe

    is_server = uri.startswith("http")
    is_from_variable = VARIABLE in os.environ and uri == resolve_uri("")
    store = f"{VARIABLE} names {uri}" if is_from_variable else uri
    if is_server:
        problem = f"{store}: this MLflow server cannot be used"
        advice = (
            ". Start a server with `mlflow server`. If the server is protected, set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD. To record in a local file, "
            f"leave out --tracking-uri and {VARIABLE}"
        )
    else:
        problem = f"{store}: no MLflow database can be opened"
        advice = "; check --tracking-uri: the address of a server begins with http:// or https://"
    with as_tracking_error(problem, advice):
        open_database(uri, create=create)
        set_tracking_uri(uri)
        try:
            client = mlflow.MlflowClient(tracking_uri=uri)
        except MlflowException as error:
            if "mlflow db upgrade" not in error.message:
                raise
            raise TrackingError(
                f"{store}: this database has the tables of another MLflow version, or its upgrade "
                f"was interrupted: copy the file and run `mlflow db upgrade {uri}`. If that fails, "
                "restore the copy. To use a new database instead, name it with --tracking-uri"
            ) from error
        if is_server:
            # The client would repeat the request, and so wait for a silent server twice as long.
            http_request_safe(
                get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "POST",
                max_retries=0, json={"max_results": 1},
            )  # fmt: skip
    return client


def model_location(model: str) -> str:
    """Return the location of a model: its own, or that of a run of this name in LOCAL_STORE.

    The result is empty if the model must be looked up in the tracking store.
    """
    if model.startswith(("models:/", "runs:/")):
        return ""
    if "/" in model or Path(model).exists():
        return model
    run_folder = LOCAL_STORE / "runs" / model
    return str(run_folder) if run_folder.is_dir() else ""


def require_server(tracking_uri: str) -> None:
    """Check that a tracking server answers, before slow work begins. Skip local databases.

    Raises:
        TrackingError: the server does not answer.
    """
    uri = resolve_uri(tracking_uri)
    if uri.startswith("http"):
        connect(uri)


def set_tracking_uri(uri: str) -> None:
    """Set the store that MLflow's functions use, without changing the environment.

    MLflow's own function also sets the environment variable. Later calls in this process would take
    that for the user's choice.
    """
    import mlflow

    before = os.environ.get(VARIABLE)
    mlflow.set_tracking_uri(uri)
    if before is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = before


def experiment_id_of(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of an experiment. If it does not exist, create it.

    Raises:
        TrackingError: the experiment was deleted.
        MlflowException: the store does not answer, or refuses the experiment.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        artifacts = None
        if (database := database_of(uri)) is not None:
            # MLflow's default location, ./mlruns, depends on the working directory.
            artifacts = f"{artifacts_of(database)}/{quote(name.replace('/', '_'))}"
        # This kind makes MLflow show the pages for training, not those for language models.
        kind = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags=kind))
        except MlflowException:  # another process may have created it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        store = shlex.quote(f"MLFLOW_TRACKING_URI={uri}")
        raise TrackingError(
            f"the experiment {name!r} is deleted: restore it with `env {store} mlflow experiments "
            f"restore --experiment-id {found.experiment_id}`, or choose another with --experiment"
        )
    return str(found.experiment_id)


def configure_mlflow_client() -> None:
    """Make MLflow's client fail within seconds instead of minutes, and log no messages.

    Environment variables that are already set keep their values.
    """
    name_account()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    # At level ERROR, MLflow would log the tracebacks of errors that it also raises.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="mlflow")


@contextmanager
def as_tracking_error(problem: str, advice: str = "") -> Iterator[None]:
    """Convert errors that MLflow and its stores raise in the block to TrackingError.

    Args:
        problem: begins the message and says what failed; the reason follows in brackets.
        advice: ends the message and says what the user can do.

    Raises:
        TrackingError: MLflow, its database or a file raised an error, or a package that the store
            needs is not installed.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error, ImportError, OSError) as error:
        # The text about a failed request is long, and its end gives the reason.
        caused = re.search(r"\(Caused by (.*)\)", str(error))
        reason = caused[1] if caused else first_line(error)
        raise TrackingError(f"{problem} ({reason}){advice}") from error
