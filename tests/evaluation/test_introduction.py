"""What the demo page says of a model, and which clips it offers."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from ser_ray.errors import TrackingError
from ser_ray.evaluation import evaluate, introduction
from ser_ray.evaluation.introduction import introduce
from tests.conftest import make_memory_shards
from tests.models import CONFIG, make_checkpoint


def test_a_model_is_introduced_by_its_runs_name_its_score_and_test_clips(tmp_path, monkeypatch):
    shards = make_memory_shards()
    column = shards.table["emotion"].to_pylist()
    paths = pa.array([f"{tmp_path}/{number} {label}.wav" for number, label in enumerate(column)])
    calm = [path for path in paths.to_pylist() if path.endswith("calm.wav")]
    for path in calm:
        Path(path).touch()  # the other clips are gone
    place = shards.table.schema.get_field_index("path")
    shards.table = shards.table.set_column(place, "path", paths)
    sets = {"here": shards}
    for module in (introduction, evaluate):
        monkeypatch.setattr(module, "open_corpora", lambda places, known: sets[places[0]])
    scores = {"clips": 16, "ua": 0.5}
    monkeypatch.setattr(introduction, "read_test_scores", lambda *_: scores)

    selected = tmp_path / "mel-fold0" / "selected"
    card = make_checkpoint(selected, config=replace(CONFIG, validation_speakers=0))
    origin = {"run_id": "0123", "tracking_uri": "http://server", "shards": ["here"]}
    (selected / "run.json").write_text(json.dumps(origin))
    about, [(path, label)] = introduce(selected, "its folder")
    assert about.startswith("**mel-fold0**: ResNet18 on mel of ")
    assert label == "calm"
    assert path in calm
    score = "On 16 clips of voices that it was not trained on, its UA (mean recall of the "
    score += "emotions) is 50.0%; guessing would reach 25.0%."
    assert f". {score} The model" in about

    place = shards.table.schema.get_field_index("end")
    shards.table = shards.table.set_column(place, "end", pa.array([1.0] * len(paths)))
    assert introduce(selected, "")[1] == []  # the page would play the complete file

    shards.card.fingerprint = "other shards"
    assert introduce(selected, "")[1] == []
    dependent = card.split | {"speaker_dependent": True}
    make_checkpoint(tmp_path / "downloaded", split=dependent)
    (tmp_path / "downloaded" / "run.json").write_text(json.dumps(origin))
    about, _ = introduce(tmp_path / "downloaded", "models:/ser-ray@champion")
    assert about.startswith("**models:/ser-ray@champion**: ")
    assert "other clips of the voices that it was trained on" in about


def test_labels_are_shown_as_they_are(tmp_path):
    make_checkpoint(tmp_path, labels=("<i>lively</i>", "Ärger & Wut"))
    about, _ = introduce(tmp_path, "mine")
    assert "one of &lt;i&gt;lively&lt;/i&gt;, Ärger &amp; Wut. It says" in about


@pytest.mark.parametrize("has_record", [True, False])
def test_a_model_without_a_reachable_run_says_how_its_score_is_found(
    tmp_path, monkeypatch, has_record
):
    def away(*_: str) -> None:
        raise TrackingError("the store does not answer")

    monkeypatch.setattr(introduction, "read_test_scores", away)
    make_checkpoint(tmp_path)
    if has_record:
        origin = {"run_id": "0123", "tracking_uri": "http://127.0.0.1:9"}
        (tmp_path / "run.json").write_text(json.dumps(origin))
    about, examples = introduce(tmp_path, "a model")
    assert "Its test score is not known; ser-ray evaluate measures it." in about
    assert examples == []
