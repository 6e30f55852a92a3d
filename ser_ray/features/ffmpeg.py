"""Decodes videos and audio files with PyAV, which calls FFmpeg. `decode` uses this module for all
files except the wavs that soundfile can read to the end.

Only audio is decoded, and only the formats and codecs listed here are allowed.
"""

import itertools
import re
from collections.abc import Iterator
from typing import BinaryIO

import av
import av.container
import av.error
import av.stream
import numpy as np
import soxr

from ser_ray.features.errors import ClipError
from ser_ray.features.headers import (
    OGG_PAGE_BYTES,
    index_bytes,
    is_part_missing,
    last_timestamp_of_ogg,
    num_mp3_frames,
)
from ser_ray.features.samples import (
    MISSING_SECONDS,
    MIX_SECONDS,
    Decoded,
    is_possible,
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
"""FFmpeg's decoders that are allowed to run. With a video decoder, FFmpeg would decode the first
picture when it opens a file, which is 20 of the 22 ms that opening a 720p video would take."""
GAP_SECONDS = 0.06
"""A longer gap between the end of a frame and the time stamp of the next frame is filled with
silence. Rounding and inexact clocks cause shorter gaps."""
MAX_DEMUX_ERRORS = 100
"""Reading stops after this many errors in the container of a file."""
EXACT_LENGTH = ("mp4", "aiff", "au", "caf", "flac", "flv", "tta", "wv", "matroska")
"""Formats whose header declares the exact length. For most other formats, FFmpeg estimates it."""
ESTIMATED_CODECS = ("adpcm", "gsm")
"""Codecs whose length is inexact even in the formats of EXACT_LENGTH, because the header counts
packets, not samples."""
PAUSES = "mp4"
"""The format that stores time stamps separately from the sound. In this format, a gap in the time
stamps means that the recorder paused or left out packets, unless the number of a fragment is
missing. In other formats, a gap is lost sound if the file has unread bytes there, that is, bytes
between two packets of the stream, or if the number of a page of an ogg is missing."""
UNREAD_SHARE = 0.5
"""The unread bytes are converted to seconds by the file's average number of bytes per second. A gap
counts as lost sound if they make up more than this share of its length."""
FROM_ZERO = ("mp4", "matroska")
"""Formats in which a clip begins at time stamp 0, even if its sound begins later. In other formats,
a clip begins at the first time stamp of any stream."""
UNTIMED = ("aac", "ac3", "eac3", "mp3")
"""Formats without time stamps. A damaged packet may hold more frames than its duration says, so its
length is also estimated from its size."""
CHECKED = ("ape", "flac", "tta", "wavpack")
"""Lossless codecs with checksums. By default, FFmpeg returns frames even if the checksum is wrong.
The option `explode` makes this an error."""
AMR_ZEROS = 0b10000011
"""Bits that are 0 in the first byte of every packet of AMR (RFC 4867, 5.3)."""
ENCODER_SAMPLES = 2304
"""Largest number of samples that an encoder adds at the start and end of an mp3. Decoders remove
them."""
DURATION = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")
"""The length of a stream, in a tag that many programs write into Matroska files."""


class UnsupportedError(Exception):
    """FFmpeg cannot read a file; the message gives the reason."""

    def __init__(self, reason: str = "damaged, or not a supported audio or video format") -> None:
        super().__init__(reason)


def decode_with_ffmpeg(source: str | BinaryIO, max_seconds: float) -> Decoded:
    """Decode one audio stream with PyAV, and skip the packets of all other streams.

    As in players, this is the default stream, or else the first one. If all its samples are 0, the
    next audio stream is decoded instead.

    Args:
        source: path or seekable stream.
        max_seconds: longer clips are `too_long`.

    Raises:
        UnsupportedError: FFmpeg cannot read the file, or its format or codec is not allowed.
        ClipError: `no_audio`, `too_long` or `unreadable`.
    """
    options = {"format_whitelist": FORMATS, "codec_whitelist": CODECS}
    for number in itertools.count():
        try:
            with av.open(source, "r", options=options, metadata_errors="ignore") as clip:
                streams = _audio_streams(clip)
                stream, last = streams[number], len(streams) - 1
                for other in clip.streams:
                    if other is not stream:
                        other.discard = av.stream.Discard.all
                sound = _decode_packets(clip, stream, source, max_seconds)
        except av.error.FFmpegError as error:
            raise UnsupportedError from error
        if number == last or sound.samples.any():
            break
        if not isinstance(source, str):
            source.seek(0)
    return sound


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

    def __init__(self, sample_rate: int, max_seconds: float, begin: float | None) -> None:
        self.sample_rate, self.max_seconds = sample_rate, max_seconds
        self.num_samples = self.num_lost = self.num_paused = 0
        self.unread_seconds = 0.0
        """The most unread bytes between two packets since the last gap, as seconds of sound."""
        self.begin = begin  # time stamp of sample 0
        self._blocks: list[np.ndarray] = []  # [channels, num_samples], equal channels
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
            gap = 0.0 if self.begin is None else timestamp - self.begin - now
            if GAP_SECONDS < gap <= self.max_seconds - now:
                is_within = self.num_samples > 0
                is_lost = is_within and self.unread_seconds > UNREAD_SHARE * gap
                self.num_paused += round(gap * self.sample_rate) * (is_within and not is_lost)
                self.append_silence(gap, is_lost=is_lost)
                self.unread_seconds = 0.0
            elif self.begin is None or abs(gap) > GAP_SECONDS:  # first frame, or time stamps jump
                self.begin = timestamp - now
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
        require_length(self.num_samples / self.sample_rate, self.max_seconds)
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


class _Coverage:
    """Which bytes of the file the packets of a stream cover."""

    def __init__(self) -> None:
        self.num_packets = self.longest_gap = 0
        self.end = 1
        """Number of bytes up to the end of the last packet. It is a divisor, so it starts at 1."""

    def add(self, packet: "av.Packet[av.AudioStream]") -> int:
        """Add the next packet, and return how many bytes lie between it and the previous one."""
        start = packet.pos or 0
        gap = max(start - self.end, 0) if self.num_packets else 0
        self.longest_gap = max(self.longest_gap, gap)
        # In an ogg, all packets of a page have the position of the page.
        self.end = max(self.end, start) + packet.size
        self.num_packets += packet.size > 0
        return gap


def _decode_packets(
    clip: av.container.InputContainer,
    stream: av.AudioStream,
    source: str | BinaryIO,
    max_seconds: float,
) -> Decoded:
    """Decode the packets of a stream, and count the sound that is lost."""
    name, codec = clip.format.name, stream.codec_context.name
    if not (stream.channels and stream.sample_rate):  # FFmpeg found no sound
        raise UnsupportedError
    require_shape(stream.channels, stream.sample_rate)
    start = None if clip.start_time is None else clip.start_time / av.time_base
    begin = 0.0 if any(known in name for known in FROM_ZERO) else start
    sound = _Timeline(stream.sample_rate, max_seconds, begin)
    checks = "crccheck+explode" if codec in CHECKED else "crccheck"
    stream.codec_context.options = {"err_detect": checks}  # otherwise, damage is loud noise
    to_float = av.AudioResampler(format="fltp")
    covered, num_bytes, skipped = _Coverage(), 0, 0.0
    for packet in _packets(clip, stream):
        num_read, unread = covered.end, covered.add(packet)
        if packet.is_corrupt:  # in MPEG transport streams: packets before it are missing
            unread = clip.size
        if PAUSES not in name:
            seconds = unread * sound.decoded_seconds / num_read
            sound.unread_seconds = max(sound.unread_seconds, seconds)
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
            _append_frame(sound, frame, to_float, is_pcm=codec.startswith("pcm"))
    # The last damaged packets may be a tag after the sound, so at most GAP_SECONDS count as lost.
    sound.append_silence(min(skipped, GAP_SECONDS), is_lost=True)
    if sound.num_paused and (name == "ogg" or PAUSES in name) and is_part_missing(source):
        sound.num_lost += sound.num_paused
    lost = sound.num_lost / sound.sample_rate
    lost += _lost_end_seconds(clip, stream, source, sound, covered)
    return Decoded(sound.samples(), sound.sample_rate, lost, sound.decoded_seconds)


def _lost_end_seconds(
    clip: av.container.InputContainer,
    stream: av.AudioStream,
    source: str | BinaryIO,
    sound: _Timeline,
    covered: _Coverage,
) -> float:
    """Return how many seconds are missing after the last frame.

    The length is the one that the header declares, or the time stamp of the last page of an ogg.
    """
    seconds, lost = sound.num_samples / sound.sample_rate, 0.0
    declared, last = _declared_seconds(clip, stream, source), None
    is_single_ogg = clip.format.name == "ogg" and len(clip.streams) == 1
    if is_single_ogg and (last := last_timestamp_of_ogg(source)) is not None:
        declared = float(last * (stream.time_base or 0)) - (sound.begin or 0.0)
    missing = declared - seconds
    if MISSING_SECONDS < missing <= sound.max_seconds - seconds:  # if longer, the header is wrong
        lost = missing
    is_fragmented = PAUSES in clip.format.name and covered.num_packets > stream.frames
    if is_fragmented or (is_single_ogg and last is None):
        # FFmpeg stops at a damaged fragment of an mp4, and where the sample rate of a chained ogg
        # changes. The rest of the file is then lost, except for the index of the fragments, and for
        # packets of other streams, which may be as long as the gaps between earlier packets.
        allowed = OGG_PAGE_BYTES
        if is_fragmented:
            allowed = index_bytes(source) + 2 * covered.longest_gap
        if (unread := clip.size - covered.end) > allowed:
            lost += sound.decoded_seconds * unread / covered.end
    return lost


def _decode_packet(packet: "av.Packet[av.AudioStream]", codec: str) -> list[av.AudioFrame] | None:
    """Return the frames in a packet; None if it is damaged."""
    if codec.startswith("amr") and packet.size and bytes(packet)[0] & AMR_ZEROS:
        return None
    try:
        return packet.decode()
    except av.error.FFmpegError:
        return None


def _append_frame(
    sound: _Timeline, frame: av.AudioFrame, to_float: av.AudioResampler, *, is_pcm: bool
) -> None:
    """Append a frame, or silence if damage made its samples impossible.

    PCM samples may have another scale. They are left to `silence_impossible`, which sees the whole
    clip.
    """
    if not sound.num_samples:
        sound.sample_rate = frame.sample_rate  # AAC's header may declare half the rate
    for block in to_float.resample(frame):
        samples = block.to_ndarray()
        if is_damaged := not (is_pcm or is_possible(samples)):
            samples = np.zeros_like(samples)
        if frame.sample_rate != sound.sample_rate:
            samples = soxr.resample(samples.T, frame.sample_rate, sound.sample_rate).T
        sound.append(samples, frame.time)
        sound.num_lost += samples.shape[1] * is_damaged


def _declared_seconds(
    clip: av.container.InputContainer, stream: av.AudioStream, source: str | BinaryIO
) -> float:
    """Return the exact length in seconds that the header declares; 0 or less if there is none."""
    name, codec = clip.format.name, stream.codec_context.name
    if name == "avi" or (name == "caf" and codec.startswith("pcm")):
        # FFmpeg computes `duration` from the file's size, not from the header.
        return float(stream.frames * (stream.time_base or 0))
    if name == "mp3":  # FFmpeg's duration is inexact if data follows the sound
        per_frame = 1152 if stream.sample_rate >= 32_000 else 576
        return (num_mp3_frames(source) * per_frame - ENCODER_SAMPLES) / stream.sample_rate
    if codec.startswith(ESTIMATED_CODECS) or not any(known in name for known in EXACT_LENGTH):
        return 0.0
    if length := DURATION.fullmatch(stream.metadata.get("DURATION", "")):  # Matroska
        hours, minutes, seconds = map(float, length.groups())
        return 3600 * hours + 60 * minutes + seconds
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
        except av.error.PatchWelcomeError:  # the sample rate of a chained ogg changes
            return
