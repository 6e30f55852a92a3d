"""Features equal those of torchaudio and librosa; trimming and resampling lose no sound."""

import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from ser_ray.features import loudness
from ser_ray.features.config import KINDS, FeatureConfig
from ser_ray.features.errors import ClipError
from ser_ray.features.loudness import measure_loudness
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.recordings import CLEAR_DB
from tests.clips import voice

CONFIG = FeatureConfig()
EXTRACTOR = FeatureExtractor(CONFIG)
DECIBELS = 0.02
"""Tolerance against the references, which compute in double precision."""
RESOLVED = 80.0
"""Decibels below the loudest bin of its frame down to which float32 keeps a bin to `DECIBELS`."""


def tone(frequency: float, seconds: float = 1.0, sample_rate: int = 16_000) -> np.ndarray:
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    return (0.5 * np.sin(2 * np.pi * frequency * time)).astype(np.float32)


NOISE = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
SOUNDS = {
    "voice": voice(2.0, 16_000),
    "tone": tone(440.0) + 1e-3 * NOISE,
    "noise": NOISE[:9_999],
    "silence": np.zeros(16_000, np.float32),
    "click": np.eye(1, 16_000, 8_000, dtype=np.float32)[0],
}


def by_torchaudio(waveform: np.ndarray, config: FeatureConfig) -> dict[str, np.ndarray]:
    """The three kinds by torchaudio's own transforms, in double precision."""
    sound = torch.from_numpy(waveform).double()
    power = torchaudio.transforms.Spectrogram(
        n_fft=config.window_length, hop_length=config.hop_length
    ).double()(sound)
    mel = torchaudio.transforms.MelScale(
        config.num_mels,
        config.sample_rate,
        config.f_min,
        config.sample_rate / 2,
        config.window_length // 2 + 1,
    ).double()(power)
    decibels = [10 * torch.log10(torch.clamp(p, min=1e-10)) for p in (power, mel)]
    cosines = torchaudio.functional.create_dct(config.num_mfcc, config.num_mels, "ortho").double()
    mfcc = (decibels[1].T @ cosines).T
    return {"spectrogram": decibels[0].numpy(), "mel": decibels[1].numpy(), "mfcc": mfcc.numpy()}


def by_librosa(waveform: np.ndarray, config: FeatureConfig) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # librosa uses deprecated functions of other libraries
        import librosa
    length, hop = config.window_length, config.hop_length
    sound = np.pad(waveform.astype(np.float64), length // 2, mode="reflect")
    power = np.abs(librosa.stft(sound, n_fft=length, hop_length=hop, center=False)) ** 2
    bands = librosa.filters.mel(
        sr=config.sample_rate,
        n_fft=config.window_length,
        n_mels=config.num_mels,
        fmin=config.f_min,
        htk=True,
        norm=None,
        dtype=np.float64,
    )
    decibels = [librosa.power_to_db(p, amin=1e-10, top_db=None) for p in (power, bands @ power)]
    mfcc = librosa.feature.mfcc(S=decibels[1], n_mfcc=config.num_mfcc)
    return {"spectrogram": decibels[0], "mel": decibels[1], "mfcc": mfcc}


@pytest.mark.parametrize("reference", [by_torchaudio, by_librosa])
@pytest.mark.parametrize("sound", SOUNDS.values(), ids=SOUNDS)
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        FeatureConfig(
            sample_rate=22_050,
            window_length=1024,
            hop_length=256,
            num_mels=64,
            num_mfcc=13,
            f_min=0,
        ),
    ],
    ids=["default", "other"],
)
def test_features_equal_those_of_the_references(
    reference: Callable[[np.ndarray, FeatureConfig], dict[str, np.ndarray]],
    sound: np.ndarray,
    config: FeatureConfig,
) -> None:
    expected = reference(sound, config)
    found = FeatureExtractor(config).features(sound)
    for kind in KINDS:
        assert found[kind].dtype == np.float32
        assert found[kind].shape == (config.num_bins(kind), config.frames_of(len(sound)))
    np.testing.assert_allclose(found["mfcc"], expected["mfcc"], rtol=0, atol=DECIBELS)
    loudest = expected["spectrogram"].max(axis=0)
    for kind in ("spectrogram", "mel"):
        close = np.abs(found[kind] - expected[kind]) <= DECIBELS
        assert close[expected[kind] > loudest - RESOLVED].all()


