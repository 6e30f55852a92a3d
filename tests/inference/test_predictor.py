"""Predictions for single files, compared with the network on features made by hand."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ser_ray.cli.main import main
from ser_ray.errors import CheckpointError, ConfigError
from ser_ray.features.config import FeatureConfig
from ser_ray.features.decode import decode
from ser_ray.features.loudness import measure_loudness
from ser_ray.features.samples import Sound
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.prediction import prediction_row
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import RecordingReader, window_start_seconds
from ser_ray.storage.paths import NOT_UTF8, NULL_CHARACTER
from ser_ray.training.checkpoint import CARD, MODEL, read_network
from ser_ray.training.data import Clips
from ser_ray.training.scoring import predict_clips
from tests.clips import voice, write_sound, write_video, write_wav
from tests.models import CONFIG, FEATURES, LABELS, make_checkpoint

RATE = 48_000


def test_a_list_of_numbers_holds_samples_and_an_array_of_texts_holds_paths(checkpoint, tmp_path):
    predictor: Any = Predictor(checkpoint)
    path = write_wav(tmp_path / "clip.wav", voice())
    samples = voice()
    expected = predictor.predict(samples, RATE)
    assert predictor.predict(samples.tolist(), RATE) == expected
    assert predictor.predict(tuple(samples.tolist()), RATE) == expected
    assert list(predictor.predict(np.array([str(path)]))) == [predictor.predict(path)]
    with pytest.raises(ConfigError, match="need their rate"):
        predictor.predict(samples.tolist())
    others: list[Any] = [None, 5, [None], {"path": str(path)}]
    for recording in others:
        with pytest.raises(ConfigError, match=r"a recording is of type \w+: give a path"):
            predictor.predict(recording, RATE)
    refused = predictor.predict_samples(samples, np.array([RATE, RATE]), "samples")
    assert refused.reason == "the sample rate is not a number but of type ndarray"


def as_in_validation(checkpoint: Path, predictor: Predictor, path: Path) -> np.ndarray:
    """Probabilities by the trained network and the training's own windows."""
    samples, rate, _ = decode(str(path))
    extract = FeatureExtractor(FEATURES)
    features = extract.features(extract.waveform(samples, rate))["mel"].astype(np.float16)
    clips = Clips.resident(
        features[None],
        np.array([features.shape[1]]),
        np.array([0]),
        predictor.card.normalisation,
        torch.device("cpu"),
    )
    network = read_network(checkpoint, predictor.card)
    return predict_clips(network, clips, np.array([0]), CONFIG, len(LABELS))[0]


