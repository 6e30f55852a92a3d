"""The model as a training run logs it: loaded alone, served over HTTP, fetched and registered."""

import base64
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast
from urllib.parse import quote

import numpy as np
import pytest
import requests

from ser_ray.cli.main import main
from ser_ray.errors import TrackingError
from ser_ray.evaluation.rendering import render
from ser_ray.inference.packaged import PackagedModel
from ser_ray.inference.predictor import Predictor
from ser_ray.shards.read import ShardSet
from ser_ray.tracking.registry import best_training_of, local_model, register_model
from ser_ray.tracking.run_metadata import MAX_TAG_LENGTH, dataset_of, model_signature
from ser_ray.tracking.store import connect
from ser_ray.tracking.tracker import Tracker
from ser_ray.training.recipe import TrainConfig
from tests.clips import voice, write_wav
from tests.conftest import make_memory_shards
from tests.mlflow_store import new_store
from tests.models import LABELS, make_checkpoint
from tests.processes import held_port, started

pytestmark = pytest.mark.slow
SCORES = {
    "protocol": "speaker-3 fold 0 (speaker-independent)", "clips": 8, "ua": 0.5, "wa": 0.625,
    "f1": 0.4, "ece": 0.1, "recall": {"calm": 0.25},
    "intervals": {"ua": [0.3, 0.7], "drawn": "speakers", "count": 2},
    "groups": {
        "sex": [
            {"sex": "female", "clips": 8, "wa": 0.625, "ua": 0.5},
            {"sex": "male", "clips": 8, "wa": 0.5, "ua": 0.5},
        ]
    },
}  # fmt: skip


