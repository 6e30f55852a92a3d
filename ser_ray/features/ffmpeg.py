"""Decodes videos and audio formats with PyAV: all except wav, and wavs that soundfile cannot read.

Only the audio packets of a file are read, and only the formats and codecs listed here are allowed.
"""

from collections.abc import Iterator
from typing import BinaryIO

import av
import av.container
import av.error
import av.stream
import numpy as np
import soxr

from ser_ray.features.errors import ClipError
from ser_ray.features.samples import (
    MISSING_SECONDS,
    MIX_SECONDS,
    Decoded,
    require_length,
    require_shape,
    to_mono,
)

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
"""FFmpeg's decoders that may run. They decode no pictures: decoding the first picture takes 20 of
the 22 ms of opening a 720-line video."""
GAP_SECONDS = 0.06
"""A longer gap between the time stamps of two frames is filled with silence. Rounding and inexact
clocks cause shorter gaps."""
MAX_DEMUX_ERRORS = 100
"""Reading ends after this many damaged places in the container."""
EXACT_LENGTH = ("mp4", "aiff", "au", "flac", "tta", "wv", "matroska")
"""Formats whose header declares the exact length; FFmpeg estimates the length of other formats."""
ESTIMATED_CODECS = ("adpcm", "gsm")
"""Codecs with inexact lengths even in EXACT_LENGTH, because the header counts packets."""
PAUSES = "mp4"
"""The format that stores time stamps separately from the sound. There, a gap means that the
recorder paused. In other formats, a gap means that packets are missing."""


class UnsupportedError(Exception):
    """FFmpeg cannot read a file; the message gives the reason."""


def decode_with_ffmpeg(
    source: str | BinaryIO, max_seconds: float, *, ignore_length: bool, is_counted: bool
) -> Decoded:
    """Decode the first audio stream with PyAV, and skip the packets of all other streams.

    Args:
        source: path or seekable stream.
        max_seconds: longer clips are `too_long`.
        ignore_length: read a wav to the end of the file, and ignore the length in its header.
        is_counted: whether the header of an mp3 declares its length.

    Raises:
        UnsupportedError: FFmpeg does not know the format or the codec.
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
                raise UnsupportedError("its audio codec is not supported")
            for other in clip.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            exact = (*EXACT_LENGTH, "mp3") if is_counted else EXACT_LENGTH
            return _decode_packets(clip, stream, max_seconds, exact)
    except av.error.FFmpegError as error:
        raise UnsupportedError("damaged, or not a supported audio or video format") from error


class _Timeline:
    """Collects the frames of a stream, with silence in place of missing frames."""

    def __init__(self, sample_rate: int, max_seconds: float, *, has_pauses: bool) -> None:
        self.sample_rate, self._max_seconds = sample_rate, max_seconds
        self._has_pauses = has_pauses
        self.num_samples = self.num_lost = 0
        self._begin: float | None = None  # time stamp of sample 0
        self._blocks: list[np.ndarray] = []  # [channels, num_samples], with equal channels
        self._mixed: list[np.ndarray] = []  # [num_samples]
        self._num_mixed = 0

    def append(self, block: np.ndarray, second: float | None) -> None:
        """Append samples `[channels, num_samples]`; `second` is their time stamp, if known."""
        if second is not None:
            now = self.num_samples / self.sample_rate
            gap = 0.0 if self._begin is None else second - self._begin - now
            if GAP_SECONDS < gap <= self._max_seconds - now:
                self.append_silence(gap, is_lost=not self._has_pauses)
            elif self._begin is None or abs(gap) > GAP_SECONDS:  # another clock begins
                self._begin = second - now
        self._append(block)

    def append_silence(self, seconds: float, *, is_lost: bool) -> None:
        """Append silence in place of missing frames."""
        num_samples = round(seconds * self.sample_rate)
        channels = len(self._blocks[-1]) if self._blocks else 1
        self._append(np.zeros((channels, num_samples), np.float32))
        self.num_lost += num_samples * is_lost

    def _append(self, block: np.ndarray) -> None:
        if self._blocks and len(block) != len(self._blocks[0]):
            self._mix()
        self._blocks.append(block)
        self.num_samples += block.shape[1]
        require_length(self.num_samples / self.sample_rate, self._max_seconds)
        if self.num_samples - self._num_mixed > MIX_SECONDS * self.sample_rate:
            self._mix()

    def _mix(self) -> None:
        if self._blocks:
            self._mixed.append(to_mono(np.concatenate(self._blocks, axis=1)))
            self._blocks, self._num_mixed = [], self.num_samples

    def samples(self) -> np.ndarray:
        """Return all samples as one channel, `[num_samples]` float32."""
        self._mix()
        return np.concatenate([np.empty(0, np.float32), *self._mixed])


def _decode_packets(
    clip: av.container.InputContainer,
    stream: av.AudioStream,
    max_seconds: float,
    exact_formats: tuple[str, ...],
) -> Decoded:
    require_shape(stream.channels, stream.sample_rate)
    sound = _Timeline(stream.sample_rate, max_seconds, has_pauses=PAUSES in clip.format.name)
    stream.codec_context.options = {"err_detect": "crccheck"}  # without it, damage is loud noise
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
                sound.sample_rate = frame.sample_rate  # AAC's header may declare half the rate
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
    if MISSING_SECONDS < missing <= max_seconds - seconds:  # if longer, the header is wrong
        lost += missing
    return Decoded(sound.samples(), rate, lost, decoded)


def _declared_seconds(
    clip: av.container.InputContainer, stream: av.AudioStream, exact_formats: tuple[str, ...]
) -> float:
    """Return the exact length in seconds that the header declares, or 0 if there is none."""
    is_exact = any(name in clip.format.name for name in exact_formats)
    if not is_exact or stream.codec_context.name.startswith(ESTIMATED_CODECS):
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (clip.duration or 0) / av.time_base if len(clip.streams) == 1 else 0.0


def _packets(
    clip: av.container.InputContainer, stream: av.AudioStream
) -> Iterator["av.Packet[av.AudioStream]"]:
    """Yield the packets of a stream, and continue after damaged places in the container."""
    for _ in range(MAX_DEMUX_ERRORS):
        try:
            yield from clip.demux(stream)
            return
        except av.error.InvalidDataError:
            continue
