"""The connection to MLflow's store: choosing it, checking it, searching it, and its errors."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ser_ray.errors import TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_STORE = Path("ser-ray-out")
"""Where the database and the artifacts go when no server is named."""
REQUEST_SECONDS = 10
"""Longest wait for one answer of a server."""
RUNS_PER_CALL = 1000
"""Runs that a search returns in one page."""


def resolve_uri(tracking_uri: str) -> str:
    """Return the store to use: the one named, the environment's, or a sqlite file with the output.

    Raises:
        TrackingError: the URI holds a password, which would be written into runs and checkpoints.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(uri).password:
        raise TrackingError(
            f"the tracking URI of {urlsplit(uri).hostname} holds a password: give it in "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in ~/.mlflow/credentials; "
            "for a database, in the database's own password file"
        )
    return uri or f"sqlite:///{(LOCAL_STORE / 'mlflow.db').absolute()}"


def connect(uri: str) -> "MlflowClient":
    """Return MLflow's client of a store, after checking that the store answers it.

    The check is a request of that client, so it uses the client's credentials, certificates and
    proxies. The folder of a local database is made. MLflow's functions that take no client use this
    store from then on.

    Raises:
        TrackingError: no server answers, or the database cannot be opened.
    """
    configure_mlflow_client()
    import mlflow

    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrackingError(f"{uri}: {folder} cannot be made ({error})") from error
    mlflow.set_tracking_uri(uri)
    is_server = uri.startswith("http")
    problem = f"{uri}: no MLflow {'server answers' if is_server else 'database can be opened'}"
    advice = (
        "; start one with `mlflow server`, give the user and password of a protected one in "
        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or leave --tracking-uri out to "
        "record in a local file"
    )
    with store_answers(problem, advice if is_server else "; check --tracking-uri"):
        client = mlflow.MlflowClient(tracking_uri=uri)
        if is_server:
            client.search_experiments(max_results=1)
    return client


def search_runs(client: "MlflowClient", experiment_id: str, condition: str) -> Iterator[Any]:
    """Yield all runs of an experiment that meet a condition, the newest first."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], condition, max_results=RUNS_PER_CALL, page_token=token
        )
        yield from page
        if not (token := page.token):
            return


def configure_mlflow_client() -> None:
    """Set MLflow's client to fail in seconds, not minutes, and to be quiet.

    Values that the environment sets are kept.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="mlflow")


@contextmanager
def store_answers(problem: str, advice: str = "") -> Iterator[None]:
    """Turn whatever MLflow and its stores raise in the block into one error.

    Args:
        problem: what failed; the reason follows in brackets.
        advice: what the user can do.

    Raises:
        TrackingError: the store does not answer, is not a store, or lacks what was asked for.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise TrackingError(f"{problem} ({first_line(error)}){advice}") from error


def first_line(error: Exception) -> str:
    """First line of an error's message; libraries add details below it."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
