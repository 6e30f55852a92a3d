"""Predictions as text, table and HTML, and the forms of audio that `predict` takes."""

from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest

from ser_ray.errors import ConfigError
from ser_ray.inference.prediction import Prediction, Predictions, shortest_names
from tests.clips import voice, write_wav
from tests.models import LABELS


def test_equal_file_names_get_their_folders():
    paths = ["/a/x/1.wav", "/b/x/1.wav", "/b/y/1.wav", "/b/2.wav", "s3://b/2.wav", "3.wav"]
    assert list(shortest_names([*paths, paths[0]]).values()) == paths
    assert shortest_names(paths[2:4]) == {"/b/y/1.wav": "1.wav", "/b/2.wav": "2.wav"}
    same = Predictions(
        Prediction(path=path, status="silent", reason="no sound") for path in paths[:2]
    )
    assert str(same) == "/a/x/1.wav: silent (no sound)\n/b/x/1.wav: silent (no sound)"
    assert str(same[0]) == "1.wav: silent (no sound)"


def test_files_samples_and_several_of_them_are_answered_alike(predictor, tmp_path):
    path = write_wav(tmp_path / "a.wav", voice(sample_rate=16_000), 16_000)
    from_file = predictor.predict(path)
    assert predictor.predict(str(path)) == from_file
    assert predictor.predict([path, str(path)]) == (from_file, from_file)
    assert predictor.predict(tmp_path.glob("*.wav")) == (from_file,)
    samples = np.round(voice(sample_rate=16_000) * 32_767).astype(np.int16)
    answers = [
        predictor.predict(form, 16_000)
        for form in (samples, samples.astype(np.int64), samples / 32_768)
    ]
    assert answers[0].path == "samples"
    assert answers[0].probabilities == answers[1].probabilities == answers[2].probabilities
    assert predictor.predict([samples], 16_000) == (answers[0],)
    with pytest.raises(ConfigError, match=r"predict\(samples, 16000\)"):
        predictor.predict(samples)
    stereo = predictor.predict(np.zeros((16_000, 2)), 16_000)
    assert "shape [16000, 2] and type float64 are not one channel" in stereo.reason


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64])
def test_integers_of_any_type_are_on_the_scale_of_16_bits(predictor, kind):
    """Numbers up to 8 are quiet, though floats up to 8 are not."""
    muted = np.random.default_rng(0).integers(-1, 2, 16_000, np.int16)
    quiet = np.round(7 * np.sin(np.arange(16_000) / 10)).astype(np.int16)
    for samples, status in ((muted, "silent"), (quiet, "ok")):
        expected = predictor.predict(samples, 16_000)
        assert expected.status == status
        assert predictor.predict(samples.astype(kind), 16_000) == expected
    assert predictor.predict(quiet / 1.0, 16_000).probabilities != expected.probabilities
    beyond = predictor.predict(np.array([40_000, -40_000] * 8_000), 16_000)
    assert beyond.reason == "it has samples as large as 40000"


def test_answers_become_a_table_with_the_columns_of_the_batch_pass(predictor, tmp_path):
    long = write_wav(tmp_path / "long.wav", voice(5, 16_000), 16_000)
    answers = predictor.predict([long, tmp_path / "missing.wav"])
    table = answers.to_pandas()
    shares = [f"p_{label}" for label in LABELS]
    assert answers[0].to_pandas()[shares].equals(table[shares][:1])
    assert list(table) == [
        *("path", "status", "reason", "warning", "emotion", "duration"), *shares, "timeline"
    ]  # fmt: skip
    assert table[shares].loc[0].tolist() == list(answers[0].probabilities.values())
    assert table[shares].loc[1].isna().all()
    assert [len(windows) for windows in table["timeline"]] == [len(answers[0].timeline), 0]


def test_a_notebook_draws_answers_and_escapes_names(predictor, tmp_path):
    sound = write_wav(tmp_path / "<i>.wav", voice(5, 16_000), 16_000)
    answer = predictor.predict(sound)
    lines = str(ElementTree.fromstring(answer._repr_html_()).text).splitlines()
    assert lines[0].startswith(f"<i>.wav: {answer.emotion} (")
    assert lines[1] == f"  {answer.timeline[0]}"
    shown = [line.split()[0] for line in lines[-len(LABELS) :]]
    assert shown == sorted(LABELS, key=lambda label: -answer.probabilities[label])
    table = Predictions([answer, answer])._repr_html_()
    assert table.count(f"<td>{answer.emotion}<") == 2
    assert table.count(f"<td>{len(answer.timeline)} windows</td>") == 2
    long = "a/" * 40 + "x.wav"
    assert long in Predictions([replace(answer, path=long)])._repr_html_()
    assert "<i>" not in table
