"""Makes links to MLflow's pages: the page of a run, and a table of runs with the best first.

The table is a saved view of the experiment with scores, important settings and duration, sorted by
validation UA. It leaves out trials and folds, because MLflow sorts nested runs only by their start
time. The page of their parent run lists them.

Users can save such a view in MLflow's pages and share its link. MLflow has no Python function for
this, and the format of a saved view is not documented. `save_view` writes this format, and
`tests/tracking/test_views.py` fails if an upgrade of MLflow changes it.
"""

import json
import shlex
from typing import TYPE_CHECKING, NamedTuple

from ser_ray.errors import TrackingError
from ser_ray.tracking.store import as_tracking_error, connect

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_UI = "http://127.0.0.1:5000"
"""Where `mlflow ui` serves a local database."""
VIEW_KEY = "ser-ray"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"
"""Tag of the experiment that holds the view."""
COLUMNS = {
    "attributes.`Run Name`": 330,
    "metrics.`selected/ua`": None,
    "metrics.`test/ua`": None,
    "tags.`kind`": 140,
    "tags.`protocol`": 290,
    "params.`feature`": 140,
    "params.`lr_min`": 190,
    "params.`lr_max`": 190,
    "params.`fold`": 70,
    "params.`seed`": 70,
    "attributes.`Duration`": None,
    "attributes.`Dataset`": None,
    "attributes.`Models`": None,
}
"""The columns of the table, in order and by the names in MLflow's pages. Some have a width in
pixels, so that no value is cut: 2.12e-05 would otherwise look like 2.12, and two searches alike."""
COLUMN_WIDTHS = {name: width for name, width in COLUMNS.items() if width}
STATE = {
    "selectedColumns": list(COLUMNS),
    "columnOrder": list(COLUMNS),
    "columnWidths": COLUMN_WIDTHS,
    "orderByKey": "metrics.`selected/ua`",
    "orderByAsc": False,
    "searchFilter": "tags.kind != 'trial' and tags.kind != 'fold'",
}
"""The settings of the view, by the names in MLflow's pages."""


class RunLinks(NamedTuple):
    """Where a user finds a run in MLflow's pages."""

    run: str
    """Link to the page of the run."""
    all_runs: str
    """Link to the table of the experiment's runs."""
    server_command: str
    """The command that serves these pages; empty if the store is a server."""


def run_links(uri: str, run_id: str) -> RunLinks:
    """Return the links to a run. If the store does not answer, they lead to MLflow's start page.

    Args:
        uri: tracking store, as `resolve_uri` returns it.
    """
    is_server = uri.startswith("http")
    base_url = uri.rstrip("/") if is_server else LOCAL_UI
    command = "" if is_server else shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    try:
        client = connect(uri)
        with as_tracking_error(uri):
            experiment_id = client.get_run(run_id).info.experiment_id
    except TrackingError:
        return RunLinks(base_url, base_url, command)
    runs = f"{base_url}/#/experiments/{experiment_id}/runs"
    # Without this, MLflow shows its pages for language models in a browser that it does not know.
    training = "workflowType=machine_learning"
    all_runs = f"{runs}?viewStateShareKey={VIEW_KEY}&{training}"
    return RunLinks(f"{runs}/{run_id}?{training}", all_runs, command)


def save_view(client: "MlflowClient", experiment_id: str) -> None:
    """Save the table of runs as a view of an experiment, unless it is already saved.

    Raises:
        MlflowException: the store refused the view.
    """
    view = json.dumps({"name": "Which run is best", "createdAt": 0, "state": json.dumps(STATE)})
    if client.get_experiment(experiment_id).tags.get(VIEW_TAG) != view:
        client.set_experiment_tag(experiment_id, VIEW_TAG, view)