def test_the_predictors_network_answers_as_the_trained_one(checkpoint, predictor):
    batch = torch.randn(3, 1, 32, 64)
    with torch.inference_mode():
        expected = read_network(checkpoint, predictor.card)(batch)
        found = predictor.network(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_windows_are_where_the_sound_is_at_odd_rates(predictor):
    """At 22,050 Hz, a hundredth of a second is not an integral number of samples."""
    rate, at = 22_050, 600
    sound = np.zeros(rate * 1000, np.int16)
    sound[rate * at : rate * (at + 8)] = 20_000 * voice(8, rate)
    recording = predictor.reader.read_samples(sound, rate, "tone")
    starts, ends = zip(*recording.windows, strict=True)
    assert min(starts) < at < min(ends)
    assert max(starts) < at + 8 < max(ends)


@pytest.mark.parametrize(
    ("rate", "kind"),
    [(16_000, "mel"), (22_050, "mel"), (11_025, "mel"), (22_050, "an encoder")],
)
def test_continuous_sound_loses_no_window_at_any_rate(rate, kind):
    """6.5 s are the most: a window every 3.25 s up to 22.75 s, and one that ends at 30 s."""
    reader = RecordingReader(FeatureConfig(max_seconds=6.5), kind, crop_frames=400)
    recording = reader.read_samples(voice(30, rate), rate, "talk")
    starts = [start for start, _ in recording.windows]
    assert starts == pytest.approx([3.25 * number for number in range(8)] + [23.5])
    assert len(recording.features) == 9


def test_the_shortest_crop_gives_windows_with_enough_sound(predictor):
    reader = RecordingReader(FEATURES, "mel", crop_frames=1)
    recording = reader.read_samples(voice(4, 16_000), 16_000, "talk")
    assert recording.prediction.status == "ok"
    lengths = [end - start for start, end in recording.windows]
    assert lengths == pytest.approx([2 * FEATURES.min_seconds] * 19), "one every 0.2 s up to 3.6 s"


@pytest.mark.parametrize("seconds", [0.7, 1.25, 2.6])  # below, about and above one crop
def test_a_clip_is_scored_as_in_validation(checkpoint, predictor, tmp_path, seconds):
    path = write_wav(tmp_path / "clip.wav", voice(seconds, seed=3))
    found = predictor.predict(str(path))
    expected = as_in_validation(checkpoint, predictor, path)
    np.testing.assert_allclose(list(found.probabilities.values()), expected, atol=1e-4)
    assert found.emotion == LABELS[int(expected.argmax())]
    assert found.duration == pytest.approx(seconds)
    assert found.timeline == ()


def test_a_clip_scores_the_same_beside_others(predictor, tmp_path):
    paths = [
        write_wav(tmp_path / f"{seed}.wav", voice(0.5 + seed / 4, seed=seed)) for seed in range(9)
    ]
    together = predictor.predict_features([predictor.reader.read(str(path)) for path in paths])
    for path, found in zip(paths, together, strict=True):
        alone = predictor.predict(str(path))
        assert found.path == str(path)
        assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "codec"), [("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.ogg", "libopus")]
)
def test_any_format_gives_about_the_wavs_answer(predictor, tmp_path, name, codec):
    sound = voice(1.0, seed=1)
    container = {"flac": "flac", "mp3": "mp3", "ogg": "ogg"}[name[2:]]
    path = write_sound(tmp_path / name, sound, codec, container)
    wav = predictor.predict(str(write_wav(tmp_path / "a.wav", sound)))
    found = predictor.predict(str(path))
    assert found.probabilities == pytest.approx(wav.probabilities, abs=0.15)


def test_stereo_at_another_rate_is_scored_as_mono(predictor, tmp_path):
    sound = voice(1.0, 22_050)
    path = write_wav(tmp_path / "a.wav", np.stack([sound, sound], axis=1), 22_050)
    mono = write_wav(tmp_path / "b.wav", sound, 22_050)
    found, expected = predictor.predict(str(path)), predictor.predict(str(mono))
    assert found.probabilities == pytest.approx(expected.probabilities, abs=1e-3)


def test_bytes_and_samples_give_the_files_answer(predictor, tmp_path):
    path = write_wav(tmp_path / "a.wav", voice())
    expected = predictor.predict(str(path)).probabilities
    stream = predictor.predict_file(io.BytesIO(path.read_bytes()), "bytes")
    assert stream.probabilities == expected
    samples, rate, _ = decode(str(path))
    assert predictor.predict_samples(samples, rate, "samples").probabilities == expected


def test_a_file_that_cannot_be_scored_gets_a_reason_and_no_guess(predictor, tmp_path):
    silence = np.zeros(RATE, np.float32)
    blip = silence.copy()
    blip[1000:3000] = 0.5 * np.sin(np.arange(2000))
    files = {
        "silent": write_wav(tmp_path / "silent.wav", silence),
        "too_short": write_wav(tmp_path / "blip.wav", blip),
        "no_audio": write_video(tmp_path / "mute.mp4", None),
        "unreadable": tmp_path / "missing.wav",
    }
    for status, path in files.items():
        found = predictor.predict(str(path))
        assert found.status == status
        assert found.reason
        assert found.emotion is None
        assert found.probabilities is None


def test_the_reason_for_a_path_that_is_no_utf8_is_its_name(predictor, tmp_path):
    path = write_wav(tmp_path / "a.wav", voice()).rename(os.fsdecode(b"%s/\xff.wav" % tmp_path))
    for given in (path, str(path), os.fsencode(path), f"{tmp_path}/\ud800.wav"):
        found = predictor.predict(given)
        assert (found.status, found.reason) == ("unreadable", NOT_UTF8)
        assert found.path.encode()
    assert predictor.predict(path).path == rf"{tmp_path}/\xff.wav"
    found = predictor.predict("a\0.wav")
    assert (found.status, found.reason) == ("unreadable", NULL_CHARACTER)