class Store:
    """A tracking store with a search whose best trial was trained again, and kept its model."""

    def __init__(self, folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        make_checkpoint(checkpoint)
        self.uri = new_store(folder)
        self.predictor = Predictor(checkpoint)
        self.search = self.start("search").run_id
        best = TrainConfig(lr_max=0.002)
        self.trial = self.start("best", best, self.search, ua=0.6).run_id
        self.start("worse", TrainConfig(), self.search, ua=0.4)
        tracker = self.start("any name", best, ua=0.58)
        tracker.log_files({"tables/test.json": SCORES})
        tracker.log_model(checkpoint, LABELS)
        tracker.log_scores({"test/ua": 0.5}, 1)
        self.run_id = tracker.run_id
        for name, recipe, shards in (
            (f"like-{self.trial[:12]}", replace(best, feature="mfcc"), "f00d"),
            ("other shards", best, "beef"),
        ):
            other = self.start(name, recipe, shards=shards, ua=0.9)
            other.log_model(checkpoint, LABELS)

    def start(
        self,
        name: str,
        recipe: TrainConfig | None = None,
        parent: str = "",
        shards: str = "f00d",
        ua: float | None = None,
    ) -> Tracker:
        params = recipe.to_dict() if recipe else {}
        tags = {"shards.fingerprint": shards} | ({"mlflow.parentRunId": parent} if parent else {})
        dataset = dataset_of(cast(ShardSet, make_memory_shards()))
        tracker = Tracker.start(
            self.uri, "test", name=name, params=params, tags=tags, dataset=dataset
        )
        tracker.log_metrics({} if ua is None else {"selected/ua": ua}, 0, 1)
        tracker.deliver()
        if recipe:
            tracker.log_files({"config.json": params})
        return tracker

    @property
    def model(self) -> Path:
        """The packaged model on disk."""
        import mlflow

        mlflow.set_tracking_uri(self.uri)
        return Path(mlflow.artifacts.download_artifacts(f"runs:/{self.run_id}/any name"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


def test_a_model_is_logged_in_its_own_run_whatever_run_a_notebook_has_started(tmp_path):
    """Without this, the error about the other run ended a complete training."""
    import mlflow

    make_checkpoint(tmp_path / "checkpoint")
    uri = new_store(tmp_path)
    dataset = dataset_of(cast(ShardSet, make_memory_shards()))
    tracker = Tracker.start(uri, "ours", name="one", params={"a": 1}, tags={}, dataset=dataset)
    mlflow.set_tracking_uri(uri)
    theirs = mlflow.set_experiment("theirs").experiment_id
    with mlflow.start_run() as run:
        tracker.log_model(tmp_path / "checkpoint", LABELS)
        active = mlflow.active_run()
        assert active is not None
        assert active.info.run_id == run.info.run_id
    client = mlflow.MlflowClient(uri)
    ours = tracker.read().info.experiment_id
    (model,) = client.search_logged_models([ours, theirs])
    assert (model.experiment_id, model.source_run_id) == (ours, tracker.run_id)
    assert (model.name, model.params["a"], model.status) == ("one", "1", "READY")
    outputs = tracker.read().outputs
    assert outputs is not None
    assert [output.model_id for output in outputs.model_outputs] == [model.model_id]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return write_wav(tmp_path_factory.mktemp("clips") / "clip.wav", voice(1.2))


@pytest.fixture(scope="module")
def server(store, tmp_path_factory) -> Iterator[str]:
    """`mlflow models serve` on the logged model; its address."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it looks for uvicorn
    folder = tmp_path_factory.mktemp("server")
    with held_port() as port:
        uri = f"http://127.0.0.1:{port}"
        options = f"--env-manager local -h 127.0.0.1 -p {port} --workers 1"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(store.model)]
        with started(
            [*command, *options.split()],
            folder / "log",
            lambda: requests.get(f"{uri}/ping", timeout=60).ok,
            cwd=folder,
            env=os.environ | {"PATH": path},
        ):
            yield uri


def ask(server: str, content: list[dict] | dict, form: str = "dataframe_records") -> list[dict]:
    request = urllib.request.Request(
        f"{server}/invocations",
        json.dumps({form: content}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read(), parse_constant=pytest.fail)["predictions"]


def require_answer(row: dict, expected: dict[str, float]) -> None:
    assert (row["status"], row["reason"]) == ("ok", "")
    assert {label: row[label] for label in LABELS} == pytest.approx(expected, abs=1e-4)
    assert row["emotion"] == max(expected, key=expected.__getitem__)


def test_a_real_server_answers_paths_bytes_and_waveforms(server, store, clip, tmp_path):
    expected = store.predictor.predict(str(clip)).probabilities
    (row,) = ask(server, [{"path": str(clip)}])
    require_answer(row, expected)
    (row,) = ask(server, [{"audio": base64.b64encode(clip.read_bytes()).decode()}])
    require_answer(row, expected)
    samples = voice(1.2, 8_000)
    (row,) = ask(server, [{"waveform": samples.tolist(), "sample_rate": 8_000}])
    waveform = store.predictor.predict_samples(samples, 8_000, "").probabilities
    require_answer(row, waveform)


def packaged(store: Store) -> PackagedModel:
    model = PackagedModel.__new__(PackagedModel)
    model.predictor = store.predictor
    return model


def in_columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows if name in row] for row in rows for name in row}


def in_split(rows: list[dict]) -> dict[str, list]:
    columns = list(in_columns(rows))
    return {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}


def test_a_real_server_answers_every_form_of_request(server, store, clip):
    """The forms of MLflow's documentation; samples and rates are integers, audio is a data URI."""
    audio = base64.b64encode(clip.read_bytes()).decode()
    samples = np.round(voice(1.2, 8_000) * 32_767).astype(int).tolist()
    path, sound = {"path": str(clip)}, {"audio": f"data:audio/wav;base64,{audio}"}
    numbers = {"waveform": samples, "sample_rate": 8_000}
    from_file = store.predictor.predict(clip).probabilities
    from_samples = store.predictor.predict(np.array(samples, np.int16), 8_000).probabilities
    for row, expected in ((path, from_file), (sound, from_file), (numbers, from_samples)):
        for rows in ([row], [row, row]):
            contents: list[tuple[str, list[dict] | dict]] = [
                ("dataframe_records", rows), ("dataframe_split", in_split(rows)),
                ("instances", rows), ("inputs", rows), ("inputs", in_columns(rows)),
            ]  # fmt: skip
            for form, content in (*contents, *([("inputs", row)] if rows == [row] else [])):
                answers = ask(server, content, form)
                assert len(answers) == len(rows), (form, content)
                for answer in answers:
                    require_answer(answer, expected)
    mixed = [path, numbers, sound]
    expected_rows = (from_file, from_samples, from_file)
    for answers in (
        ask(server, mixed), ask(server, in_split(mixed), "dataframe_split"),
        ask(server, mixed, "inputs"),
    ):  # fmt: skip
        for answer, expected in zip(answers, expected_rows, strict=True):
            require_answer(answer, expected)


@pytest.mark.parametrize(
    ("form", "content"),
    [
        ("dataframe_records", [{"pth": "a.wav"}]),
        ("inputs", ["a.wav"]),
        ("inputs", [0.1, 0.2]),
        ("instances", [[0.1, 0.2]]),
        ("dataframe_split", {"data": [["a.wav"]]}),
        ("instances", [{"path": "a.wav"}, {"waveform": [0.1, 0.2]}]),  # MLflow joins these rows
    ],
)
def test_a_real_server_names_the_form_to_send_instead(server, form, content):
    (answer,) = ask(server, content, form)
    assert answer["status"] == "unreadable"
    assert 'send {"dataframe_records": [...]} with a row for each recording' in answer["reason"]


def test_a_real_server_says_what_is_wrong_row_by_row(server, store, clip):
    rows = ask(server, [{"path": "nowhere.wav"}, {"path": str(clip)}])
    assert rows[0]["status"] == "unreadable"
    assert rows[0]["reason"]
    assert rows[0]["emotion"] == ""
    assert [rows[0][label] for label in LABELS] == [None] * len(LABELS)
    require_answer(rows[1], store.predictor.predict(str(clip)).probabilities)
    (silent,) = ask(server, [{"waveform": [0.0] * 16_000}])
    assert silent["status"] == "silent"


def test_the_stored_model_has_a_signature_and_an_example_that_it_scores(store):
    import mlflow

    model = mlflow.pyfunc.load_model(str(store.model))
    assert model.metadata.signature is not None
    inputs = {column.name: column.required for column in model.metadata.signature.inputs}
    assert inputs == {"path": False, "audio": False, "waveform": False, "sample_rate": False}
    outputs = {column.name: column.required for column in model.metadata.signature.outputs}
    probabilities = dict.fromkeys(LABELS, False)  # a row that cannot be scored has none
    assert outputs == {
        "emotion": True,
        **probabilities,
        "status": True,
        "reason": True,
        "warning": True,
    }
    example = model.metadata.load_input_example(str(store.model))
    found = model.predict(example)
    assert example is not None
    tone = np.asarray(example["waveform"][0], np.float32)
    (row,) = found.to_dict(orient="records")
    expected = store.predictor.predict_samples(tone, 16_000, "").probabilities
    assert {label: row[label] for label in LABELS} == pytest.approx(expected, abs=1e-4)
    assert list(found.columns) == model.metadata.signature.outputs.input_names()


def test_loading_and_predicting_need_neither_ray_nor_this_repository(store, clip, tmp_path):
    code = f"""
import sys
import mlflow
import pandas as pd
model = mlflow.pyfunc.load_model({str(store.model)!r})
print(model.predict(pd.DataFrame({{"path": [{str(clip)!r}]}}))["emotion"][0])
import ser_ray
assert "ray" not in sys.modules and "torchvision" not in sys.modules
assert ser_ray.__file__.endswith("any name/code/ser_ray/__init__.py"), ser_ray.__file__
"""
    # The package of this repository is hidden: what is imported is the model's own copy.
    hide = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ser_ray' not in str(f)]\n"
    command = [sys.executable, "-I", "-c", hide + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == store.predictor.predict(str(clip)).emotion


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "none of path, audio and waveform; send"),
        ({"path": "", "audio": ""}, "a value in none of path, audio and waveform; send"),
        ({"path": "a.wav", "audio": b""}, "the row has path and audio; send"),
        ({"path": 1}, "path is not a string; send"),
        ({"audio": "%"}, "neither base64 nor a data URI"),
        ({"audio": "data:audio/wav,%00"}, "neither base64 nor a data URI"),
        ({"audio": [82, 73, 70, 70]}, "neither base64 nor a data URI"),
        ({"waveform": "a.wav"}, "not one channel of numbers; send"),
        ({"waveform": ["1", "2"]}, "not one channel of numbers; send"),
        ({"waveform": [0.1, None]}, "not one channel of numbers; send"),
        ({"waveform": [[0.1], [0.1, 0.2]]}, "not a list of numbers"),
        ({"waveform": [[0.1], [0.2]]}, "shape [2, 1] and type float64 are not one channel"),
        ({"waveform": [0.1] * 999, "sample_rate": "16 kHz"}, "not a number but of type str; send"),
        ({"waveform": [0.1] * 999, "sample_rate": "16000"}, "not a number but of type str; send"),
        ({"waveform": [0.1] * 999, "sample_rate": [16000]}, "not a number but of type list; send"),
        ({"waveform": [0.1, float("inf")]}, "finite numbers"),
        ({"waveform": [0.1] * 999, "sample_rate": -1}, "the sample rate is -1: it must be a whole"),
        ({"waveform": [0.1] * 999, "sample_rate": 16}, "the sample rate is 16: it must be a whole"),
        ({"waveform": [1e25] * 999}, "as large as 1e+25"),
        ({"path": "nowhere://a.wav"}, "no filesystem opens"),
        ({"audio": b"no sound"}, "not a supported audio"),
    ],
)
def test_rows_that_hold_no_recording_are_answered_with_a_reason(store, row, reason):
    import pandas as pd

    frame = pd.DataFrame([row or {"path": None}], dtype=object)
    (answer,) = packaged(store).predict(frame).to_dict(orient="records")
    assert reason in answer["reason"]
    assert answer["status"] != "ok"
    assert [answer[label] for label in LABELS] == [None] * len(LABELS), "NaN is not JSON"


def test_content_of_a_file_is_found_in_every_form_of_base64_and_bytes(store, clip):
    import pandas as pd

    content = clip.read_bytes()
    text = base64.b64encode(content).decode()
    forms = [
        text, f" {text[:76]}\n{text[76:]}",
        text.rstrip("="), text.replace("+", "-").replace("/", "_"),
        f"data:audio/wav;base64,{text}", f"DATA:audio/webm;codecs=opus;BASE64,{quote(text)}",
        content, bytearray(content), memoryview(content),
    ]  # fmt: skip
    answers = packaged(store).predict(pd.DataFrame({"audio": forms}, dtype=object))
    expected = store.predictor.predict(clip).probabilities
    assert len(answers) == len(forms)
    for answer in answers.to_dict(orient="records"):
        require_answer(answer, expected)


@pytest.mark.parametrize(
    ("columns", "answers"),
    [
        ({"waveform": [0.1, None, 0.2]}, 1),  # MLflow's table of {"inputs": {"waveform": [...]}}
        ({"waveform": [True, False]}, 1),
        ({"audio": [82, 73, 70, 70]}, 1),
        ({"audio": [[82, 73, 70, 70]]}, 1),
        ({"path": [["a.wav", "b.wav"]]}, 2),
        ({"path": [["a.wav", "b.wav"], "c.wav"]}, 2),
        ({"waveform": [0.1, None], "path": [None, "a.wav"]}, 2),
        ({"path": ["a.wav", None], "audio": [float("nan"), "%"]}, 2),
    ],
)
def test_a_request_gets_one_answer_for_each_recording(store, columns, answers):
    """A list of bytes got one refusal for each byte."""
    import pandas as pd

    found = packaged(store).predict(pd.DataFrame(columns))
    assert len(found) == answers
    assert "ok" not in set(found["status"])


def test_a_label_that_is_named_like_another_column_has_a_column_of_its_own(tmp_path):
    import pandas as pd

    from ser_ray.inference.packaged import example_input

    labels = ("angry", "emotion", "status", "warning")
    make_checkpoint(tmp_path, labels=labels)
    model = PackagedModel(tmp_path)
    (answer,) = model.predict(pd.DataFrame(example_input())).to_dict(orient="records")
    assert answer["status"] == "ok"
    assert "background" in answer["warning"]
    assert answer["emotion"] in labels
    names = ("angry", "p_emotion", "p_status", "p_warning")
    assert sum(answer[name] for name in names) == pytest.approx(1)
    assert model_signature(labels).outputs.input_names() == list(answer)


def test_registered_by_the_search_and_found_by_every_name(store, clip, capsys):
    arguments = ["register", store.search, "--tracking-uri", store.uri, "--name", "ser-ray"]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == "1"
    expected = store.predictor.predict(str(clip)).probabilities
    names = ("any name", store.run_id, f"runs:/{store.run_id}/model", f"runs:/{store.run_id}")
    for name in (*names, "models:/ser-ray@champion", "models:/ser-ray/1"):
        with local_model(name, store.uri) as checkpoint:
            found = Predictor(checkpoint).predict(str(clip))
        assert found.probabilities == pytest.approx(expected)
    from mlflow import MlflowClient

    version = MlflowClient(tracking_uri=store.uri).get_model_version_by_alias("ser-ray", "champion")
    assert version.run_id == store.run_id
    assert version.tags["test/ua"] == "0.5000"
    assert version.tags["protocol"] == SCORES["protocol"]
    assert version.tags["feature"] == "mel"
    assert version.tags["shards.fingerprint"] == "f00d"
    assert version.description is not None
    assert "UA 50.0% (95 % interval over 2 speakers 30.0% to 70.0%)" in version.description
    assert "| female | 8 | 62.5% | 50.0% |" in version.description


def test_a_run_whose_name_has_an_apostrophe_is_a_model(store):
    with (
        pytest.raises(TrackingError, match="no run of this name in MLflow"),
        local_model("the speaker's", store.uri),
    ):
        pass
    run = store.start("the speaker's own", TrainConfig(), ua=0.1)
    with (
        pytest.raises(TrackingError, match=f"{run.run_id}: this run has no model"),
        local_model("the speaker's own", store.uri),
    ):
        pass


def test_a_long_card_is_a_description_that_every_store_accepts(store):
    card = f"# Model\n\n{'x' * 9_000}\n\n## Limits\n\nTest.\n\n## Licence\n\nFree."
    version = register_model(store.run_id, store.uri, "long", "", {}, card)
    description = str(connect(store.uri).get_model_version("long", version).description)
    assert len(description) == MAX_TAG_LENGTH
    assert description.startswith("# Model")
    assert description.endswith("\n\n[...]\n\n\n## Limits\n\nTest.\n\n## Licence\n\nFree.")


def test_an_alias_that_mlflow_refuses_leaves_no_version_behind(store, capsys):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store.uri)
    before = len(client.search_model_versions("name='ser-ray'"))
    arguments = ["register", store.search, "--tracking-uri", store.uri, "--alias", "v7"]
    assert main(arguments) == 2
    assert "ser-ray was not registered" in capsys.readouterr().err
    assert len(client.search_model_versions("name='ser-ray'")) == before


