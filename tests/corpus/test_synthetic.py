"""The synthetic corpus: measured on the files it wrote, not on the parameters of the synthesis."""

import itertools
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ser_ray.corpus import synthetic
from ser_ray.corpus.manifest import SYNTHETIC_MARKER
from ser_ray.corpus.ravdess.names import EMOTIONS, ClipName, parse_name
from ser_ray.errors import CorpusError

SPEAKERS = tuple(f"{actor:02d}" for actor in range(3, 15))
"""Half of the corpus's speakers: the files of the others would only take time."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("world") / "synthetic"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "SPEAKERS", SPEAKERS)
        synthetic.make_synthetic_corpus(target, seed=3)
    return target


@pytest.fixture(scope="module")
def wavs(corpus: Path) -> dict[ClipName, np.ndarray]:
    """Samples [num_samples] of every wav at 48 kHz."""
    return {parse_name(path.name): soundfile.read(path)[0] for path in corpus.rglob("*.wav")}


@pytest.fixture
def two_speakers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SPEAKERS", ("07", "08"))


def frames(samples: np.ndarray) -> np.ndarray:
    """Cut into frames [frames, 2048] every 20 ms, and keep those within 25 dB of the loudest."""
    cut = np.lib.stride_tricks.sliding_window_view(samples, 2048)[::960]
    energy = (cut**2).sum(axis=1)
    return cut[energy > energy.max() * 10**-2.5] * np.hanning(2048)


def pitches(samples: np.ndarray) -> np.ndarray:
    """Pitch [frames] in semitones above 60 Hz, by the highest peak of the autocorrelation."""
    spectrum = np.abs(np.fft.rfft(frames(samples), 4096)) ** 2
    shortest = 48_000 // 800
    lags = np.fft.irfft(spectrum)[:, shortest : 48_000 // 60].argmax(axis=1) + shortest
    return 12 * np.log2(48_000 / lags / 60)


def decibels(samples: np.ndarray) -> float:
    return 10 * np.log10(np.mean(frames(samples) ** 2))


def brightness(samples: np.ndarray) -> float:
    """Energy above 1 kHz over that below, in decibels."""
    spectrum = (np.abs(np.fft.rfft(frames(samples))) ** 2).sum(axis=0)
    edge = round(1000 / 48_000 * 2048)
    return 10 * np.log10(spectrum[edge:].sum() / spectrum[:edge].sum())


def test_the_corpus_has_24_speakers() -> None:
    assert len(synthetic.SPEAKERS) == 24


def test_every_take_of_the_speakers_is_there_in_three_modalities(corpus: Path) -> None:
    clips = [(path, parse_name(path.name)) for path in corpus.rglob("*.*") if path.parent != corpus]
    assert len(clips) == 288
    takes: dict[str, set[str]] = {modality: set() for modality in ("audio", "av", "video")}
    for path, clip in clips:
        takes[clip.modality].add(clip.take)
        part = (
            "Audio_Speech_Actors_01-24"
            if clip.modality == "audio"
            else f"Video_Speech_Actor_{clip.speaker}"
        )
        assert path.parent == corpus / part / f"Actor_{clip.speaker}"
        assert path.suffix == (".wav" if clip.modality == "audio" else ".mp4")
    assert takes["audio"] == takes["av"] == takes["video"]
    wanted = set(itertools.product(SPEAKERS, EMOTIONS))
    assert {(clip.speaker, clip.emotion) for _, clip in clips} == wanted
    for emotion in EMOTIONS[1:]:
        strong = [c.intensity == "strong" for _, c in clips if c.emotion == emotion]
        assert sum(strong) == len(strong) / 2
    for field in ("statement", "repetition"):
        assert {getattr(clip, field) for _, clip in clips} == {1, 2}


def test_a_wav_is_short_48_khz_16_bit_mono_with_silent_ends(corpus: Path) -> None:
    for path in corpus.rglob("*.wav"):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels, info.subtype) == (48_000, 1, "PCM_16")
        assert 0.7 < info.duration < 2
        samples, _ = soundfile.read(path)
        blocks = samples[: len(samples) // 480 * 480].reshape(-1, 480)  # 10 ms
        power = (blocks**2).mean(axis=1)
        ends = np.concatenate([power[:10], power[-10:]])
        assert ends.max() < power.max() * 1e-5, f"{path.name}: its ends are not 50 dB down"


@pytest.mark.parametrize(("modality", "streams"), [("01", ["h264", "aac"]), ("02", ["h264"])])
def test_an_mp4_has_the_streams_of_its_modality(
    corpus: Path, modality: str, streams: list[str]
) -> None:
    paths = list(corpus.rglob(f"{modality}-*.mp4"))
    assert len(paths) == 96
    for path in paths:
        with av.open(str(path)) as container:
            assert [stream.codec_context.name for stream in container.streams] == streams


def test_the_sound_of_an_mp4_is_that_of_its_wav(
    corpus: Path, wavs: dict[ClipName, np.ndarray]
) -> None:
    samples = next(samples for clip, samples in wavs.items() if clip.speaker == "11")
    take = next(clip.take for clip in wavs if clip.speaker == "11")
    path = next(corpus.rglob(f"01-{take}.mp4"))
    with av.open(str(path)) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
        rate = container.streams.audio[0].rate
    decoded = np.concatenate(parts)
    assert rate == 48_000
    assert abs(len(decoded) - len(samples)) <= 2 * 1024  # AAC works in blocks of 1024
    size = max(len(decoded), len(samples))
    lags = np.fft.irfft(np.fft.rfft(decoded, 2 * size) * np.fft.rfft(samples, 2 * size).conj())
    assert lags.max() > 0.95 * np.linalg.norm(decoded) * np.linalg.norm(samples)


def test_anger_is_higher_louder_and_brighter_than_sadness(
    wavs: dict[ClipName, np.ndarray],
) -> None:
    by_part = {(clip.speaker, clip.emotion): samples for clip, samples in wavs.items()}
    for speaker in SPEAKERS:
        angry, sad = by_part[speaker, "angry"], by_part[speaker, "sad"]
        assert np.median(pitches(angry)) > np.median(pitches(sad)) + 1, speaker
        assert decibels(angry) > decibels(sad) + 6, speaker
        assert brightness(angry) > brightness(sad), speaker
        assert len(angry) < len(sad), speaker


def test_women_speak_higher_than_men(wavs: dict[ClipName, np.ndarray]) -> None:
    neutral = {c: np.median(pitches(x)) for c, x in wavs.items() if c.emotion == "neutral"}
    women = [pitch for clip, pitch in neutral.items() if clip.sex == "female"]
    men = [pitch for clip, pitch in neutral.items() if clip.sex == "male"]
    assert min(women) > max(men)
    assert np.std(women) > 0.5
    assert np.std(men) > 0.5


def test_simple_statistics_classify_the_emotion_of_unseen_speakers(
    wavs: dict[ClipName, np.ndarray],
) -> None:
    def statistics(samples: np.ndarray) -> list[float]:
        pitch = pitches(samples)
        third = len(pitch) // 3
        rise = np.median(pitch[-third:]) - np.median(pitch[:third])
        steps = np.abs(np.diff(pitch))
        return [
            float(np.median(pitch)), float(np.std(pitch)), float(rise), float(np.median(steps)),
            decibels(samples), brightness(samples), len(pitch),
        ]  # fmt: skip

    scores = cross_val_score(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        [statistics(samples) for samples in wavs.values()],
        [clip.emotion for clip in wavs],
        groups=[clip.speaker for clip in wavs],
        cv=GroupKFold(6),
    )
    assert np.mean(scores) > 0.6  # chance is 0.125
    assert np.mean(scores) < 0.98  # and it is not trivial


@pytest.mark.usefixtures("two_speakers")
def test_the_same_seed_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    synthetic.make_synthetic_corpus(tmp_path / "same", seed=3)
    synthetic.make_synthetic_corpus(tmp_path / "other", seed=4)
    paths = list((tmp_path / "same").rglob("*-0[78].*"))
    assert len(paths) == 2 * 8 * 3
    for path in paths:
        inside = path.relative_to(tmp_path / "same")
        assert path.read_bytes() == (corpus / inside).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / inside).read_bytes()


@pytest.mark.usefixtures("two_speakers")
def test_a_complete_folder_is_kept_and_one_of_another_seed_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "nested" / "synthetic"
    synthetic.make_synthetic_corpus(target)
    marker = (target / SYNTHETIC_MARKER).read_text()
    assert "not results on RAVDESS" in marker
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    synthetic.make_synthetic_corpus(target)
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    synthetic.make_synthetic_corpus(target, seed=1)
    assert (target / SYNTHETIC_MARKER).read_text() != marker
    assert [path.name for path in target.parent.iterdir()] == ["synthetic"]


@pytest.mark.usefixtures("two_speakers")
def test_an_interruption_leaves_no_folder_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = tmp_path / "synthetic"
    with monkeypatch.context() as patch:
        patch.setattr(synthetic, "_write_mp4", interrupt)
        with pytest.raises(KeyboardInterrupt):
            synthetic.make_synthetic_corpus(target)
    assert not list(tmp_path.iterdir())
    synthetic.make_synthetic_corpus(target)
    assert (target / SYNTHETIC_MARKER).is_file()


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "03-01-06-01-02-01-12.wav"
    mine.write_text("precious")
    with pytest.raises(CorpusError, match="has files that are not a synthetic corpus and would"):
        synthetic.make_synthetic_corpus(tmp_path)
    assert mine.read_text() == "precious"
