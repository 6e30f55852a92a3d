"""First stage of a clip: the bytes of a file become mono samples.

The first bytes of a file determine its format; its name is ignored. soundfile reads wav and returns
16-bit samples as they are stored. PyAV reads all other formats, and only the audio packets of a
video. Each reads what the other cannot. A clip is treated as hostile until it is decoded: its
length is limited before and while samples are read, playlists are refused because they can name
other files, and every failure is a `ClipError` with a reason in words.

One rule holds for damage in all formats. What can be decoded is used, what is lost is counted in
seconds (`Sound.lost_seconds`), and a clip that lost more than half of itself is refused. Silence
takes the place of lost sound if the file says how long it was, so all times are the recording's.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import av
import av.container
import av.error
import av.stream
import numpy as np
import soundfile
import soxr
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
FORMATS = (
    "aac,ac3,aiff,amr,ape,asf,au,avi,caf,eac3,flac,flv,matroska,mov,mp3,mpeg,mpegts,nistsphere,ogg,"
    "tta,voc,w64,wav,wv"
)
"""FFmpeg's demuxers that may open a clip."""
CODECS = (
    "aac,aac_latm,ac3,adpcm_g722,adpcm_g726,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,adpcm_swf,"
    "adpcm_yamaha,alac,amrnb,amrwb,ape,eac3,flac,g722,g726,gsm,gsm_ms,libspeex,mp1float,mp2float,"
    "mp3float,nellymoser,opus,pcm_alaw,pcm_dvd,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,"
    "pcm_s16be,pcm_s16le,pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,speex,truespeech,"
    "tta,vorbis,wavpack,wmalossless,wmapro,wmav1,wmav2,wmavoice"
)
"""FFmpeg's decoders that may run. None of them decodes pictures: FFmpeg would decode the first
picture to learn its format, which is 20 of the 22 ms of opening a video of 720 lines."""
MISSING_SECONDS = 0.25
"""The end of a clip is lost if its header declares more than this many additional seconds. Many
headers are off by less."""
GAP_SECONDS = 0.06
"""A longer gap between the time stamps of two frames is filled with silence. Shorter ones come from
rounding and from the clocks of recorders."""
MIN_LOST_SECONDS = 0.01
"""Shorter losses are not mentioned."""
MAX_DEMUX_ERRORS = 100
"""A file whose container is damaged at more places is read up to there."""
UNKNOWN_LENGTH = 0x7FFFF000
"""A wav that was written to a pipe declares at least this many bytes, or none."""
MAX_CHUNKS = 100
"""Chunks of a wav that are searched for the samples; a real file has fewer than ten."""
EXACT_LENGTH = ("mp4", "aiff", "flac", "tta", "wv", "matroska")
"""Formats whose header declares the length; in others FFmpeg estimates it."""
FRAME_COUNTS = (b"Xing", b"Info", b"VBRI")
"""The names of the tables in the first frame of an mp3 that declare its length."""
HEAD_BYTES = 4096
"""Bytes that are searched for such a table."""
ESTIMATED_CODECS = ("adpcm", "gsm")
"""Codecs for which the headers of EXACT_LENGTH count packets instead of samples."""
PAUSES = "mp4"
"""The format whose time stamps are in an index, apart from the sound: a gap in them is a pause of
the recorder. In other formats, packets are missing."""
SMALL_FILE = 1 << 21
"""Files in a bucket up to this many bytes are fetched at once: 20 s of 16-bit mono at 48 kHz."""
READ_AHEAD = 1 << 18
"""Bytes fetched at once from larger files: a video's header may say that it has no sound."""


class Sound(NamedTuple):
    """What was decoded from a clip."""

    samples: np.ndarray
    """`[num_samples]`, int16 or float32; lost sound is silent."""
    sample_rate: int
    """Hertz."""
    lost_seconds: float = 0.0
    """Seconds of the recording that are missing from the file or cannot be decoded."""

    @property
    def loss(self) -> str | None:
        """The loss in words; None if nothing was lost."""
        if self.lost_seconds < MIN_LOST_SECONDS:
            return None
        return f"{self.lost_seconds:.2f} s of it are lost: the file is damaged or incomplete"


