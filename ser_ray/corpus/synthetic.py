"""The synthetic corpus: synthesised voices with the names, layout and modalities of RAVDESS.

It lets users try every stage without RAVDESS. 24 actors speak each of the 8 emotions once, and
every take is a wav, an mp4 with sound and a silent mp4. A marker file in the folder says that the
clips are synthetic. Emotions differ in pitch, loudness, tempo and timbre, and so do speakers. A
score on these clips shows that the program works; it is not a result on RAVDESS.

A voice is a source and a filter (Fant 1960). The source consists of glottal pulses and breath
noise. The filter has the formants of a vowel and a spectral tilt, and changes with every frame.
"""

import dataclasses
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
import soundfile

from ser_ray.corpus.manifest import SYNTHETIC_MARKER
from ser_ray.corpus.ravdess.names import EMOTIONS, SPEAKERS, ClipName, format_name
from ser_ray.errors import CorpusError

VERSION = 1
"""Number in the marker file. Raise it when the clips change, so that old folders are replaced."""

_ABOUT = (
    "A synthetic corpus made by ser_ray, with the names and layout of RAVDESS.\n"
    "Results on these clips are not results on RAVDESS.\n"
)
_SAMPLE_RATE = 48_000
_FRAME_LENGTH = 1024  # samples in a frame of the filter
_HOP_LENGTH = _FRAME_LENGTH // 4
_SYLLABLES_PER_SECOND = 5.0
_LEVEL = -34.0  # dBFS, RMS of a neutral voice; low, because angry voices are louder
_FLOOR = -62.0  # dB, noise of the room relative to the voice; trimming must treat it as silence
_VIDEO_SIZE = 64  # pixels, width and height of the videos
_VIDEO_FRAME_RATE = 8

# Formants of men in hertz (Peterson and Barney 1952). `_HIGHER_FORMANTS` are of a uniform tube.
_VOWELS = {
    "i": (390, 1990, 2550),  # bit
    "a": (730, 1090, 2440),  # father
    "o": (570, 840, 2410),  # talk
}
_HIGHER_FORMANTS = (3500, 4500, 5500, 6500, 7500)
# The vowels of "Kids are talking" and "Dogs are sitting", the beginnings of RAVDESS's statements.
_STATEMENTS = {1: "iaoi", 2: "oaii"}


class Manner(NamedTuple):
    """How a take is spoken, as differences from the speaker's neutral voice."""

    pitch: float
    """Semitones."""
    swing: float
    """Semitones; how far accented syllables rise above the contour."""
    slope: float
    """Semitones; how far the contour rises from the first to the last syllable."""
    level: float
    """Decibels."""
    tempo: float
    """Octaves of the speaking rate: 1 doubles the rate."""
    tilt: float
    """Decibels per octave above 500 Hz. Positive values sound bright, and negative values dark."""
    breath: float
    """Decibels of the breath noise."""
    tremor: float
    """Semitones of a 7 Hz vibrato."""
    roughness: float
    """Semitones by which the pitch changes at random every 10 ms."""


# After the acoustic profiles of Scherer (2003) and Juslin and Laukka (2003).
_MANNERS = {
    "neutral": Manner(0, 0, 0, 0, 0, 0, 0, 0, 0),
    "calm": Manner(-1, 0.5, -1, -5, -0.25, -2, 5, 0, 0),
    "happy": Manner(5, 5, 1, 4, 0.15, 1.5, 0, 0, 0),
    "sad": Manner(-1.5, -1, -4, -8, -0.4, -3, 12, 0.4, 0.1),
    "angry": Manner(4.5, 2, -3, 9, 0.25, 3.5, 3, 0, 1.2),
    "fearful": Manner(8, -0.5, 0, 1, 0.4, 0, 10, 1, 0.4),
    "disgust": Manner(-2.5, 3, -5, 2, -0.3, 2, 3, 0, 1.5),
    "surprised": Manner(5, 3, 9, 4, 0, 1, 3, 0, 0),
}
_SPREAD = Manner(1.2, 0.8, 1.2, 1.5, 0.08, 0.6, 1.5, 0.1, 0.1)
"""Standard deviations by which the takes of one emotion differ."""
_STRENGTH = {"normal": 0.85, "strong": 1.2}


@dataclass(frozen=True, slots=True)
class Voice:
    """The characteristics of a speaker's voice."""

    pitch: float
    """Hertz of the neutral voice."""
    formant_scale: float
    """Formants relative to those of a man. A shorter vocal tract has a value above 1."""
    level: float
    """Decibels."""
    tempo: float
    """Octaves of the speaking rate."""
    tilt: float
    """Decibels per octave."""
    expressiveness: float
    """Factor for every `Manner` of this speaker."""


