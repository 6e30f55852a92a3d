"""Simulates recording conditions, such as noise, a telephone or a room, to test a model.
(`ser_ray.training.acoustics` adds similar effects to training clips.)

`simulate` changes a decoded clip before its features are computed. The seed of the random numbers
depends only on the condition and the clip's name, so another run, also on another machine, draws
the same numbers. The result is 16-bit sound at the clip's own sample rate, clipped at full scale.
Levels are in dB of full scale: a mean square of 1 is 0 dB.

`CONDITIONS` defines the conditions. Noise has frequencies from 20 Hz to 8 kHz, or to half of the
sample rate if that is lower. Pink noise has equal power in every octave. The level of speech is the
mean square of the 10 ms stretches that are at most 40 dB below the loudest stretch, so pauses do
not count.
"""

import hashlib
import io
import math
from collections.abc import Callable
from functools import partial

import av
import numpy as np
import scipy.fft
import soxr

from ser_ray.features.decode import decode
from ser_ray.features.loudness import ENERGY_SECONDS
from ser_ray.features.samples import Sound

NOISE_BAND = (20.0, 8_000.0)
"""Lowest and highest frequency of noise in hertz."""
SPEECH_DB = 40.0
"""A stretch is a pause if it is more than this many dB below the loudest stretch."""
PHONE_BAND = (300.0, 3_400.0)
"""Lowest and highest frequency of a telephone line in hertz."""
ECHO_SECONDS = 0.4
"""Reverberation time (RT60): the time in which the echo falls by 60 dB."""
FIRST_ECHO_SECONDS = 0.003
"""Delay of the first echo, from a wall half a metre away."""

Effect = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""Samples [num_samples] float, sample rate in hertz, random generator -> samples [num_samples]."""


def simulate(condition: str, sound: Sound, name: str) -> Sound:
    """Simulate a recording condition; only the samples of the clip change.

    Args:
        condition: a key of `CONDITIONS`.
        sound: the decoded clip.
        name: the clip's file name, for a segment with its start. The random numbers depend on it.
    """
    seed = int.from_bytes(hashlib.blake2b(f"{condition} {name}".encode(), digest_size=8).digest())
    samples = sound.samples.astype(np.float64)
    if sound.samples.dtype == np.int16:
        samples /= 2**15
    *_, effect = CONDITIONS[condition]
    changed = effect(samples, sound.sample_rate, np.random.default_rng(seed))
    recorded = np.clip(np.rint(changed * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    return sound._replace(samples=recorded)


def noise(num_samples: int, sample_rate: int, slope: int, rng: np.random.Generator) -> np.ndarray:
    """Draw Gaussian noise with a mean square of 1 in `NOISE_BAND`.

    Args:
        num_samples: length of the noise.
        sample_rate: hertz.
        slope: exponent of the power spectrum 1 / frequency**slope; 0 is white, 1 is pink.
        rng: random generator of the noise.
    """
    length = scipy.fft.next_fast_len(max(num_samples, sample_rate), real=True)
    frequencies = scipy.fft.rfftfreq(length, 1 / sample_rate)
    spectrum = rng.normal(size=len(frequencies)) + 1j * rng.normal(size=len(frequencies))
    inside = (frequencies >= NOISE_BAND[0]) & (frequencies <= NOISE_BAND[1])
    spectrum *= inside * np.maximum(frequencies, 1.0) ** (-slope / 2)
    drawn: np.ndarray = scipy.fft.irfft(spectrum, length)[:num_samples]
    return drawn / np.sqrt(np.mean(drawn**2))


def _noise(
    kind: str, decibels: int, samples: np.ndarray, sample_rate: int, rng: np.random.Generator
) -> np.ndarray:
    """Add noise that is `decibels` below a reference.

    For `white` and `pink` noise, the reference is the level of speech. For `room` noise, which is
    also white, it is full scale.
    """
    strength = 10 ** (-decibels / 20)
    if kind != "room":
        strength *= np.sqrt(_speech_power(samples, sample_rate))
    return samples + strength * noise(len(samples), sample_rate, int(kind == "pink"), rng)


def _speech_power(samples: np.ndarray, sample_rate: int) -> float:
    stretch = round(ENERGY_SECONDS * sample_rate)
    whole = samples[: max(1, len(samples) // stretch) * stretch]
    power = np.mean(np.reshape(whole, (-1, min(stretch, len(whole)))) ** 2, axis=1)
    return float(power[power >= power.max() * 10 ** (-SPEECH_DB / 10)].mean())


def _phone(samples: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    spectrum = scipy.fft.rfft(samples)
    frequencies = scipy.fft.rfftfreq(len(samples), 1 / sample_rate)
    spectrum[(frequencies < PHONE_BAND[0]) | (frequencies > PHONE_BAND[1])] = 0
    line = scipy.fft.irfft(spectrum, len(samples))
    return _through_codec("pcm_mulaw", "wav", 8_000, 0, line, sample_rate, rng)


def _through_codec(
    codec: str,
    container: str,
    codec_rate: int,
    bit_rate: int,
    samples: np.ndarray,
    sample_rate: int,
    _: np.random.Generator,
) -> np.ndarray:
    """Encode the samples with an FFmpeg encoder at `codec_rate` hertz, and decode the result."""
    file = io.BytesIO()
    resampled = soxr.resample(samples, sample_rate, codec_rate).astype(np.float32)
    frame = av.AudioFrame.from_ndarray(resampled.clip(-1, 1)[None], format="fltp", layout="mono")
    frame.sample_rate = codec_rate
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=codec_rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        if bit_rate:
            stream.bit_rate = bit_rate
        if codec == "libopus":
            stream.options = {"application": "voip"}
        resampler = av.AudioResampler(stream.format, "mono", codec_rate, stream.frame_size or 1024)
        for sent in (*resampler.resample(frame), *resampler.resample(None)):
            output.mux(stream.encode(sent))
        output.mux(stream.encode(None))
    file.seek(0)
    decoded = decode(file, max_seconds=math.inf)  # the length of the clip was limited already
    received = soxr.resample(decoded.samples, decoded.sample_rate, sample_rate)
    # The decoded sound may be a few samples longer or shorter than the clip.
    return np.pad(received, (0, max(0, len(samples) - len(received))))[: len(samples)]


def _room(samples: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Convolve with a room's impulse response: an impulse and decaying noise (Polack 1988)."""
    seconds = np.arange(round(ECHO_SECONDS * sample_rate)) / sample_rate
    echo = noise(len(seconds), sample_rate, 0, rng) * 10 ** (-3 * seconds / ECHO_SECONDS)
    echo[seconds < FIRST_ECHO_SECONDS] = 0
    response = echo / np.sqrt(np.sum(echo**2))
    response[0] = 1
    response /= np.sqrt(2)
    length = scipy.fft.next_fast_len(len(samples) + len(response), real=True)
    spectrum = scipy.fft.rfft(samples, length) * scipy.fft.rfft(response, length)
    result: np.ndarray = scipy.fft.irfft(spectrum, length)[: len(samples)]
    return result


