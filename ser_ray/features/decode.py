"""First stage of a clip: the bytes of a file become mono samples.

What a file holds is told by its first bytes, not by its name. wav goes through soundfile, which
hands over 16-bit samples as they are stored; everything else through PyAV, which reads only the
audio packets of a video. A clip is hostile until it is decoded: its length is bounded before and
while samples are read, only formats that hold their sound themselves are recognised (a playlist
names other files), and every way to fail is a `ClipError` with a reason in words.
"""

import io
import re
from pathlib import Path
from typing import BinaryIO, cast

import av
import av.container
import av.error
import av.stream
import numpy as np
import soundfile
from pyarrow import fs

from ser_ray.errors import ConfigError
from ser_ray.features.errors import ClipError, Failure
from ser_ray.storage.paths import filesystem_of

MAX_CHANNELS = 8
SAMPLE_RATES = range(1_000, 192_001)
"""Rates in hertz that are taken for sound; with channels and seconds they bound memory."""
MAX_PEAK = 8.0
"""Full scale of float samples is 1, beyond which a mix may go a little."""
INTEGER_PEAK = 2.0**15
"""Full scale where a tool forgot to divide; beyond is no sound."""
FORMATS = "aac,aiff,amr,asf,avi,caf,flac,matroska,mov,mp3,mpegts,ogg,w64,wav"
"""FFmpeg's readers that may look at a clip."""
CODECS = (
    "aac,ac3,adpcm_ima_wav,adpcm_ms,alac,amrnb,amrwb,eac3,flac,mp2float,mp3float,opus,pcm_alaw,"
    "pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,pcm_s16be,pcm_s16le,pcm_s24be,pcm_s24le,"
    "pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,vorbis,wavpack,wmapro,wmav1,wmav2"
)
"""FFmpeg's decoders that may run. None is for pictures: to learn their format FFmpeg would decode
the first one, which takes 20 ms of the 22 that opening a video of 720 lines takes."""
MISSING_SECONDS = 0.25
"""A clip that ends this long before its header says so was cut short; less is a sloppy header."""
UNKNOWN_LENGTHS = (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000)
"""Bytes of samples that a wav declares when it was written to a pipe."""
SURE_OF_THEIR_LENGTH = ("mp4", "aiff")
"""Formats whose header tells the number of samples; others are estimates."""
WHOLE = 1 << 21
"""Files in a bucket up to so many bytes are fetched at once: 20 s of 16-bit mono at 48 kHz."""
READ_AHEAD = 1 << 18
"""Bytes fetched at once of larger ones: a video may have no sound, which its header tells."""
START = 12
"""Bytes that tell a wav from everything else."""


def decode(file: str | BinaryIO, *, max_seconds: float = 600.0) -> tuple[np.ndarray, int]:
    """Return the samples of a clip and its sample rate in hertz.

    Args:
        file: a path or URI, or a seekable binary stream.
        max_seconds: longer clips are `too_long`; not more than this is ever decoded.

    Returns:
        Samples `[num_samples]`: int16 as stored where a wav is 16-bit mono, else the mean over
        channels as float32 with full scale ±1; and the rate they were recorded at.

    Raises:
        ClipError: `no_audio`, `too_long` or `unreadable`, with the reason.
    """
    try:
        if not isinstance(file, str):
            return _decode_stream(file, max_seconds)
        filesystem, path = filesystem_of(file)
        if isinstance(filesystem, fs.LocalFileSystem):
            with Path(path).open("rb", buffering=0) as opened:
                start = opened.read(START)
            return _decode(path, start, max_seconds)  # its readers are fastest with a path
        with filesystem.open_input_file(path) as stream:
            is_small = stream.size() <= WHOLE
            return _decode_stream(io.BytesIO(stream.read()) if is_small else stream, max_seconds)
    except (ClipError, MemoryError):
        raise
    except ConfigError as error:  # no filesystem opens it
        raise ClipError("unreadable", str(error), failed="storage") from error
    except FileNotFoundError as error:
        # With its folder gone, this is a disk that is not mounted rather than a clip deleted.
        is_alone = not isinstance(file, str) or "://" in file or Path(file).parent.exists()
        reason = "there is no such file any more" if is_alone else "its folder is not there"
        failed: Failure = "file" if is_alone else "storage"
        raise ClipError("unreadable", reason, failed=failed) from error
    except OSError as error:
        failed = "storage" if isinstance(file, str) and "://" in file else "file"
        reason = f"reading failed: {error.strerror or error}"
        raise ClipError("unreadable", reason, failed=failed) from error
    except Exception as error:  # a library that was not made for what this clip holds
        reason = f"decoding failed: {type(error).__name__}: {error}"
        raise ClipError("unreadable", reason) from error


def _decode_stream(stream: BinaryIO, max_seconds: float) -> tuple[np.ndarray, int]:
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), READ_AHEAD)
    try:
        return _decode(buffered, buffered.peek(START)[:START], max_seconds)
    finally:
        buffered.detach()  # or its end would close the stream


