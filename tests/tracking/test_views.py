"""The links to MLflow's pages, and the names by which its pages know a view."""

import json
from pathlib import Path

import mlflow
import pytest

from ser_ray.tracking.store import connect
from ser_ray.tracking.tracker import Tracker
from ser_ray.tracking.views import (
    COLUMN_WIDTHS,
    COLUMNS,
    STATE,
    VIEW_KEY,
    VIEW_TAG,
    run_links,
    save_view,
)
from tests.mlflow_store import new_store

PAGES = Path(mlflow.__file__).parent / "server" / "js" / "build" / "static" / "js"


@pytest.fixture(scope="module")
def pages() -> str:
    """The program of MLflow's pages."""
    return "\n".join(file.read_text(errors="replace") for file in sorted(PAGES.glob("*.js")))


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    uri = new_store(tmp_path_factory.mktemp("views"))
    return Tracker.start(uri, "views", name="run", params={}, tags={})


def stored_view(tracker: Tracker) -> dict[str, str]:
    experiment = connect(tracker.uri).get_experiment("1")
    view: dict[str, str] = json.loads(experiment.tags[VIEW_TAG])
    return view


def test_the_pages_of_this_mlflow_know_every_name_of_the_view(tracker: Tracker, pages: str) -> None:
    view = stored_view(tracker)
    state = json.loads(view["state"])
    parameters = ("viewStateShareKey", "workflowType", "machine_learning")
    columns = [column.split("`")[1] for column in COLUMNS if column.startswith("attributes.")]
    missing = [
        name
        for name in (*parameters, VIEW_TAG.removesuffix(VIEW_KEY), *view, *state, *columns)
        if f'"{name}"' not in pages and f"{name}:" not in pages
    ]
    assert not missing, (
        "this version of MLflow stores views under other names: save a view in its pages, look at "
        "the experiment's tags, and correct ser_ray/tracking/views.py"
    )


def test_columns_of_the_view_are_as_wide_as_their_values() -> None:
    values = {
        "attributes.`Run Name`": "crossval-wavlm_base_plus-emobox-6-bac2b596",
        "tags.`kind`": "cross-validation",
        "tags.`protocol`": "emobox-6 fold 0 (speaker-independent)",
        "params.`feature`": "wavlm_base_plus",
        "params.`lr_min`": "2.1251419451059772e-05",
        "params.`lr_max`": "0.0013915971093684705",
    }
    for column, value in values.items():
        assert COLUMN_WIDTHS[column] >= 30 + 6.5 * len(value), "a cell has margins of 15 pixels"
    assert set(COLUMN_WIDTHS) <= set(COLUMNS)


def test_links_lead_to_the_run_and_to_the_saved_view(tracker: Tracker) -> None:
    run, all_runs, command = run_links(tracker.uri, tracker.run_id)
    runs = "http://127.0.0.1:5000/#/experiments/1/runs"
    assert run == f"{runs}/{tracker.run_id}?workflowType=machine_learning"
    assert all_runs == f"{runs}?viewStateShareKey=ser-ray&workflowType=machine_learning"
    assert command == f"mlflow ui --backend-store-uri {tracker.uri}"


def test_links_of_a_store_that_does_not_answer_lead_to_its_first_page(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = "http://127.0.0.1:9"
    assert run_links(f"{server}/", "0" * 32) == (server, server, "")


def test_a_view_that_is_saved_already_is_not_written_again(tracker: Tracker) -> None:
    class ReadOnly:
        """A client that cannot write."""

        get_experiment = staticmethod(connect(tracker.uri).get_experiment)

    save_view(ReadOnly(), "1")  # type: ignore[arg-type]


def test_the_view_leaves_out_trials_and_folds(tracker: Tracker) -> None:
    def run(kind: str) -> str:
        tags = {"kind": kind}
        return Tracker.start(tracker.uri, "kinds", name=kind, params={}, tags=tags).run_id

    runs = {run(kind): kind for kind in ("training", "search", "trial", "cross-validation", "fold")}
    client = connect(tracker.uri)
    experiment = client.get_run(next(iter(runs))).info.experiment_id
    found = client.search_runs([experiment], str(STATE["searchFilter"]))
    kinds = {runs[run.info.run_id] for run in found}
    assert kinds == {"training", "search", "cross-validation"}
