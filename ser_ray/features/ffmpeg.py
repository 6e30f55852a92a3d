"""Decodes videos and audio files with PyAV, which calls FFmpeg. `decode` uses this module for all
files except the wavs that soundfile can read.

Only the audio packets of a file are read, and only the formats and codecs listed here are allowed.
"""

import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
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
"""FFmpeg's demuxers that are allowed to open a clip."""
CODECS = (
    "aac,aac_latm,ac3,adpcm_g722,adpcm_g726,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,adpcm_swf,"
    "adpcm_yamaha,alac,amrnb,amrwb,ape,eac3,flac,g722,g726,gsm,gsm_ms,libspeex,mp1float,mp2float,"
    "mp3float,nellymoser,opus,pcm_alaw,pcm_dvd,pcm_f32be,pcm_f32le,pcm_f64be,pcm_f64le,pcm_mulaw,"
    "pcm_s16be,pcm_s16le,pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,speex,truespeech,"
    "tta,vorbis,wavpack,wmalossless,wmapro,wmav1,wmav2,wmavoice"
)
"""FFmpeg's decoders that are allowed to run. None of them decodes pictures, because decoding
the first picture takes 20 of the 22 ms in which a video with 720 lines is opened."""
GAP_SECONDS = 0.06
"""A longer gap between the time stamps of two frames is filled with silence. Rounding and inexact
clocks cause shorter gaps."""
MAX_DEMUX_ERRORS = 100
"""Reading stops after this many errors in the container of a file."""
EXACT_LENGTH = ("mp4", "aiff", "au", "caf", "flac", "flv", "tta", "wv", "matroska")
"""Formats whose header declares the exact length; FFmpeg estimates the length of other formats."""
ESTIMATED_CODECS = ("adpcm", "gsm")
"""Codecs whose length is inexact even in the formats of EXACT_LENGTH, because the header counts
packets."""
PAUSES = "mp4"
"""The format that stores time stamps separately from the sound. In this format, a gap means that
the recorder paused. In other formats, a gap means that packets are missing."""
FROM_ZERO = ("mp4", "matroska")
"""Formats in which a clip begins at time stamp 0, even if its sound begins later. In other formats,
a clip begins at the first time stamp of any stream."""
UNTIMED = ("aac", "ac3", "eac3", "mp3")
"""Formats without time stamps. A damaged packet may hold many frames, so its length is estimated
from its size."""
CHECKED = ("ape", "flac", "tta", "wavpack")
"""Lossless codecs with checksums. By default, FFmpeg also returns frames with a wrong checksum. It
is therefore told to return no damaged frames of these codecs."""
AMR_ZEROS = 0b10000011
"""Bits that are 0 in the first byte of every packet of AMR (RFC 4867, 5.3)."""
ENCODER_SAMPLES = 2304
"""Largest number of samples that an encoder adds at the ends of an mp3; decoders remove them."""
OGG_PAGE_BYTES = 65_307
"""Size of the largest page of an ogg. The last packet is in the last page."""


class UnsupportedError(Exception):
    """FFmpeg cannot read a file; the message gives the reason."""

    def __init__(self, reason: str = "damaged, or not a supported audio or video format") -> None:
        super().__init__(reason)


def decode_with_ffmpeg(
    source: str | BinaryIO, max_seconds: float, *, ignore_length: bool, num_frames: int
) -> Decoded:
    """Decode an audio stream with PyAV and skip the packets of all other streams.

    As in players, the default stream is decoded, or else the first one. If all samples of a stream
    are 0, the next stream is decoded instead.

    Args:
        source: path or seekable stream.
        max_seconds: longer clips are `too_long`.
        ignore_length: read a wav to the end of the file, and ignore the length in its header.
        num_frames: number of frames that the header of an mp3 declares; 0 if it declares none.

    Raises:
        UnsupportedError: FFmpeg cannot read the file, or its format or codec is not allowed.
        ClipError: `no_audio`, `too_long` or `unreadable`.
    """
    options = {"format_whitelist": FORMATS, "codec_whitelist": CODECS}
    if ignore_length:
        options["ignore_length"] = "1"
    number, last = 0, 0
    while True:
        try:
            with av.open(source, "r", options=options, metadata_errors="ignore") as clip:
                streams = _audio_streams(clip)
                stream, last = streams[number], len(streams) - 1
                for other in clip.streams:
                    if other is not stream:
                        other.discard = av.stream.Discard.all
                sound = _decode_packets(clip, stream, source, max_seconds, num_frames)
        except av.error.FFmpegError as error:
            raise UnsupportedError from error
        if number == last or sound.samples.any():
            return sound
        number += 1
        if not isinstance(source, str):
            source.seek(0)


