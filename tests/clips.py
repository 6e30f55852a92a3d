"""Sound and video files for the tests, made from scratch."""

import itertools
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import soundfile


def voice(seconds: float = 1.0, sample_rate: int = 48_000, seed: int = 0) -> np.ndarray:
    """Something shaped like speech: harmonics under a slow envelope, `[num_samples]` float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    pitch = 120 + 20 * np.sin(2 * np.pi * 3 * time + rng.uniform(0, 6))
    phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
    tone = sum(np.sin(n * phase) / n for n in range(1, 30))
    envelope = 0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)
    noise = 0.001 * rng.standard_normal(len(time))
    return (0.2 * tone * envelope + noise).astype(np.float32)


def write_wav(path: Path, samples: np.ndarray, sample_rate: int = 48_000, **kwargs: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, sample_rate, format="WAV", **({"subtype": "PCM_16"} | kwargs))
    return path


def write_video(
    path: Path, samples: np.ndarray | None, *, seconds: float = 1.0, size: int = 64
) -> Path:
    """Write an mp4 of noise pictures, with 48 kHz samples as AAC sound or without an audio stream.

    Sound and pictures are interleaved and the index is at the end, as in the corpus.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=25)
        video.width = video.height = size
        video.pix_fmt = "yuv420p"
        sound = None if samples is None else container.add_stream("aac", rate=48_000, layout="mono")
        for number in range(round(seconds * 25)):
            picture = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            if sound is not None and samples is not None:
                start = number * 1920
                container.mux(sound.encode(audio_frame(samples[start : start + 1920], start)))
        container.mux(video.encode(None))
        if sound is not None:
            container.mux(sound.encode(None))
    return path


def write_sound(
    path: Path, samples: np.ndarray, codec: str, container_format: str, rate: int = 48_000
) -> Path:
    """Write 48 kHz mono sound with one of FFmpeg's encoders, which may get another rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format=container_format) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        to_codec = av.AudioResampler(
            format=stream.format, rate=rate, frame_size=stream.frame_size or 1024
        )
        for frame in (*to_codec.resample(audio_frame(samples, 0)), *to_codec.resample(None)):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def audio_frame(samples: np.ndarray, start: int) -> av.AudioFrame:
    """Make a frame of 48 kHz samples that begins at sample `start`."""
    block = np.ascontiguousarray(samples[None], np.float32)
    frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
    return frame


def clip_names(count: int, modality: str = "03") -> list[str]:
    """Valid names of RAVDESS without their endings, actor by actor."""
    names = (
        f"{modality}-01-{emotion:02d}-01-{statement:02d}-{repetition:02d}-{actor:02d}"
        for actor in range(1, 25)
        for emotion in range(1, 9)
        for statement in (1, 2)
        for repetition in (1, 2)
    )
    return list(itertools.islice(names, count))


def small_corpus(root: Path, num_wavs: int = 20) -> Path:
    """Write wavs of half a second to a second, two videos with sound, two without, one text."""
    for number, name in enumerate(clip_names(num_wavs)):
        samples = voice(0.5 + 0.5 * number / num_wavs, seed=number) * 20_000
        write_wav(root / f"Actor_{name[-2:]}" / f"{name}.wav", samples.astype(np.int16))
    for name in clip_names(2, "01"):
        write_video(root / f"{name}.mp4", voice())
    for name in clip_names(2, "02"):
        write_video(root / f"{name}.mp4", None)
    (root / f"{clip_names(num_wavs + 1)[-1]}.wav").write_text("not a sound")
    return root


def six_speakers(target: Path) -> Path:
    """A corpus for three folds by speaker: one clip of half a second in each of four emotions."""
    for speaker in range(1, 7):
        for emotion in range(1, 5):
            samples = (voice(0.5, seed=10 * speaker + emotion) * 20_000).astype(np.int16)
            write_wav(target / f"03-01-{emotion:02d}-01-01-01-{speaker:02d}.wav", samples)
    return target