def decode(file: str | BinaryIO, *, max_seconds: float = 600.0) -> Sound:
    """Return the samples of a clip, its sample rate in hertz, and how many seconds were lost.

    Args:
        file: a path or URI, or a seekable binary stream.
        max_seconds: longer clips are `too_long`, and no more than this is ever decoded.

    Returns:
        Samples of a 16-bit mono wav are int16 as stored, all others are one channel (`to_mono`) as
        float32 with full scale ±1.

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
        reason = f"its content is damaged in a way that stops the decoder ({type(error).__name__})"
        raise ClipError("unreadable", reason) from error


def _decode_stream(stream: BinaryIO, max_seconds: float) -> Sound:
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), READ_AHEAD)
    try:
        return _decode(buffered, buffered, max_seconds)
    finally:
        buffered.detach()  # otherwise it would close the stream when it is deleted


def _decode(source: str | BinaryIO, file: BinaryIO, max_seconds: float) -> Sound:
    """Decode `source`, a path or stream, after a look at `file`, which has the same bytes."""
    start = file.read(12)
    if not start:
        raise ClipError("unreadable", "the file is empty")
    sound, has_length = None, True
    is_wav = start[:4] in (b"RIFF", b"RIFX", b"RF64") and start[8:] == b"WAVE"
    if is_wav:
        declared, held, has_length = _sample_bytes(file, is_big_endian=start[:4] == b"RIFX")
        file.seek(0)
        if has_length:
            sound = _decode_with_soundfile(source, max_seconds, declared / held if held else 1.0)
    if sound is None:
        file.seek(0)
        head = file.read(HEAD_BYTES)
        is_counted = any(name in head for name in FRAME_COUNTS)
        file.seek(0)
        try:
            sound = _decode_with_ffmpeg(
                source, max_seconds, ignore_length=not has_length, is_counted=is_counted
            )
        except _UnsupportedError as error:
            file.seek(0)
            sound = None if is_wav and has_length else _decode_with_soundfile(source, max_seconds)
            if sound is None:
                raise ClipError("unreadable", str(error)) from error
    samples, sample_rate, lost = _finite(sound)
    if samples.size == 0 and not lost:
        raise ClipError("unreadable", "it has no samples")
    decoded = sound.decoded_seconds - (lost - sound.lost_seconds)
    if decoded < lost:
        raise ClipError(
            "unreadable",
            f"only {decoded:.2f} s of its {decoded + lost:.2f} s can be decoded: the file is "
            "damaged or incomplete",
        )
    return Sound(full_scale(samples), sample_rate, lost)


class _UnsupportedError(Exception):
    """FFmpeg cannot read a file; the message is a reason for its owner."""


class _Decoded(NamedTuple):
    """What a library decoded, before it is checked."""

    samples: np.ndarray
    sample_rate: int
    lost_seconds: float
    decoded_seconds: float
    """Seconds of decoded sound, without the silence that replaces lost sound."""


def _finite(sound: _Decoded) -> Sound:
    """Replace samples that are not finite numbers by silence, and count them as lost."""
    samples, sample_rate, lost, _ = sound
    if samples.dtype != np.int16 and not (is_finite := np.isfinite(samples)).all():
        lost += np.count_nonzero(~is_finite) / sample_rate
        samples = np.where(is_finite, samples, np.float32(0))
    return Sound(samples, sample_rate, lost)


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


def _sample_bytes(wav: BinaryIO, *, is_big_endian: bool) -> tuple[int, int, bool]:
    """Return how many bytes of samples a wav declares and has, and whether the length is stated.

    soundfile reports only the bytes that it has. A length is not stated if the recorder did not
    come back to its header: it is 0, a placeholder, or leads to a place where no chunk begins.
    `wav` must be positioned after its first 12 bytes.
    """
    layout = ">4sI" if is_big_endian else "<4sI"
    for _ in range(MAX_CHUNKS):
        if len(header := wav.read(8)) < 8:
            break
        name, size = struct.unpack(layout, header)
        if name == b"data":
            start = wav.tell()
            held = wav.seek(0, io.SEEK_END) - start
            if size >= UNKNOWN_LENGTH:  # RF64 states it elsewhere; soundfile reads both to the end
                return held, held, True
            wav.seek(start + size + size % 2)
            after = wav.read(8)
            is_stated = bool(size) and (len(after) < 8 or _is_chunk(after, layout, held - size))
            return size, held, is_stated or not held
        wav.seek(size + size % 2, io.SEEK_CUR)  # chunks start at even positions
    return 0, 0, True


def _is_chunk(header: bytes, layout: str, bytes_left: int) -> bool:
    """Return whether these 8 bytes can begin a chunk: a name of letters, and a size that fits."""
    name, size = struct.unpack(layout, header)
    return all(32 <= letter < 127 for letter in name) and size <= bytes_left


def _decode_with_soundfile(
    source: str | BinaryIO, max_seconds: float, declared_share: float = 1.0
) -> _Decoded | None:
    """Decode with soundfile; None for a file that it cannot read.

    Args:
        declared_share: the length that the header declares, divided by the length that the file
            has.
    """
    try:
        with soundfile.SoundFile(source) as sound:
            seconds = sound.frames / sound.samplerate
            _check_shape(sound.channels, sound.samplerate)
            _check_length(seconds, max_seconds)
            missing = seconds * (declared_share - 1)
            lost = missing if missing > MISSING_SECONDS else 0.0
            if sound.channels == 1 and sound.subtype == "PCM_16":
                samples = sound.read(sound.frames, dtype="int16")
            else:
                samples = to_mono(sound.read(sound.frames, dtype="float32", always_2d=True).T)
            return _Decoded(samples, sound.samplerate, lost, seconds)
    except (soundfile.LibsndfileError, TypeError):  # soundfile takes any .raw to have no header
        return None


def _decode_with_ffmpeg(
    source: str | BinaryIO, max_seconds: float, *, ignore_length: bool, is_counted: bool
) -> _Decoded:
    """Decode the first audio stream with PyAV and skip the packets of all other streams.

    Args:
        ignore_length: read a wav to the end of the file, whatever its header declares.
        is_counted: an mp3 declares its length.

    Raises:
        _UnsupportedError: FFmpeg does not know the format or the codec.
    """
    options = {"format_whitelist": FORMATS, "codec_whitelist": CODECS}
    if ignore_length:
        options["ignore_length"] = "1"
    try:
        with av.open(source, "r", options=options, metadata_errors="ignore") as clip:
            if not clip.streams.audio:
                raise ClipError("no_audio", "it has no audio stream")
            stream = clip.streams.audio[0]
            if stream.codec_context is None:
                raise _UnsupportedError("its audio codec is not supported")
            for other in clip.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            exact = (*EXACT_LENGTH, "mp3") if is_counted else EXACT_LENGTH
            return _decode_packets(clip, stream, max_seconds, exact)
    except av.error.FFmpegError as error:
        raise _UnsupportedError("damaged, or not a supported audio or video format") from error


class _Timeline:
    """Collects the frames of a stream, with silence in place of those that are missing."""

    def __init__(self, sample_rate: int, max_seconds: float, *, has_pauses: bool) -> None:
        self.sample_rate, self._max_seconds = sample_rate, max_seconds
        self._has_pauses = has_pauses
        self.num_samples = self.num_lost = 0
        self._begin: float | None = None  # time stamp of sample 0
        self._blocks: list[np.ndarray] = []  # [channels, num_samples]; both may vary

    def append(self, block: np.ndarray, second: float | None) -> None:
        """Append samples `[channels, num_samples]` at a time stamp in seconds, if they have one."""
        if second is not None:
            now = self.num_samples / self.sample_rate
            gap = 0.0 if self._begin is None else second - self._begin - now
            if GAP_SECONDS < gap <= self._max_seconds - now:
                self.append_silence(gap, is_lost=not self._has_pauses)
            elif self._begin is None or abs(gap) > GAP_SECONDS:  # another clock begins
                self._begin = second - now
        self._append(block)

    def append_silence(self, seconds: float, *, is_lost: bool) -> None:
        """Append silence in place of frames that are missing."""
        num_samples = round(seconds * self.sample_rate)
        channels = len(self._blocks[-1]) if self._blocks else 1
        self._append(np.zeros((channels, num_samples), np.float32))
        self.num_lost += num_samples * is_lost

    def _append(self, block: np.ndarray) -> None:
        self._blocks.append(block)
        self.num_samples += block.shape[1]
        _check_length(self.num_samples / self.sample_rate, self._max_seconds)

    def samples(self) -> np.ndarray:
        """Return all samples as one channel, `[num_samples]` float32."""
        most = max((len(block) for block in self._blocks), default=1)
        if all(len(block) == most for block in self._blocks):
            empty = np.empty((most, 0), np.float32)
            return to_mono(np.concatenate([empty, *self._blocks], axis=1))
        return np.concatenate([to_mono(block) for block in self._blocks])


def _decode_packets(
    clip: av.container.InputContainer,
    stream: av.AudioStream,
    max_seconds: float,
    exact_formats: tuple[str, ...],
) -> _Decoded:
    _check_shape(stream.channels, stream.sample_rate)
    sound = _Timeline(stream.sample_rate, max_seconds, has_pauses=PAUSES in clip.format.name)
    stream.codec_context.options = {"err_detect": "crccheck"}  # otherwise damage can be loud noise
    to_float = av.AudioResampler(format="fltp")
    for packet in _packets(clip, stream):
        try:
            frames = packet.decode()
        except av.error.FFmpegError:
            seconds = float((packet.duration or 0) * (packet.time_base or 0))
            sound.append_silence(seconds, is_lost=True)
            continue
        for frame in frames:
            assert isinstance(frame, av.AudioFrame)
            if not sound.num_samples:
                sound.sample_rate = frame.sample_rate  # AAC's header may declare half of it
            for block in to_float.resample(frame):
                samples = block.to_ndarray()
                if frame.sample_rate != sound.sample_rate:
                    rates = frame.sample_rate, sound.sample_rate
                    samples = soxr.resample(samples.T, *rates).T
                sound.append(samples, frame.time)
    rate = sound.sample_rate
    seconds, lost = sound.num_samples / rate, sound.num_lost / rate
    decoded = seconds - lost
    missing = _declared_seconds(clip, stream, exact_formats) - seconds
    if MISSING_SECONDS < missing <= max_seconds - seconds:  # a longer one is a false header
        lost += missing
    return _Decoded(sound.samples(), rate, lost, decoded)


def _declared_seconds(
    clip: av.container.InputContainer, stream: av.AudioStream, exact_formats: tuple[str, ...]
) -> float:
    """Return the seconds of sound that the header declares, or 0 if it declares no exact length."""
    is_exact = any(name in clip.format.name for name in exact_formats)
    if not is_exact or stream.codec_context.name.startswith(ESTIMATED_CODECS):
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (clip.duration or 0) / av.time_base if len(clip.streams) == 1 else 0.0


def _packets(
    clip: av.container.InputContainer, stream: av.AudioStream
) -> Iterator["av.Packet[av.AudioStream]"]:
    """Yield the packets of a stream, also those after a place where the container is damaged."""
    for _ in range(MAX_DEMUX_ERRORS):
        try:
            yield from clip.demux(stream)
            return
        except av.error.InvalidDataError:
            continue


def cut(sound: Sound, start: float, end: float | None) -> tuple[Sound, str | None]:
    """Cut a segment out of a recording.

    Args:
        sound: the recording.
        start: first second of the segment.
        end: second at which it ends; None for the end of the recording.

    Returns:
        The segment, and what is missing from it in words; None if nothing is.

    Raises:
        ClipError: `beyond_end`, if less than half of the segment is inside the recording.
    """
    rate, num_samples = sound.sample_rate, len(sound.samples)
    first, last = round(start * rate), num_samples if end is None else round(end * rate)
    samples = sound.samples[first:last]
    missing = (last - first - len(samples)) / rate
    if not len(samples) or len(samples) / rate < missing:
        until = "its end" if end is None else f"{end:.2f} s"
        raise ClipError(
            "beyond_end",
            f"the segment is from {start:.2f} s to {until}, and the file ends at "
            f"{num_samples / rate:.2f} s",
        )
    losses = [f"its file: {sound.loss}"] if sound.loss else []
    if missing >= MIN_LOST_SECONDS:
        losses.append(f"{missing:.2f} s of it are after the end of the file")
    return sound._replace(samples=samples), "; ".join(losses) or None


def to_mono(channels: np.ndarray) -> np.ndarray:
    """Mix `[channels, num_samples]` to one channel as people hear it, `[num_samples]`.

    The result is usually the mean of the channels. Channels of opposite phase cancel each other in
    the mean. Therefore the loudest channel is returned if the mean has less than half the power
    that it would have if only one channel held sound. Constant offsets do not count as power.
    """
    if len(channels) == 1 or not channels.size:
        return channels.mean(axis=0)
    with np.errstate(invalid="ignore", over="ignore"):  # `_finite` deals with these samples
        mean = channels.mean(axis=0)
        powers = channels.var(axis=1)
        if mean.var() < powers.mean() / (2 * len(channels)):
            return channels[int(np.argmax(powers))]
    return mean


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