def _audio_streams(clip: av.container.InputContainer) -> list[av.AudioStream]:
    """Return the audio streams that can be decoded, the default one first."""
    if not clip.streams.audio:
        raise ClipError("no_audio", "it has no audio stream")
    streams = [stream for stream in clip.streams.audio if stream.codec_context is not None]
    if not streams:
        raise UnsupportedError("its audio codec is not supported")
    default = av.stream.Disposition.default
    return sorted(streams, key=lambda stream: not stream.disposition & default)


class _Timeline:
    """Collects the frames of a stream, with silence in place of missing frames."""

    def __init__(
        self, sample_rate: int, max_seconds: float, begin: float | None, *, has_pauses: bool
    ) -> None:
        self.sample_rate, self._max_seconds = sample_rate, max_seconds
        self._has_pauses = has_pauses
        self.num_samples = self.num_lost = 0
        self._begin = begin  # time stamp of sample 0
        self._blocks: list[np.ndarray] = []  # [channels, num_samples], equally many channels
        self._mixed: list[np.ndarray] = []  # [num_samples]
        self._num_mixed = 0

    @property
    def decoded_seconds(self) -> float:
        """Seconds of sound without the silence in place of lost sound."""
        return (self.num_samples - self.num_lost) / self.sample_rate

    def append(self, block: np.ndarray, timestamp: float | None) -> None:
        """Append samples `[channels, num_samples]`, with their time stamp in seconds if known."""
        if timestamp is not None:
            now = self.num_samples / self.sample_rate
            gap = 0.0 if self._begin is None else timestamp - self._begin - now
            if GAP_SECONDS < gap <= self._max_seconds - now:
                begins = self.num_samples == 0
                self.append_silence(gap, is_lost=not (begins or self._has_pauses))
            elif self._begin is None or abs(gap) > GAP_SECONDS:  # the time stamps start anew
                self._begin = timestamp - now
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
    source: str | BinaryIO,
    max_seconds: float,
    num_frames: int,
) -> Decoded:
    """Decode the packets of a stream, and count the sound that is lost."""
    name, codec = clip.format.name, stream.codec_context.name
    if not (stream.channels and stream.sample_rate):  # FFmpeg found no sound
        raise UnsupportedError
    require_shape(stream.channels, stream.sample_rate)
    start = None if clip.start_time is None else clip.start_time / av.time_base
    begin = 0.0 if any(known in name for known in FROM_ZERO) else start
    sound = _Timeline(stream.sample_rate, max_seconds, begin, has_pauses=PAUSES in name)
    checks = "crccheck+explode" if codec in CHECKED else "crccheck"
    stream.codec_context.options = {"err_detect": checks}  # without checks, damage is loud noise
    to_float = av.AudioResampler(format="fltp")
    num_packets, num_bytes, end, longest_gap, skipped = 0, 0, 1, 0, 0.0
    for packet in _packets(clip, stream):
        num_packets += packet.size > 0
        longest_gap = max(longest_gap, (packet.pos or 0) - end if num_bytes else 0)
        end = max(end, (packet.pos or 0) + packet.size)
        frames = _decode_packet(packet, codec)
        if frames is None:
            seconds = float((packet.duration or 0) * (packet.time_base or 0))
            if name not in UNTIMED:
                sound.append_silence(seconds, is_lost=True)
            else:
                skipped += max(seconds, packet.size * sound.decoded_seconds / max(num_bytes, 1))
            continue
        num_bytes += packet.size
        if frames and skipped:
            sound.append_silence(skipped, is_lost=True)
            skipped = 0.0
        for frame in frames:
            _append_frame(sound, frame, to_float)
    # A tag may follow the sound, so at most `GAP_SECONDS` of the skipped packets count as lost.
    sound.append_silence(min(skipped, GAP_SECONDS), is_lost=True)
    rate, decoded = sound.sample_rate, sound.decoded_seconds
    seconds, lost = sound.num_samples / rate, sound.num_lost / rate
    missing = _declared_seconds(clip, stream, num_frames) - seconds
    if MISSING_SECONDS < missing <= max_seconds - seconds:  # if longer, the header is wrong
        lost += missing
    is_fragmented = PAUSES in name and num_packets > stream.frames
    if is_fragmented or (name == "ogg" and len(clip.streams) == 1):
        # FFmpeg stops at a damaged fragment of an mp4, and where an ogg changes its sample rate.
        # The index of the fragments, or packets of other streams, may follow the last packet.
        allowed = _index_bytes(source) + 2 * longest_gap if is_fragmented else OGG_PAGE_BYTES
        if (unread := clip.size - end) > allowed:
            lost += decoded * unread / end
    return Decoded(sound.samples(), rate, lost, decoded)