def test_a_tone_is_in_its_bin_at_its_power() -> None:
    found = EXTRACTOR.features(tone(1000.0))
    middle = found["spectrogram"][:, 25]
    assert middle.argmax() == 1000 * CONFIG.window_length / CONFIG.sample_rate
    # An amplitude of 0.5 under a Hann window, whose mean is 0.5, over 800 samples: (800 / 8)^2.
    assert middle.max() == pytest.approx(20 * np.log10(100), abs=0.01)
    # Bands are spaced by 42.5 mel from 77.8 mel (50 Hz); 1000 Hz are 1000 mel by definition.
    assert found["mel"][:, 25].argmax() == round((1000 - 77.75) / ((2840 - 77.75) / 65)) - 1


def test_the_power_of_silence_is_the_floor() -> None:
    found = EXTRACTOR.features(np.zeros(16_000, np.float32))
    np.testing.assert_allclose(found["spectrogram"], -100, rtol=1e-6)
    np.testing.assert_allclose(found["mel"], -100, rtol=1e-6)
    np.testing.assert_allclose(found["mfcc"][0], -100 * np.sqrt(CONFIG.num_mels), rtol=1e-6)
    np.testing.assert_allclose(found["mfcc"][1:], 0, atol=1e-3)


@given(num_samples=st.integers(1, 104_000))
@settings(max_examples=50, deadline=None)
def test_the_number_of_frames_is_as_documented(num_samples: int) -> None:
    found = EXTRACTOR.features(np.zeros(num_samples, np.float32))
    assert found["mel"].shape[1] == CONFIG.frames_of(num_samples) <= CONFIG.num_frames


@given(
    before=st.floats(0, 2),
    after=st.floats(0, 2),
    seconds=st.floats(0.25, 2),
    seed=st.integers(0, 9),
)
@settings(max_examples=30, deadline=None)
def test_silent_ends_are_cut_off_and_all_sound_is_kept(
    before: float, after: float, seconds: float, seed: int
) -> None:
    """The silence that is kept at both ends is the margin, or at most a stretch more."""
    sound = voice(seconds, 16_000, seed)
    hush = np.random.default_rng(seed).normal(0, 1e-5, 80_000).astype(np.float32)
    start, stop = round(before * 16_000), round(after * 16_000)
    clip = np.concatenate((hush[:start], sound, hush[: stop + 1]))
    waveform = EXTRACTOR.waveform(clip, 16_000)
    margin = round(CONFIG.trim_margin * 16_000)
    kept_before, kept_after = min(start, margin), min(stop, margin)
    assert 0 <= len(waveform) - len(sound) - kept_before - kept_after <= 320
    ends = [
        first + len(waveform)
        for first in range(max(start - kept_before - 160, 0), start - kept_before + 1)
        if len(part := clip[first : first + len(waveform)]) == len(waveform)
        and np.allclose(part - part.mean(dtype=np.float64), waveform, atol=1e-6)
    ]
    assert ends, "it is a part of the clip, which begins before the sound"
    assert ends[0] >= start + len(sound)


def noise_of(num_samples: int, db: float, *, slope: float = 0.0) -> np.ndarray:
    """Noise of a level in dB of full scale, whose power falls with frequency ** slope."""
    spectrum = np.fft.rfft(np.random.default_rng(1).standard_normal(num_samples))
    spectrum *= np.maximum(np.fft.rfftfreq(num_samples, 1 / 16_000), 20.0) ** (-slope / 2)
    noise = np.fft.irfft(spectrum, num_samples)
    return (noise / noise.std() * 10 ** (db / 20)).astype(np.float32)


@pytest.mark.parametrize("offset", [0.02, -0.3])
@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_a_constant_offset_changes_nothing(offset: float, dtype: type) -> None:
    """Neither the trimming nor the features."""
    clip = 0.3 * np.concatenate([np.zeros(32_000), voice(2.0, 16_000), np.zeros(8_000)])
    scale = 32767 if dtype is np.int16 else 1
    plain = EXTRACTOR.waveform((scale * clip).astype(dtype), 16_000)
    shifted = EXTRACTOR.waveform((scale * (clip + offset)).astype(dtype), 16_000)
    np.testing.assert_allclose(shifted, plain, atol=5e-5)  # a step of 16 bits is 3e-5
    assert len(plain) < 36_000


