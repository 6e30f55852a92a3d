"""Links to MLflow's pages: the page of a run, and a table of all runs, the best first.

The table is a saved view of the experiment with scores, important settings and duration, sorted by
validation UA. MLflow sorts nested runs only by their start, so the view leaves out trials and
folds. The page of their parent run lists them.

In MLflow's pages, users can save a view and share its link. MLflow has no Python function for this,
and does not document its format. This module writes that format. `tests/tracking/test_views.py`
fails if an upgrade of MLflow changes the format.
"""

import json
import shlex
from typing import TYPE_CHECKING

from ser_ray.errors import TrackingError
from ser_ray.tracking.store import connect, store_answers

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` serves a local database."""
VIEW_KEY = "ser-ray"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
"""Tag of the experiment that holds the view."""
COLUMNS = tuple(
    f"{kind}.`{name}`"
    for kind, names in {
        "metrics": ("selected/ua", "test/ua"),
        "tags": ("kind", "protocol"),
        "params": ("feature", "lr_min", "lr_max", "fold", "seed"),
        "attributes": ("Duration", "Dataset", "Models"),
    }.items()
    for name in names
)
"""The columns of the table in order, as MLflow's pages name them."""
STATE = {
    "selectedColumns": COLUMNS,
    "columnOrder": COLUMNS,
    "columnWidths": {"tags.`protocol`": 260},
    "orderByKey": "metrics.`selected/ua`",
    "orderByAsc": False,
    "searchFilter": "tags.kind != 'trial' and tags.kind != 'fold'",
}
"""The settings of the view, by the names that MLflow's pages use."""


def links(uri: str, run_id: str) -> tuple[str, str, str]:
    """Return the links to a run. If the store does not answer, both lead to its first page.

    Args:
        uri: tracking store, as `resolve_uri` returns it.
        run_id: id of the run.

    Returns:
        The link to the run's page, the link to the table of all runs of the experiment, and the
        command that starts a local server for both. The command is empty if the store is a server.
    """
    is_server = uri.startswith("http")
    pages = uri.rstrip("/") if is_server else LOCAL_UI
    command = "" if is_server else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    try:
        client = connect(uri)
        with store_answers(uri):
            experiment_id = client.get_run(run_id).info.experiment_id
    except TrackingError:
        return pages, pages, command
    runs = f"{pages}/#/experiments/{experiment_id}/runs"
    # Without this parameter, a browser that is new to MLflow opens the pages for language models.
    training = "workflowType=machine_learning"
    all_runs = f"{runs}?viewStateShareKey={VIEW_KEY}&{training}"
    return f"{runs}/{run_id}?{training}", all_runs, command


def save_view(client: "MlflowClient", experiment_id: str) -> None:
    """Save the view in an experiment, unless it is already there.

    Raises:
        MlflowException: the store refused the view.
    """
    view = json.dumps({"name": "Which run is best", "createdAt": 0, "state": json.dumps(STATE)})
    if client.get_experiment(experiment_id).tags.get(VIEW_TAG) != view:
        client.set_experiment_tag(experiment_id, VIEW_TAG, view)