def test_what_is_lost_of_a_file_is_said_even_if_the_rest_is_silent(predictor):
    sound = Sound(np.zeros(RATE, np.float32), RATE, lost_seconds=0.5)
    recording = predictor.reader.read("clip.wav", lambda file, max_seconds: sound)
    found = predictor.predict_features([recording])[0]
    assert found.status == "silent"
    assert found.warning == sound.loss
    assert str(found).endswith(f"; {sound.loss}")


def test_a_long_recording_has_a_timeline_without_its_silence(checkpoint, predictor, tmp_path):
    """Two voices with five seconds of near silence between them."""
    sound = np.concatenate([voice(4, seed=1), 1e-4 * voice(5), voice(4, seed=2)])
    found = predictor.predict(str(write_wav(tmp_path / "talk.wav", sound)))
    length = (CONFIG.crop_frames - 1) * FEATURES.hop_length / FEATURES.sample_rate
    assert found.status == "ok"
    assert found.duration == pytest.approx(13)
    assert [segment.end - segment.start for segment in found.timeline] == pytest.approx(
        [length] * len(found.timeline)
    )
    assert found.timeline[0].start == 0
    assert found.timeline[-1].end == pytest.approx(13)
    silent = [s for s in found.timeline if s.start > 4 and s.end < 9]
    assert silent == []
    sounding = [s for s in found.timeline if s.end < 4 or s.start > 9]
    assert len(sounding) >= 8
    for segment in found.timeline:
        assert sum(segment.probabilities.values()) == pytest.approx(1)
        assert segment.emotion == max(segment.probabilities, key=segment.probabilities.__getitem__)
    # A window is scored as the same stretch cut out by hand is.
    selected = found.timeline[2]
    start, stop = (round(second * RATE) for second in (selected.start, selected.end))
    cut = write_wav(tmp_path / "cut.wav", sound[start:stop])
    by_hand = as_in_validation(checkpoint, predictor, cut)
    np.testing.assert_allclose(list(selected.probabilities.values()), by_hand, atol=1e-3)
    mean = np.mean([list(s.probabilities.values()) for s in found.timeline], axis=0)
    np.testing.assert_allclose(list(found.probabilities.values()), mean)


@pytest.mark.parametrize("seconds", [0.5, 1.0, 1.49, 1.5, 1.51, 3.0, 10.37])
def test_windows_cover_a_recording_and_overlap_by_half(seconds):
    starts = window_start_seconds(seconds, 1.0)
    assert starts[0] == 0
    assert starts == sorted(set(starts))
    assert max(np.diff(starts), default=0) <= 0.5 + 1e-9
    assert starts[-1] == max(seconds - 1.0, 0)


def test_a_rounding_error_adds_no_window():
    # 12.8 - 3.2 is a little more than 6 * 1.6 in floating point.
    assert window_start_seconds(12.8, 3.2) == pytest.approx([0, 1.6, 3.2, 4.8, 6.4, 8.0, 9.6])