def test_a_model_is_found_by_its_test_score_under_the_name_of_its_run(store):
    client = connect(store.uri)
    (found,) = client.search_logged_models(["1"], "metrics.`test/ua` > 0.4")
    assert (found.name, found.source_run_id) == ("any name", store.run_id)
    (metric,) = [metric for metric in found.metrics or () if metric.key == "test/ua"]
    assert (metric.dataset_name, metric.dataset_digest) == ("own", "f00d")
    assert not client.search_logged_models(["1"], "metrics.`test/ua` > 0.6")


def test_a_trial_that_kept_no_model_says_how_to_get_one(store):
    worse = store.start("alone", TrainConfig(lr_max=0.5), ua=0.4).run_id
    with pytest.raises(TrackingError, match=f"train --like {worse}"):
        best_training_of(worse, store.uri)
    assert best_training_of(store.trial, store.uri) == store.run_id


@pytest.mark.parametrize("name", ["0" * 32, "models:/nobody@champion", "nobody"])
def test_a_name_that_is_not_there_is_an_error_that_says_where_it_was_looked_up(store, name):
    with (
        pytest.raises(TrackingError, match=r"(no such model|no run).* in (sqlite|MLflow)"),
        local_model(name, store.uri),
    ):
        pass


def test_the_card_of_a_ravdess_model_names_its_limits_and_licence(tmp_path):
    card = make_checkpoint(tmp_path, corpus="ravdess")
    text = render("model_card.md.jinja", card=card, scores=None, validation_ua=0.6)
    for words in ("North American English", "CC BY-NC-SA", "24 professional actors", "60.0%"):
        assert words in text
    assert "has not been scored" in text
    assert " | " not in text
    scores = {
        "intervals": {"ua": (0.4, 0.6), "count": 2, "drawn": "speakers"}, "protocol": "loso",
        "clips": 4, "ua": 0.5, "wa": 0.5, "f1": 0.5, "ece": 0.1, "recall": {"a|b": 0.5},
        "groups": {"speaker": [{"speaker": "x|y", "clips": 2, "wa": 0.5, "ua": 0.5}] * 2},
    }  # fmt: skip
    scored = render("model_card.md.jinja", card=card, scores=scores, validation_ua=0.6)
    assert "| a\\|b | 50.0% |" in scored
    assert "| x\\|y | 2 |" in scored
    assert "of the last epoch; folds and trials are selected by this score" in text
    card = make_checkpoint(tmp_path, corpus="synthetic")
    synthetic = render("model_card.md.jinja", card=card, scores=None, validation_ua=0.6)
    assert "CC BY-NC-SA" not in synthetic