def _index_bytes(source: str | BinaryIO) -> int:
    """Return the size of the index at the end of an mp4; 0 if there is none."""
    with Path(source).open("rb") if isinstance(source, str) else nullcontext(source) as file:
        file.seek(-16, io.SEEK_END)
        last = file.read()
    return int.from_bytes(last[12:]) if last[4:8] == b"mfro" else 0


def _decode_packet(packet: "av.Packet[av.AudioStream]", codec: str) -> list[av.AudioFrame] | None:
    """Return the frames in a packet; None if it is damaged."""
    if codec.startswith("amr") and packet.size and bytes(packet)[0] & AMR_ZEROS:
        return None
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return None


def _append_frame(sound: _Timeline, frame: av.AudioFrame, to_float: av.AudioResampler) -> None:
    if not sound.num_samples:
        sound.sample_rate = frame.sample_rate  # AAC's header may declare half the rate
    for block in to_float.resample(frame):
        samples = block.to_ndarray()
        if frame.sample_rate != sound.sample_rate:
            samples = soxr.resample(samples.T, frame.sample_rate, sound.sample_rate).T
        sound.append(samples, frame.time)


def _declared_seconds(
    clip: av.container.InputContainer, stream: av.AudioStream, num_frames: int
) -> float:
    """Return the exact length in seconds that the header declares; 0 or less if there is none."""
    name, codec = clip.format.name, stream.codec_context.name
    if name == "avi" or (name == "caf" and codec.startswith("pcm")):
        # FFmpeg computes `duration` from the file's size, not from the header.
        return float(stream.frames * (stream.time_base or 0))
    if name == "mp3":  # FFmpeg's duration is inexact if anything is attached
        per_frame = 1152 if stream.sample_rate >= 32_000 else 576
        return (num_frames * per_frame - ENCODER_SAMPLES) / stream.sample_rate
    if codec.startswith(ESTIMATED_CODECS) or not any(known in name for known in EXACT_LENGTH):
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (clip.duration or 0) / av.time_base if len(clip.streams) == 1 else 0.0


def _packets(
    clip: av.container.InputContainer, stream: av.AudioStream
) -> Iterator["av.Packet[av.AudioStream]"]:
    """Yield the packets of a stream, and continue after errors in the container."""
    for _ in range(MAX_DEMUX_ERRORS):
        try:
            yield from clip.demux(stream)
            return
        except av.error.InvalidDataError:
            continue
        except av.error.PatchWelcomeError:  # a joined ogg with another sample rate ends here
            return