def _level(
    decibels: float, samples: np.ndarray, sample_rate: int, _: np.random.Generator
) -> np.ndarray:
    return samples * 10 ** (decibels / 20)


CONDITIONS: dict[str, tuple[str, str, Effect]] = {
    "noise-60": ("noise", "white noise 60 dB below full scale", partial(_noise, "room", 60)),
    "noise-50": ("noise", "white noise 50 dB below full scale", partial(_noise, "room", 50)),
    "noise-40": ("noise", "white noise 40 dB below full scale", partial(_noise, "room", 40)),
    "white-20": ("noise", "white noise 20 dB below the speech", partial(_noise, "white", 20)),
    "pink-20": ("noise", "pink noise 20 dB below the speech", partial(_noise, "pink", 20)),
    "phone": (
        "phone",
        "telephone band of 300 to 3,400 Hz, sampled at 8 kHz, in 8-bit mu-law (ITU-T G.711)",
        _phone,
    ),
    "opus-16": (
        "codec",
        "Opus for voice at 16 kbit/s",
        partial(_through_codec, "libopus", "ogg", 48_000, 16_000),
    ),
    "mp3-16": (
        "codec",
        "MP3 at 16 kHz and 16 kbit/s",
        partial(_through_codec, "libmp3lame", "mp3", 16_000, 16_000),
    ),
    "room": (
        "room",
        "the echo of a small room, as strong as the direct sound, with a reverberation time of "
        "0.4 s",
        _room,
    ),
    "level-plus-20": ("level", "20 dB louder, clipped at full scale", partial(_level, 20.0)),
    "level-minus-20": ("level", "20 dB quieter", partial(_level, -20.0)),
}
"""All conditions: {name: (group, description, effect)}."""
