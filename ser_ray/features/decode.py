"""First stage of a clip: the bytes of a file become mono samples.

The first bytes of a file determine its format; its name is ignored. soundfile reads wav and returns
16-bit samples as they are stored. PyAV reads all other formats, and only the audio packets of a
video. A clip is treated as hostile until it is decoded: its length is limited before and while
samples are read, playlists are refused because they can name other files, and every failure is a
`ClipError` with a reason in words.
"""

import io
import struct
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
"""Accepted sample rates in hertz. Limits on rate, channels and seconds limit the memory."""
MAX_PEAK = 8.0
"""Largest float sample that is accepted: full scale is 1, and a mix may exceed it a little."""
INTEGER_PEAK = 2.0**15
"""Full scale of float samples that a tool left in the 16-bit range. Larger ones are not sound."""
FORMATS = "aac,aiff,amr,asf,avi,caf,flac,matroska,mov,mp3,mpeg,mpegts,ogg,w64,wav"
"""FFmpeg's demuxers that may open a clip."""
CODECS = (
    "aac,ac3,adpcm_ima_wav,adpcm_ms,alac,amrnb,amrwb,eac3,flac,mp1float,mp2float,mp3float,opus,"
    "pcm_alaw,"
    "pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,pcm_s16be,pcm_s16le,pcm_s24be,pcm_s24le,"
    "pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,vorbis,speex,wavpack,wmapro,wmav1,wmav2"
)
"""FFmpeg's decoders that may run. None of them decodes pictures: FFmpeg would decode the first
picture to learn its format, which is 20 of the 22 ms of opening a video of 720 lines."""
MISSING_SECONDS = 0.25
"""A clip was cut short if its header declares more than this many additional seconds. Many headers
are off by less."""
UNKNOWN_LENGTHS = (0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000)
"""The numbers of bytes that a wav declares if it was written to a pipe."""
MAX_CHUNKS = 100
"""Chunks of a wav that are searched for the samples; a real file has fewer than ten."""
EXACT_LENGTH = ("mp4", "aiff")
"""Formats whose header declares the number of samples; in others it is an estimate."""
SMALL_FILE = 1 << 21
"""Files in a bucket up to this many bytes are fetched at once: 20 s of 16-bit mono at 48 kHz."""
READ_AHEAD = 1 << 18
"""Bytes fetched at once from larger files: a video's header may say that it has no sound."""


def decode(file: str | BinaryIO, *, max_seconds: float = 600.0) -> tuple[np.ndarray, int]:
    """Return the samples of a clip and its sample rate in hertz.

    Args:
        file: a path or URI, or a seekable binary stream.
        max_seconds: longer clips are `too_long`, and no more than this is ever decoded.

    Returns:
        Samples `[num_samples]` and the rate at which they were recorded. Samples of a 16-bit mono
        wav are int16 as stored, all others the mean over channels as float32 with full scale ±1.

    Raises:
        ClipError: `no_audio`, `too_long` or `unreadable`, with the reason.
    """
    try:
        if not isinstance(file, str):
            return _decode_stream(file, max_seconds)
        filesystem, path = filesystem_of(file)
        if isinstance(filesystem, fs.LocalFileSystem):
            with Path(path).open("rb") as local:
                return _decode(path, local, max_seconds)  # libraries are fastest with a path
        with filesystem.open_input_file(path) as remote:
            is_small = remote.size() <= SMALL_FILE
            return _decode_stream(io.BytesIO(remote.read()) if is_small else remote, max_seconds)
    except (ClipError, MemoryError):
        raise
    except ConfigError as error:  # no filesystem opens it
        raise ClipError("unreadable", str(error), failed="storage") from error
    except FileNotFoundError as error:
        # If the folder is missing too, a disk may not be mounted; if not, the clip was deleted.
        parent = Path(file).expanduser().parent if isinstance(file, str) else None
        has_folder = parent is None or "://" in str(file) or parent.exists()
        reason = "the file does not exist" if has_folder else "its folder does not exist"
        failed: Failure = "file" if has_folder else "storage"
        raise ClipError("unreadable", reason, failed=failed) from error
    except OSError as error:
        failed = "storage" if isinstance(file, str) and "://" in file else "file"
        reason = f"reading failed: {error.strerror or error}"
        raise ClipError("unreadable", reason, failed=failed) from error
    except Exception as error:  # a library fails in its own way on what this clip holds
        reason = f"decoding failed: {type(error).__name__}: {error}"
        raise ClipError("unreadable", reason) from error


def _decode_stream(stream: BinaryIO, max_seconds: float) -> tuple[np.ndarray, int]:
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), READ_AHEAD)
    try:
        return _decode(buffered, buffered, max_seconds)
    finally:
        buffered.detach()  # otherwise it would close the stream when it is deleted