def test_a_broken_checkpoint_is_named(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        Predictor(tmp_path)
    shutil.copy(checkpoint / CARD, tmp_path)
    (tmp_path / MODEL).write_bytes((checkpoint / MODEL).read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be loaded"):
        Predictor(tmp_path)


def test_the_command_line_shows_bars_and_json(checkpoint, tmp_path, capsys):
    path = write_wav(tmp_path / "a.wav", voice())
    assert main(["predict", str(path), "--model", str(checkpoint)]) == 0
    shown = capsys.readouterr().out
    assert all(label in shown for label in LABELS)
    assert "█" in shown
    assert main(["predict", str(path), "--model", str(checkpoint), "--json"]) == 0
    (item,) = json.loads(capsys.readouterr().out)["predictions"]
    assert f"{item['emotion']} ({item['probabilities'][item['emotion']]:.0%})" in shown


def test_a_command_that_can_score_no_file_says_so_and_fails(checkpoint, tmp_path, capsys):
    silent = write_wav(tmp_path / "a.wav", np.zeros(RATE, np.float32))
    assert main(["predict", str(silent), "--model", str(checkpoint), "--json"]) == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["predictions"][0]["status"] == "silent"
    assert printed.err.endswith("\nerror: none of these files could be scored\n")


def test_the_command_line_shows_a_timeline(checkpoint, tmp_path, capsys):
    path = write_wav(tmp_path / "talk.wav", voice(70, 8_000), 8_000)
    assert main(["predict", str(path), "--model", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("–" in line for line in lines) > 100
    assert any("1:08.7–1:10.0" in line for line in lines)


@pytest.mark.slow
def test_one_file_needs_neither_ray_nor_mlflow_nor_torchvision(checkpoint, tmp_path):
    path = write_wav(tmp_path / "a.wav", voice())
    code = (
        "import sys\nfrom ser_ray.cli.main import main\n"
        f"main(['predict', {str(path)!r}, '--model', {str(checkpoint)!r}])\n"
        "heavy = {'ray', 'mlflow', 'torchvision', 'torchaudio', 'matplotlib', 'pandas', 'sympy'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_loudness_of_a_clip_is_measured_once(predictor, monkeypatch):
    measured = []

    def measure(*arguments):
        measured.append(arguments)
        return measure_loudness(*arguments)

    for module in ("features.transforms", "inference.recordings"):
        monkeypatch.setattr(f"ser_ray.{module}.measure_loudness", measure)
    assert predictor.predict(voice(1.0), RATE).status == "ok"
    assert len(measured) == 1


def test_the_temperature_of_a_checkpoint_scales_every_answer(predictor, tmp_path):
    make_checkpoint(tmp_path, temperature=2.5)
    calibrated = Predictor(tmp_path)
    for seconds in (1.0, 5.0):
        sound = voice(seconds)
        before, after = predictor.predict(sound, RATE), calibrated.predict(sound, RATE)
        windows: Any = zip(before.timeline, after.timeline, strict=True)
        for one, other in [*windows] or [(before, after)]:
            logits = np.log(list(one.probabilities.values())) / 2.5
            expected = np.exp(logits) / np.exp(logits).sum()
            np.testing.assert_allclose(list(other.probabilities.values()), expected, rtol=1e-6)
            assert other.emotion == one.emotion
    assert calibrated.fingerprint != predictor.fingerprint


def test_a_model_that_is_not_sure_enough_gives_probabilities_without_an_emotion(
    checkpoint, predictor, tmp_path, capsys
):
    path = str(write_wav(tmp_path / "a.wav", voice(1.0)))
    sure = predictor.predict(path)
    share = sure.probabilities[sure.emotion]
    above = (1 + share) / 2
    found = Predictor(checkpoint, above).predict(path)
    assert (found.status, found.emotion) == ("unsure", None)
    assert found.probabilities == sure.probabilities
    assert str(found) == (
        f"a.wav: unsure ({sure.emotion}, the most probable emotion, has a probability of "
        f"{share:.0%}, below {above:.0%})"
    )
    assert Predictor(checkpoint, share - 0.01).predict(path) == sure
    assert Predictor(checkpoint, 0.5).fingerprint != predictor.fingerprint
    long = Predictor(checkpoint, 1.0).predict(voice(5.0), RATE)
    assert {segment.emotion for segment in long.timeline} == {None}
    assert "unsure (" in str(long.timeline[0])
    assert prediction_row(long)["timeline"][0]["emotion"] is None
    words = ["predict", path, "--model", str(checkpoint), "--min-confidence", "1", "--json"]
    assert main(words) == 0, "probabilities are an answer"
    (answer,) = json.loads(capsys.readouterr().out)["predictions"]
    assert (answer["emotion"], answer["status"]) == (None, "unsure")
    with pytest.raises(ConfigError, match="min_confidence is 30: it must be from 0 to 1"):
        Predictor(checkpoint, 30)