def _decode(source: str | BinaryIO, start: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode what starts with the bytes `start`."""
    if not start:
        raise ClipError("unreadable", "the file is empty")
    decoded = None
    if start[:4] in (b"RIFF", b"RIFX", b"RF64") and start[8:] == b"WAVE":
        decoded = _decode_wav(source, max_seconds)
    samples, sample_rate = decoded or _decode_any(source, max_seconds)
    if samples.size == 0:
        raise ClipError("unreadable", "it holds no samples")
    return full_scale(samples), sample_rate


def full_scale(samples: np.ndarray) -> np.ndarray:
    """Samples [num_samples] whose full scale is ±1, or as they are where they are int16.

    Raises:
        ClipError: they are no sound.
    """
    if samples.dtype == np.int16 or not samples.size:
        return samples
    peak = float(np.abs(samples).max())
    if peak <= MAX_PEAK:
        return samples
    if peak <= INTEGER_PEAK:
        return samples / np.float32(INTEGER_PEAK)
    what = f"as large as {peak:g}" if np.isfinite(peak) else "that are not finite numbers"
    raise ClipError("unreadable", f"it holds samples {what}")


def _decode_wav(source: str | BinaryIO, max_seconds: float) -> tuple[np.ndarray, int] | None:
    """Decode with soundfile; None for a wav that is damaged or coded as only FFmpeg knows."""
    try:
        with soundfile.SoundFile(source) as sound:
            _check_shape(sound.channels, sound.samplerate)
            _check_length(sound.frames / sound.samplerate, max_seconds)
            _check_whole(sound)
            if sound.channels == 1 and sound.subtype == "PCM_16":
                return sound.read(dtype="int16"), sound.samplerate
            channels = sound.read(dtype="float32", always_2d=True)  # [num_samples, channels]
            return _mean(channels.T), sound.samplerate
    except (soundfile.LibsndfileError, TypeError):  # this: named .raw, which it believes
        if not isinstance(source, str):
            source.seek(0)
        return None


def _check_whole(sound: soundfile.SoundFile) -> None:
    """Refuse a wav with fewer samples than its header declares; libsndfile only notes it."""
    note = re.search(r"^data : (\d+) \(should be (\d+)\)$", sound.extra_info, re.MULTILINE)
    if note is None or int(note[1]) in UNKNOWN_LENGTHS:
        return
    declared, held = (int(number) for number in note.groups())
    seconds = sound.frames / sound.samplerate
    missing = seconds * (declared / max(held, 1) - 1)
    if missing > MISSING_SECONDS or seconds == 0:
        whole = seconds + missing
        raise _cut_short(seconds, whole)


def _decode_any(source: str | BinaryIO, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode the first audio stream with PyAV, passing over the packets of all others."""
    options = {"format_whitelist": FORMATS, "codec_whitelist": CODECS}
    try:
        with av.open(source, "r", options=options, metadata_errors="ignore") as clip:
            if not clip.streams.audio:
                raise ClipError("no_audio", "it holds no audio stream")
            stream = clip.streams.audio[0]
            for other in clip.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            return _decode_packets(clip, stream, max_seconds)
    except av.error.FFmpegError as error:
        reason = "not a sound or video format that is read, or damaged"
        raise ClipError("unreadable", reason) from error


def _decode_packets(
    clip: av.container.InputContainer, stream: av.AudioStream, max_seconds: float
) -> tuple[np.ndarray, int]:
    if stream.codec_context is None:
        raise ClipError("unreadable", "its sound is coded in a way that is not read")
    sample_rate = stream.sample_rate
    _check_shape(stream.channels, sample_rate)
    to_float = av.AudioResampler(format="fltp")
    blocks: list[np.ndarray] = [np.empty(0, np.float32)]
    num_samples = 0
    for frame in clip.decode(stream):
        if not num_samples:
            sample_rate = frame.sample_rate  # AAC's header may say half of it
        if frame.sample_rate != sample_rate:
            raise ClipError("unreadable", "its sample rate changes in the middle")
        for block in to_float.resample(frame):
            blocks.append(_mean(block.to_ndarray()))  # of [channels, num_samples], which may vary
            num_samples += block.samples
        _check_length(num_samples / sample_rate, max_seconds)
    declared = float((stream.duration or 0) * (stream.time_base or 0))
    is_sure = any(name in clip.format.name for name in SURE_OF_THEIR_LENGTH)
    if is_sure and num_samples / sample_rate < declared - MISSING_SECONDS:
        raise _cut_short(num_samples / sample_rate, declared)
    return np.concatenate(blocks), sample_rate


def _mean(channels: np.ndarray) -> np.ndarray:
    """Average `[channels, num_samples]`; what is not finite stays so, to be refused."""
    with np.errstate(invalid="ignore", over="ignore"):
        return channels.mean(axis=0)


def _cut_short(seconds: float, declared: float) -> ClipError:
    return ClipError(
        "unreadable", f"cut short: {seconds:.2f} s of the {declared:.2f} s it declares"
    )


def _check_shape(num_channels: int, sample_rate: int) -> None:
    if num_channels not in range(1, MAX_CHANNELS + 1) or sample_rate not in SAMPLE_RATES:
        raise ClipError(
            "unreadable",
            f"{num_channels} channels at {sample_rate} Hz: only 1 to {MAX_CHANNELS} channels at "
            f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} Hz are read",
        )


def _check_length(seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise ClipError("too_long", f"longer than {max_seconds:g} s")
