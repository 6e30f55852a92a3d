"""Recording conditions, measured on the simulated sound."""

from typing import get_args

import numpy as np
import pytest
import scipy.signal

from ser_ray.features.conditions import CONDITIONS, NOISE_BAND, simulate
from ser_ray.features.config import Condition
from ser_ray.features.samples import Sound
from tests.clips import voice

RATES = (16_000, 48_000)


def speech(rate: int = 16_000, scale: float = 0.2) -> np.ndarray:
    """Two seconds of a voice between two seconds of digital silence."""
    pause = np.zeros(rate)
    return np.concatenate([pause, scale * voice(2.0, rate), pause])


def recorded(condition: str, samples: np.ndarray, rate: int, name: str = "a.wav") -> np.ndarray:
    sound = simulate(condition, Sound(samples.astype(np.float32), rate), name)
    assert (sound.samples.dtype, sound.sample_rate) == (np.int16, rate)
    assert len(sound.samples) == len(samples)
    return sound.samples / 2**15


def decibels(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(samples**2)))


def band_decibels(samples: np.ndarray, rate: int, low: float, high: float) -> float:
    """Power between two frequencies in hertz by Welch's method."""
    frequencies, density = scipy.signal.welch(samples, rate, nperseg=4096)
    inside = (frequencies >= low) & (frequencies < high)
    return float(10 * np.log10(np.trapezoid(density[inside], frequencies[inside])))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("level", [60, 50, 40])
def test_the_noise_of_a_room_has_its_level_at_any_rate(level: int, rate: int) -> None:
    clip = speech(rate)
    added = recorded(f"noise-{level}", clip, rate) - clip
    assert decibels(added) == pytest.approx(-level, abs=0.05)
    octaves = [band_decibels(added, rate, hertz, 2 * hertz) for hertz in (500, 1000, 2000)]
    assert np.diff(octaves) == pytest.approx([3, 3], abs=0.5)
    if rate > 2 * NOISE_BAND[1]:
        assert band_decibels(added, rate, 8_100, 20_000) < -level - 25


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("condition", "per_octave"), [("white-20", 3.0), ("pink-20", 0.0)])
def test_noise_is_20_db_below_the_speech_without_its_pauses(
    condition: str, per_octave: float, rate: int
) -> None:
    clip = speech(rate)
    added = recorded(condition, clip, rate) - clip
    spoken = clip[rate:-rate]
    assert decibels(spoken) - decibels(added) == pytest.approx(20, abs=0.3)
    octaves = [band_decibels(added, rate, hertz, 2 * hertz) for hertz in (500, 1000, 2000)]
    assert np.diff(octaves) == pytest.approx([per_octave] * 2, abs=0.6)


def mu_law(samples: np.ndarray) -> np.ndarray:
    """Continuous mu-law companding to 256 steps and back (G.711 approximates it by segments)."""
    compressed = np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log(256)
    stepped = np.rint(compressed * 127) / 127
    return np.sign(stepped) * (256 ** np.abs(stepped) - 1) / 255


@pytest.mark.parametrize("rate", RATES)
def test_a_telephone_passes_its_band_with_the_noise_of_mu_law(rate: int) -> None:
    seconds = np.arange(2 * rate) / rate
    for hertz, passes in ((150, False), (1_000.3, True), (3_000.7, True), (3_700, False)):
        heard = recorded("phone", 0.25 * np.sin(2 * np.pi * hertz * seconds), rate)
        expected = 0.25**2 / 2 if passes else 0.0
        assert np.mean(heard**2) == pytest.approx(expected, rel=0.01, abs=1e-6)
    tone = 0.25 * np.sin(2 * np.pi * 1_000.3 * seconds)
    error = decibels((recorded("phone", tone, rate) - tone)[rate // 4 : -rate // 4])
    at_8_khz = tone[:: rate // 8_000]
    assert error == pytest.approx(decibels(mu_law(at_8_khz) - at_8_khz), abs=3)


@pytest.mark.parametrize("condition", ["opus-16", "mp3-16"])
@pytest.mark.parametrize("rate", RATES)
def test_a_codec_keeps_time_and_the_low_band_and_loses_the_rest(condition: str, rate: int) -> None:
    clip = speech(rate)
    heard = recorded(condition, clip, rate)
    delay = np.argmax(scipy.signal.correlate(heard, clip)) - (len(clip) - 1)
    assert abs(delay) < 0.003 * rate
    assert band_decibels(heard, rate, 100, 2_000) == pytest.approx(
        band_decibels(clip, rate, 100, 2_000), abs=1
    )
    assert -60 < decibels(heard - clip) - decibels(clip) < -3


def test_the_echo_of_a_room_decays_by_60_db_in_its_time_and_is_as_strong_as_the_sound() -> None:
    click = np.zeros(16_000)
    click[1_000] = 0.9
    response = recorded("room", click, 16_000)[1_000:]
    direct, echo = response[0] ** 2, response[48:] ** 2
    assert not response[1:47].any()
    assert direct + echo.sum() == pytest.approx(0.9**2, rel=0.02)
    assert echo.sum() == pytest.approx(direct, rel=0.02)
    # Schroeder's backward integral; its slope over the first 30 dB gives the reverberation time.
    remaining = 10 * np.log10(echo[::-1].cumsum()[::-1] / echo.sum() + 1e-9)
    seconds = np.argmax(remaining < -30) / 16_000
    assert 2 * seconds == pytest.approx(0.4, abs=0.05)


def test_levels_change_by_20_db_and_clip_at_full_scale() -> None:
    clip = speech(scale=0.9)
    quiet = recorded("level-minus-20", clip, 16_000)
    assert decibels(quiet) - decibels(clip) == pytest.approx(-20, abs=0.01)
    loud = recorded("level-plus-20", clip, 16_000)
    np.testing.assert_allclose(loud, np.clip(10 * clip, -1, 1 - 2**-15), atol=2**-15)
    assert (np.abs(loud) > 0.999).sum() > 100


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_condition_depends_on_the_name_alone_and_takes_any_clip(condition: str) -> None:
    clip = np.round(speech() * 2**15).astype(np.int16)
    once, again = (simulate(condition, Sound(clip, 16_000), "a.wav").samples for _ in range(2))
    np.testing.assert_array_equal(once, again)
    of_floats = simulate(
        condition, Sound((clip / 2**15).astype(np.float32), 16_000), "a.wav"
    ).samples
    np.testing.assert_array_equal(of_floats, once)
    other = simulate(condition, Sound(clip, 16_000), "b.wav").samples
    is_random = condition.partition("-")[0] in ("noise", "white", "pink", "room")
    assert np.array_equal(once, other) != is_random
    assert len(simulate(condition, Sound(np.zeros(4_410, np.int16), 22_050), "a").samples) == 4_410


def test_a_long_clip_gets_through_a_codec() -> None:
    """`decode` allows 3,600 s, so the round trip through a codec has to allow it too."""
    assert not recorded("phone", np.zeros(601_000), 1_000).any()


def test_the_command_line_offers_every_group() -> None:
    assert {group for group, *_ in CONDITIONS.values()} == set(get_args(Condition))
