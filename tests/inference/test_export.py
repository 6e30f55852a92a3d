"""The exported files on waveforms that the export itself did not try."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ser_ray.cli.main import main
from ser_ray.cluster.connect import JOB_CONFIG
from ser_ray.errors import ResourcesError, SerRayError
from ser_ray.features.encoder import EncoderWeights
from ser_ray.inference import export as export_module
from ser_ray.inference.export import TOLERANCE, ExportResult, WaveformModel, export
from ser_ray.inference.predictor import Predictor
from ser_ray.storage.paths import filesystem_of
from ser_ray.training.checkpoint import ENCODER
from ser_ray.training.data import Normalisation
from ser_ray.training.recipe import TrainConfig
from tests.clips import voice
from tests.encoders import FAMILIES, Family, tiny_card, write_tiny
from tests.models import FEATURES, LABELS, make_checkpoint, make_encoder_checkpoint
from tests.s3_server import s3_bucket

RATE = 16_000


def waveforms() -> list[np.ndarray]:
    """Waveforms from less than a window to more than the longest clip, some with silent ends."""
    lengths = (0.31, 0.73, 1.2799, 1.28, 2.0, 2.9)
    sounds = [voice(seconds, RATE, seed) for seed, seconds in enumerate(lengths)]
    padded = [np.concatenate([np.zeros(777), s[:RATE], np.zeros(5001)]) for s in sounds[2:4]]
    return [sound.astype(np.float32) for sound in (*sounds, *padded, voice(2.9, RATE)[:-77])]


def run_of(module: torch.nn.Module):
    """The module as a function of arrays."""

    @torch.no_grad()
    def run(waveform: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(waveform)).numpy()

    return run


def require_same(run, predictor: Predictor) -> None:
    for waveform in waveforms():
        expected = predictor.predict_samples(waveform, RATE, "").probabilities
        assert expected is not None
        np.testing.assert_allclose(run(waveform), list(expected.values()), atol=TOLERANCE)
    silent, blip = np.zeros((2, RATE), np.float32)
    blip[300:1000] = 0.5
    for nothing in (silent, blip, voice(3.3, RATE)):
        assert np.isnan(run(nothing)).all()


@pytest.mark.parametrize("kind", ["spectrogram", "mel", "mfcc"])
def test_the_graph_before_it_is_exported_equals_the_predictor(tmp_path, kind):
    bins = FEATURES.num_bins(kind)
    make_checkpoint(
        tmp_path,
        config=TrainConfig(feature=kind, crop_frames=63, weights="none"),
        normalisation=Normalisation(np.full(bins, -40.0), np.full(bins, 20.0)),
        temperature=0.6,
    )
    predictor = Predictor(tmp_path)
    require_same(run_of(WaveformModel(predictor).eval()), predictor)


@pytest.mark.slow
def test_onnx_runs_in_onnxruntime_and_describes_itself(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    make_checkpoint(tmp_path / "model")
    exported = export(tmp_path / "model", str(tmp_path / "model.onnx"), "onnx")
    assert exported.largest_difference < TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["labels"]) == list(LABELS)
    assert json.loads(about["sample_rate"]) == FEATURES.sample_rate
    require_same(lambda w: session.run(None, {"waveform": w})[0], Predictor(tmp_path / "model"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of its own archive's buffers
def test_torchs_exported_program_in_a_bucket_runs_without_this_package(tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    with s3_bucket("models") as uri:
        output = uri.format("exported/model.pt2")
        assert export(tmp_path / "model", output, "torch").output == output
        filesystem, path = filesystem_of(output)
        (tmp_path / "fetched.pt2").write_bytes(filesystem.open_input_file(path).read())
    assert "s3:" not in {path.name for path in tmp_path.iterdir()}
    about = {"about.json": ""}
    program = torch.export.load(tmp_path / "fetched.pt2", extra_files=about).module()
    assert json.loads(about["about.json"])["labels"] == list(LABELS)
    require_same(
        lambda w: program(torch.from_numpy(w)).detach().numpy(), Predictor(tmp_path / "model")
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("wrong", [[1, 0, 0, 0], [math.nan] * 4])
def test_a_file_whose_probabilities_differ_is_not_written(tmp_path: Path, monkeypatch, wrong):
    make_checkpoint(tmp_path)
    wrong = np.array(wrong, np.float32)
    monkeypatch.setattr(export_module, "_write_torch", lambda *_: lambda _: wrong)
    with pytest.raises(SerRayError, match="differ from those of the checkpoint by"):
        export(tmp_path, str(tmp_path / "model.pt2"), "torch")
    assert not (tmp_path / "model.pt2").exists()


def test_a_job_refuses_an_output_in_its_copy_of_the_code(tmp_path: Path, monkeypatch):
    """This happens before the checkpoint is read, because there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JOB_CONFIG, '{"runtime_env": {"working_dir": "gcs://_ray_pkg_0.zip"}}')
    with pytest.raises(ResourcesError, match="which Ray deletes after the job"):
        export(tmp_path, "ser-ray-out/model.onnx", "onnx")


def test_json_output_has_null_where_a_number_is_not_finite(checkpoint, monkeypatch, capsys):
    result = ExportResult(output="model.onnx", largest_difference=math.nan)
    monkeypatch.setattr(export_module, "export", lambda *_: result)
    assert main(["export", str(checkpoint), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert printed["largest_difference"] is None


def encoder_checkpoint(folder: Path, family: Family, mode: str) -> Predictor:
    write_tiny(folder / ENCODER, tiny_card(family, mode))
    make_encoder_checkpoint(folder, EncoderWeights.read(str(folder / ENCODER)).card)
    return Predictor(folder)


@pytest.mark.parametrize(("family", "mode"), FAMILIES)
def test_the_graph_with_an_encoder_equals_the_predictor(tmp_path, family, mode):
    predictor = encoder_checkpoint(tmp_path, family, mode)
    require_same(run_of(WaveformModel(predictor).eval()), predictor)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "mode"), FAMILIES)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_model_with_an_encoder_is_one_file(tmp_path, kind, family, mode):
    predictor = encoder_checkpoint(tmp_path, family, mode)
    output = str(tmp_path / f"model.{kind}")
    assert export(tmp_path, output, kind).largest_difference < TOLERANCE
    if kind == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
        require_same(lambda waveform: session.run(None, {"waveform": waveform})[0], predictor)
    else:
        require_same(run_of(torch.export.load(output).module()), predictor)