TIME = np.arange(48_000) / 16_000
OFFSETS = {
    "constant": np.full(48_000, -0.01),
    "large": np.full(48_000, 0.9),
    "drifting": np.linspace(-0.01, 0.03, 48_000),
    "switched on": 0.01 * (TIME > 1.003),
    "settling": 0.2 * np.exp(-TIME / 0.3),
    "with clicks": 0.01 + 0.5 * np.isin(np.arange(48_000), [9_000, 9_001, 30_000]),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_an_offset_alone_is_silent(name: str) -> None:
    with pytest.raises(ClipError, match="nothing but clicks is louder than -80 dB"):
        EXTRACTOR.waveform(OFFSETS[name].astype(np.float32), 16_000)


@pytest.mark.parametrize("name", ["drifting", "settling"])
def test_a_drifting_offset_is_not_sound(name: str) -> None:
    clip = np.concatenate([np.zeros(24_000), 0.3 * voice(1.0, 16_000), np.zeros(8_000)])
    plain = EXTRACTOR.waveform(clip.astype(np.float32), 16_000)
    shifted = EXTRACTOR.waveform((clip + OFFSETS[name]).astype(np.float32), 16_000)
    assert len(shifted) == pytest.approx(len(plain), abs=0.03 * 16_000)


@pytest.mark.parametrize("frequency", [3, 5, 10, 20, 30])
@pytest.mark.parametrize("noise_db", [-200, -80])
def test_rumble_alone_is_not_clear_and_hides_no_voice(frequency: float, noise_db: float) -> None:
    rumble = 0.6 * tone(frequency, 3.0) + noise_of(48_000, noise_db)
    assert measure_loudness(rumble, 16_000, 50.0).above_noise_db < CLEAR_DB
    spoken = rumble + voice(3.0, 16_000)
    assert measure_loudness(spoken, 16_000, 50.0).above_noise_db > CLEAR_DB


@pytest.mark.parametrize("frequency", [49.9, 50, 60, 60.1, 100])
@pytest.mark.parametrize("phase", [0.1, 0.3, 0.6])
def test_mains_hum_alone_is_not_clear_and_hides_no_voice(frequency: float, phase: float) -> None:
    """Buzzing lamps have one short pulse in each period."""
    hum = 0.02 * np.exp(-10 * ((TIME * frequency + phase) % 1)) + noise_of(48_000, -90)
    assert measure_loudness(hum, 16_000, 50.0).above_noise_db < CLEAR_DB
    spoken = hum + voice(3.0, 16_000)
    assert measure_loudness(spoken, 16_000, 50.0).above_noise_db > CLEAR_DB


def test_the_best_straight_line_of_a_stretch_has_no_power() -> None:
    samples = np.random.default_rng(0).normal(0.2, 0.1, 330) + np.arange(330) / 300
    found = measure_loudness(samples.astype(np.float32), 16_000, 50.0).power
    for stretch, power in zip(np.split(samples, [160, 320]), found, strict=True):
        places = np.arange(len(stretch))
        line = np.polyval(np.polyfit(places, stretch, 1), places)
        assert power == pytest.approx(np.sum((stretch - line) ** 2) / 160, rel=1e-4)


@pytest.mark.parametrize(("slope", "db"), [(0, -70), (0, -50), (1, -60), (1, -45)])
def test_a_rooms_noise_is_cut_off_at_the_ends(slope: float, db: float) -> None:
    silence = np.zeros(24_000, np.float32)
    clip = np.concatenate([silence, 0.3 * voice(2.0, 16_000), silence])
    noisy = clip + noise_of(len(clip), db, slope=slope)
    length = len(EXTRACTOR.waveform(clip, 16_000))
    assert len(EXTRACTOR.waveform(noisy, 16_000)) == pytest.approx(length, abs=0.15 * 16_000)


def test_quiet_speech_is_not_cut_off_with_the_noise_of_a_room() -> None:
    """Its ends are 7 dB above white noise; above pink noise, 9 dB are needed."""
    rng = np.random.default_rng(3)
    silence = np.zeros(24_000)
    quiet = rng.normal(0, 0.005, 8_000)
    loud = 0.3 * voice(1.0, 16_000)
    clip = np.concatenate([silence, quiet, loud, quiet, silence]).astype(np.float32)
    noisy = clip + noise_of(len(clip), -53)
    expected = len(loud) + 2 * len(quiet) + 2 * CONFIG.trim_margin * 16_000
    assert len(EXTRACTOR.waveform(noisy, 16_000)) == pytest.approx(expected, abs=0.05 * 16_000)


def test_measuring_in_blocks_equals_measuring_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = (3000 * voice(2.0, 16_000)).astype(np.int16)[:31_777]
    expected = measure_loudness(samples, 16_000, 50.0)
    monkeypatch.setattr(loudness, "BLOCK_STRETCHES", 7)
    found = measure_loudness(samples, 16_000, 50.0)
    np.testing.assert_array_equal(found.power, expected.power)
    assert len(found.power) == 31_777 // 160 + 1


@pytest.mark.parametrize("sample_rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_a_tone_and_its_power(sample_rate: int) -> None:
    waveform = EXTRACTOR.waveform(tone(1000.0, 1.0, sample_rate), sample_rate)
    assert len(waveform) == 16_000
    inside = slice(1_000, -1_000)  # the filter rings at the ends of the tone
    np.testing.assert_allclose(waveform[inside], tone(1000.0)[inside], atol=1e-3)


def test_resampling_causes_no_aliasing() -> None:
    loud_above = tone(1000.0, 1.0, 48_000) + tone(9_000.0, 1.0, 48_000)
    spectrogram = EXTRACTOR.features(EXTRACTOR.waveform(loud_above, 48_000))["spectrogram"]
    middle = spectrogram[:, 20:30]
    alias = round(7_000 * CONFIG.window_length / CONFIG.sample_rate)  # 9 kHz mirrored at 8 kHz
    assert middle[alias - 2 : alias + 3].max() < middle.max() - 90


def test_full_scale_of_16_bit_samples_is_1() -> None:
    sound = np.round(voice(1.0, 16_000) * 32_767).astype(np.int16)
    from_integers = EXTRACTOR.waveform(sound, 16_000)
    from_floats = EXTRACTOR.waveform((sound / 32_768).astype(np.float32), 16_000)
    np.testing.assert_array_equal(from_integers, from_floats)


@pytest.mark.parametrize(
    ("samples", "status"),
    [
        (np.zeros(48_000, np.float32), "silent"),
        (np.full(48_000, 5e-5, np.float32), "silent"),
        (np.array([1, -1], np.float32), "too_short"),
        (tone(440.0, 0.19, 48_000), "too_short"),
        (tone(440.0, 6.51, 48_000), "too_long"),
    ],
)
def test_clips_without_usable_sound_are_refused(samples: np.ndarray, status: str) -> None:
    with pytest.raises(ClipError) as caught:
        EXTRACTOR.waveform(samples, 48_000)
    assert caught.value.status == status


@pytest.mark.parametrize("sample_rate", [8_000, 11_025, 44_100, 48_000])
def test_the_longest_clip_fits_into_the_arrays(sample_rate: int) -> None:
    sound = tone(440.0, CONFIG.max_seconds, sample_rate)
    found = EXTRACTOR.features(EXTRACTOR.waveform(sound, sample_rate))
    assert CONFIG.num_frames - 1 <= found["mel"].shape[1] <= CONFIG.num_frames


def test_no_window_is_longer_than_the_longest_clip() -> None:
    """47,998 samples are 3 windows of 15,999.3 samples, and 15,999.4 samples are the most."""
    config = FeatureConfig(max_seconds=0.9999625)
    windows = FeatureExtractor(config).windows(voice(3.0, 16_000)[:47_998], 16_000)
    assert [len(window) for window in windows] == [15_999] * 3


def test_an_extractor_is_unpickled_and_used_without_torch_or_ray() -> None:
    """A worker needs nothing else of the package to compute the same features."""
    program = """
import pickle, sys
import numpy as np
extractor = pickle.loads(sys.stdin.buffer.read())
sound = np.sin(np.arange(48_000)).astype(np.float32)
sys.stdout.buffer.write(extractor.features(extractor.waveform(sound, 48_000))["mel"].tobytes())
assert not {"torch", "ray", "librosa"} & set(sys.modules), sorted(sys.modules)
"""
    there = subprocess.run(
        [sys.executable, "-c", program],
        input=pickle.dumps(EXTRACTOR),
        capture_output=True,
        check=True,
    ).stdout
    sound = np.sin(np.arange(48_000)).astype(np.float32)
    assert there == EXTRACTOR.features(EXTRACTOR.waveform(sound, 48_000))["mel"].tobytes()