def _decode(source: str | BinaryIO, file: BinaryIO, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode `source`, a path or stream, after a look at `file`, which has the same bytes."""
    start = file.read(12)
    if not start:
        raise ClipError("unreadable", "the file is empty")
    decoded = None
    if start[:4] in (b"RIFF", b"RIFX", b"RF64") and start[8:] == b"WAVE":
        declared, held = _sample_bytes(file, is_big_endian=start[:4] == b"RIFX")
        file.seek(0)
        decoded = _decode_wav(source, max_seconds, declared, held)
    file.seek(0)
    samples, sample_rate = decoded or _decode_any(source, max_seconds)
    if samples.size == 0:
        raise ClipError("unreadable", "it has no samples")
    return full_scale(samples), sample_rate


def full_scale(samples: np.ndarray) -> np.ndarray:
    """Scale float samples `[num_samples]` to full scale ±1; int16 samples are returned unchanged.

    Raises:
        ClipError: the samples are not finite or too large to be sound.
    """
    if samples.dtype == np.int16 or not samples.size:
        return samples
    peak = float(np.abs(samples).max())
    if peak <= MAX_PEAK:
        return samples
    if peak <= INTEGER_PEAK:
        return samples / np.float32(INTEGER_PEAK)
    what = f"as large as {peak:g}" if np.isfinite(peak) else "that are not finite numbers"
    raise ClipError("unreadable", f"it has samples {what}")


def _sample_bytes(wav: BinaryIO, *, is_big_endian: bool) -> tuple[int, int]:
    """Return how many bytes of samples a wav declares, and how many it has.

    soundfile reports only the latter. `wav` must be positioned after its first 12 bytes.
    """
    for _ in range(MAX_CHUNKS):
        if len(header := wav.read(8)) < 8:
            break
        name, size = struct.unpack(">4sI" if is_big_endian else "<4sI", header)
        if name == b"data":
            start = wav.tell()
            return size, wav.seek(0, io.SEEK_END) - start
        wav.seek(size + size % 2, io.SEEK_CUR)  # chunks start at even positions
    return 0, 0


def _decode_wav(
    source: str | BinaryIO, max_seconds: float, declared: int, held: int
) -> tuple[np.ndarray, int] | None:
    """Decode with soundfile; None for a wav that is damaged or whose codec only FFmpeg knows.

    `declared` and `held` are as `_sample_bytes` returns them.
    """
    try:
        with soundfile.SoundFile(source) as sound:
            seconds = sound.frames / sound.samplerate
            _check_shape(sound.channels, sound.samplerate)
            _check_length(seconds, max_seconds)
            if declared > held and declared not in UNKNOWN_LENGTHS:
                missing = seconds * (declared / max(held, 1) - 1)
                if missing > MISSING_SECONDS or seconds == 0:
                    raise _cut_short(seconds, seconds + missing)
            if sound.channels == 1 and sound.subtype == "PCM_16":
                return sound.read(dtype="int16"), sound.samplerate
            channels = sound.read(dtype="float32", always_2d=True)  # [num_samples, channels]
            return _mean(channels.T), sound.samplerate
    except (soundfile.LibsndfileError, TypeError):  # soundfile takes any .raw to have no header
        return None


def _decode_any(source: str | BinaryIO, max_seconds: float) -> tuple[np.ndarray, int]:
    """Decode the first audio stream with PyAV and skip the packets of all other streams."""
    options = {"format_whitelist": FORMATS, "codec_whitelist": CODECS}
    try:
        with av.open(source, "r", options=options, metadata_errors="ignore") as clip:
            if not clip.streams.audio:
                raise ClipError("no_audio", "it has no audio stream")
            stream = clip.streams.audio[0]
            for other in clip.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            return _decode_packets(clip, stream, max_seconds)
    except av.error.FFmpegError as error:
        reason = "damaged, or not a supported audio or video format"
        raise ClipError("unreadable", reason) from error


def _decode_packets(
    clip: av.container.InputContainer, stream: av.AudioStream, max_seconds: float
) -> tuple[np.ndarray, int]:
    if stream.codec_context is None:
        raise ClipError("unreadable", "its audio codec is not supported")
    sample_rate = stream.sample_rate
    _check_shape(stream.channels, sample_rate)
    to_float = av.AudioResampler(format="fltp")
    blocks: list[np.ndarray] = [np.empty(0, np.float32)]
    num_samples = 0
    for frame in clip.decode(stream):
        if not num_samples:
            sample_rate = frame.sample_rate  # the header of AAC may declare half of it
        if frame.sample_rate != sample_rate:
            raise ClipError("unreadable", "its sample rate changes in the middle")
        for block in to_float.resample(frame):
            blocks.append(_mean(block.to_ndarray()))  # [channels, num_samples], both may vary
            num_samples += block.samples
        _check_length(num_samples / sample_rate, max_seconds)
    declared = float((stream.duration or 0) * (stream.time_base or 0))
    is_exact = any(name in clip.format.name for name in EXACT_LENGTH)
    if is_exact and num_samples / sample_rate < declared - MISSING_SECONDS:
        raise _cut_short(num_samples / sample_rate, declared)
    return np.concatenate(blocks), sample_rate


def _mean(channels: np.ndarray) -> np.ndarray:
    """Average `[channels, num_samples]`. `full_scale` refuses samples that are not finite."""
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
