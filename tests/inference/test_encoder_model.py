"""A model on an encoder's layers, from the shards to the answer, with tiny random weights."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from ser_ray.corpus.manifest import list_corpus
from ser_ray.distributed.run_config import RunConfig
from ser_ray.distributed.train import train
from ser_ray.errors import CheckpointError, EncoderError
from ser_ray.evaluation.evaluate import evaluate
from ser_ray.features.encoder import EncoderWeights
from ser_ray.inference.packaged import PackagedModel, requirements
from ser_ray.inference.predictor import Predictor
from ser_ray.search import crossval
from ser_ray.search.fold_files import fold_folder, score_and_store_fold
from ser_ray.shards.layout import weights_name
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.training.checkpoint import CARD, ENCODER, read_card, read_encoder
from ser_ray.training.recipe import TrainConfig
from tests.clips import six_speakers, voice
from tests.encoders import tiny_weights
from tests.mlflow_store import new_store
from tests.shards.test_encode import encode
from tests.shards.test_shards import write_shards

RECIPE = TrainConfig(feature="tiny", protocol="speaker-3", epochs=2, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def shards(folder: Path) -> ShardSet:
    shards = write_shards(list_corpus(str(six_speakers(folder / "corpus"))), folder / "set")
    shards = encode(shards, list(shards.card.shard_numbers))
    tiny_weights().write(folder / "set" / weights_name("tiny"))
    return shards


@pytest.fixture(scope="module")
def selected(folder: Path, shards: ShardSet) -> Path:
    """The selected checkpoint of a training in this process."""
    run = RunConfig(storage=str(folder / "runs"), tracking_uri=new_store(folder), device="cpu")
    return Path(train(shards.uri, RECIPE, run, on_epoch=lambda _: None).checkpoint)


def test_prediction_equals_evaluation_on_the_shards(selected: Path, shards: ShardSet) -> None:
    table = evaluate(selected, shards.uri).predictions.to_pylist()
    predictor = Predictor(selected)
    assert len(table) == 8
    for row in table:
        found = predictor.predict(row["path"]).probabilities
        assert found is not None
        for label, probability in found.items():
            assert probability == pytest.approx(row[f"p_{label}"], abs=1e-4)
    together = predictor.predict([row["path"] for row in table])
    assert [item.path for item in together] == [row["path"] for row in table]


def test_a_long_recording_has_windows_as_long_as_the_longest_clip(selected: Path) -> None:
    found = Predictor(selected).predict_samples(voice(7.0, 16_000), 16_000, "long")
    assert [round(part.end - part.start, 2) for part in found.timeline] == [2.0] * 6
    assert sum((found.probabilities or {}).values()) == pytest.approx(1)


def test_the_model_holds_its_encoder_once_and_packages_it(selected: Path) -> None:
    assert EncoderWeights.read(str(selected / ENCODER)).card == tiny_weights().card
    others = [path for path in selected.parents[1].rglob(ENCODER) if path.parent != selected]
    assert others == []
    assert "torchaudio" in requirements(selected)
    import pandas as pd

    samples = voice(1.0, 16_000).tolist()
    [row] = (
        PackagedModel(selected).predict(pd.DataFrame({"waveform": [samples]})).to_dict("records")
    )
    assert row["status"] == "ok"


def test_the_run_shows_the_weights_of_the_layers(selected: Path) -> None:
    page = (selected.parent / "report.html").read_text()
    assert "Weight of every layer of the encoder" in page
    import mlflow

    run = json.loads((selected / "run.json").read_text())
    client = mlflow.MlflowClient(run["tracking_uri"])
    plots = {item.path for item in client.list_artifacts(run["run_id"], "plots")}
    assert "plots/layer_weights.png" in plots


def test_without_a_copy_the_encoder_is_found_by_place_and_hash(
    selected: Path, shards: ShardSet, tmp_path: Path
) -> None:
    shutil.copytree(selected, named := tmp_path / "named")
    (named / ENCODER).unlink()
    card = read_card(named)
    assert card.encoder_file == f"{shards.uri}/{weights_name('tiny')}"
    wave = voice(1.0, 16_000)
    expected = Predictor(selected).predict(wave, 16_000).probabilities
    assert Predictor(named).predict(wave, 16_000).probabilities == expected
    tiny_weights(seed=1).write(named / ENCODER)
    assert card.encoder is not None
    with pytest.raises(EncoderError, match=f"trained with {card.encoder.weights[:16]}"):
        Predictor(named)
    (named / ENCODER).unlink()
    (named / CARD).write_text(dataclasses.replace(card, encoder_file="gone").to_json())
    with pytest.raises(EncoderError, match=r"tiny cannot be read .*no such file.* put them into"):
        read_encoder(named, read_card(named))


@pytest.mark.parametrize("keeps", [True, False])
def test_of_a_cross_validation_the_model_in_mlflow_holds_its_encoder(
    selected: Path, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps: bool
) -> None:
    """The other folds' models name its place in the shards and its hash."""
    score_and_store_fold(selected, shards, RECIPE, folder=str(tmp_path), part="validation")
    fold = Path(fold_folder(str(tmp_path), RECIPE))
    wave = voice(1.0, 16_000)
    expected = Predictor(selected).predict(wave, 16_000).probabilities
    assert not (fold / ENCODER).exists()
    assert Predictor(fold).predict(wave, 16_000).probabilities == expected
    best = SimpleNamespace(recipe=RECIPE, run_id="best", selected={})
    logged = MagicMock()
    monkeypatch.setattr(crossval, "Tracker", logged)
    monkeypatch.setattr(crossval, "best_of", lambda trials: best)
    monkeypatch.setattr(crossval, "model_id_of", lambda run: "")
    study = MagicMock(run=RunConfig(keep_encoder=keeps))
    study.folder.location = str(tmp_path)
    crossval._log_best_model(study)
    [path, _] = logged.return_value.log_model.call_args.args
    assert path == fold
    assert (fold / ENCODER).is_file() == keeps


def test_a_column_of_other_weights_is_not_scored(selected: Path, folder: Path) -> None:
    other = write_shards(list_corpus(str(folder / "corpus")), folder / "other")
    other = encode(other, list(other.card.shard_numbers), seed=1)
    with pytest.raises(CheckpointError, match="its column tiny comes from weights with the hash"):
        evaluate(selected, other.uri, protocol="speaker-3")
    assert np.isfinite(open_shards(other.uri).features("tiny")).all()