def make_synthetic_corpus(target: Path, *, seed: int = 0) -> None:
    """Make the synthetic corpus at `target`: 192 takes in 576 files, within seconds.

    The folder appears only when it is complete. An existing synthetic corpus is replaced if its
    seed or version differs, and kept otherwise.

    Raises:
        CorpusError: `target` has other files in it, or cannot be written.
    """
    marker = target / SYNTHETIC_MARKER
    text = f"{_ABOUT}version {VERSION}, seed {seed}\n"
    if marker.is_file():
        if marker.read_text() == text:
            return
        shutil.rmtree(target.resolve())
    elif target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CorpusError(
            f"{target}: has files that are not a synthetic corpus and would be lost; choose an "
            "empty or a new folder"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            made = Path(temporary) / target.name
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoders run without the GIL
                list(pool.map(lambda speaker: _write_speaker(made, speaker, seed), SPEAKERS))
            (made / SYNTHETIC_MARKER).write_text(text)
            made.replace(target)
    except OSError as error:
        raise CorpusError(
            f"{target}: cannot be written ({error}); choose another folder"
        ) from error


def _write_speaker(root: Path, speaker: str, seed: int) -> None:
    """Write a take of each emotion by one actor in all modalities, as Zenodo's archives have them.

    Intensity, statement and repetition change with the actor.
    """
    audio = root / "Audio_Speech_Actors_01-24" / f"Actor_{speaker}"
    video = root / f"Video_Speech_Actor_{speaker}" / f"Actor_{speaker}"
    audio.mkdir(parents=True)
    video.mkdir(parents=True)
    voice = _draw_voice(speaker, seed)
    for index, emotion in enumerate(EMOTIONS):
        turn = int(speaker) + index
        clip = ClipName(
            modality="audio",
            channel="speech",
            emotion=emotion,
            intensity="strong" if turn % 2 and emotion != "neutral" else "normal",
            statement=1 + turn // 2 % 2,
            repetition=1 + turn // 4 % 2,
            speaker=speaker,
        )
        rng = np.random.default_rng([seed, int(speaker), index])
        strength = voice.expressiveness * _STRENGTH[clip.intensity]
        manner = Manner(*(strength * np.array(_MANNERS[emotion]) + rng.normal(0, _SPREAD)))
        samples = speak(_STATEMENTS[clip.statement], voice, manner, rng)
        soundfile.write(audio / format_name(clip), samples, _SAMPLE_RATE, "PCM_16")
        both = dataclasses.replace(clip, modality="av")
        _write_mp4(video / format_name(both), samples, sound=True)
        silent = dataclasses.replace(clip, modality="video")
        _write_mp4(video / format_name(silent), samples, sound=False)


def _draw_voice(speaker: str, seed: int) -> Voice:
    rng = np.random.default_rng([seed, int(speaker)])
    male = int(speaker) % 2 == 1
    return Voice(
        pitch=rng.uniform(95, 140) if male else rng.uniform(170, 235),
        formant_scale=rng.uniform(0.93, 1.05) if male else rng.uniform(1.08, 1.22),
        level=rng.normal(0, 2),
        tempo=rng.normal(0, 0.1),
        tilt=rng.normal(0, 1),
        expressiveness=rng.uniform(0.8, 1.2),
    )


def speak(
    vowels: str, voice: Voice, manner: Manner, rng: np.random.Generator
) -> npt.NDArray[np.int16]:
    """Synthesise an utterance with one syllable per vowel, and silence before and after it.

    Returns:
        Samples [num_samples] at 48 kHz.
    """
    seconds = len(vowels) / _SYLLABLES_PER_SECOND / 2 ** (voice.tempo + manner.tempo)
    time = np.arange(round(seconds * _SAMPLE_RATE)) / _SAMPLE_RATE
    position = time / seconds * len(vowels)  # 1.5 is the middle of the second syllable
    pitch = _pitch_contour(time, position, voice, manner, rng)
    # The mouth opens from 0 to 1 and closes again in each syllable.
    opening = np.sin(np.pi * (position % 1)) ** 0.7
    onset = np.exp(-(position % 1) * 20)  # the consonant's burst of noise

    cycles = np.cumsum(pitch) / _SAMPLE_RATE
    pulses = np.diff(np.floor(cycles), prepend=0)
    pulses *= np.sqrt(_SAMPLE_RATE / pitch)  # equal power at any pitch
    breath = 10 ** ((manner.breath - 30) / 20) * opening + 0.1 * onset
    source = pulses * opening + rng.normal(0, 1, len(time)) * breath
    syllable = np.clip(position[::_HOP_LENGTH].astype(int), 0, len(vowels) - 1)
    formants = np.array([_VOWELS[vowel] + _HIGHER_FORMANTS for vowel in vowels])
    gain = _gain(formants * voice.formant_scale, voice.tilt + manner.tilt)[syllable]
    voiced = _filter(source, gain)

    level = 10 ** ((_LEVEL + voice.level + manner.level) / 20)
    voiced *= level / np.sqrt(np.mean(voiced**2))
    before, after = (round(rng.uniform(0.12, 0.22) * _SAMPLE_RATE) for _ in range(2))
    samples = np.pad(voiced, (before, after))
    samples += rng.normal(0, level * 10 ** (_FLOOR / 20), len(samples))
    return np.round(np.tanh(samples) * np.iinfo(np.int16).max).astype(np.int16)


def _pitch_contour(
    time: np.ndarray, position: np.ndarray, voice: Voice, manner: Manner, rng: np.random.Generator
) -> np.ndarray:
    """Return the fundamental frequency of every sample in hertz."""
    num_syllables = round(position[-1])
    accents = rng.uniform(0.3, 1, num_syllables)[
        np.minimum(position.astype(int), num_syllables - 1)
    ]
    semitones = manner.pitch + (2 + manner.swing) * accents * np.sin(np.pi * (position % 1)) ** 2
    semitones += (manner.slope - 1) * (position / num_syllables - 0.5)
    semitones += manner.tremor * np.sin(2 * np.pi * 7 * time)
    knots = np.arange(0, time[-1] + 0.01, 0.01)
    wobble = rng.normal(0, 0.1 + max(manner.roughness, 0), len(knots))
    return voice.pitch * 2 ** ((semitones + np.interp(time, knots, wobble)) / 12)


def _gain(formants: np.ndarray, tilt: float) -> np.ndarray:
    """Return the filter's magnitude [vowels, bins] for formants [vowels, 8] in hertz.

    Each formant is a second-order resonance. `tilt` is added to the usual -6 dB per octave, which
    is the sum of -12 dB for the glottal pulses and +6 dB for the lips (Klatt 1980).
    """
    frequency = np.fft.rfftfreq(_FRAME_LENGTH, 1 / _SAMPLE_RATE)
    octaves = np.log2(np.maximum(frequency, 500) / 500)
    gain = 10 ** ((tilt - 6) * octaves / 20) * np.ones((len(formants), 1))
    for formant in formants.T[:, :, np.newaxis]:
        bandwidth = 60 + formant / 20
        square = formant**2
        gain *= square / np.hypot(square - frequency**2, bandwidth * frequency)
    gain[:, frequency < 60] = 0
    return gain


def _filter(source: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """Filter a source [num_samples] by overlap-add, with a magnitude per frame [frames, bins]."""
    padded = np.pad(source, (_FRAME_LENGTH // 2, _FRAME_LENGTH))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME_LENGTH)[::_HOP_LENGTH][
        : len(gain)
    ]
    window = np.hanning(_FRAME_LENGTH + 1)[:-1]
    shaped = np.fft.irfft(np.fft.rfft(frames * window) * gain)
    result = np.zeros(len(padded))
    for index, frame in enumerate(shaped):
        result[index * _HOP_LENGTH : index * _HOP_LENGTH + _FRAME_LENGTH] += frame
    return result[_FRAME_LENGTH // 2 : _FRAME_LENGTH // 2 + len(source)]


def _write_mp4(path: Path, samples: npt.NDArray[np.int16], *, sound: bool) -> None:
    """Write an H.264 video, with or without AAC sound. The picture gets brighter with the voice."""
    step = _SAMPLE_RATE // _VIDEO_FRAME_RATE
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=_VIDEO_FRAME_RATE)
        video.width = video.height = _VIDEO_SIZE
        video.pix_fmt = "yuv420p"
        video.thread_count = 1  # the same bytes on every machine
        audio = None
        if sound:
            audio = container.add_stream("aac", rate=_SAMPLE_RATE, layout="mono")
            audio.options = {"aac_coder": "fast"}  # the default coder takes half of the total time
        for start in range(0, len(samples), step):
            loudness = np.abs(samples[start : start + step].astype(float)).max() / 2**15
            image = np.full((_VIDEO_SIZE, _VIDEO_SIZE), round(60 + 180 * loudness**0.5), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(image, format="gray")))
        container.mux(video.encode())
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(samples[np.newaxis], format="s16", layout="mono")
            frame.sample_rate = _SAMPLE_RATE
            container.mux(audio.encode(frame))
            container.mux(audio.encode())
