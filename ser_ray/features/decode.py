"""Decodes clips: the bytes of a file become mono samples.

The format of a file follows from its first bytes after any ID3 tag, not from its name. soundfile
reads wavs whose header declares a valid length, and the samples of a 16-bit mono wav stay
unchanged. PyAV reads all other files, and decodes only the audio of videos. If one library cannot
read a file, the other is tried. Files that are too long are refused before or while their samples
are read. Playlists are refused, because they can name other files. Every failure except a lack of
memory is a `ClipError` that says why.

One rule holds for damage in all formats: sound that can be decoded is used, lost sound is counted
in seconds (`Sound.lost_seconds`), and a clip that lost more than half of its sound is refused. If
sound is lost within a clip and its length is known, silence replaces it, so the later sound has the
right times.
"""

import io
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import soundfile
from pyarrow import fs

from ser_ray.errors import ConfigError
from ser_ray.features.errors import ClipError, Failure
from ser_ray.features.ffmpeg import UnsupportedError, decode_with_ffmpeg
from ser_ray.features.samples import (
    MISSING_SECONDS,
    MIX_SECONDS,
    Decoded,
    Sound,
    require_length,
    require_shape,
    silence_impossible,
    to_full_scale,
    to_mono,
)
from ser_ray.storage.listing import stat_file
from ser_ray.storage.packed import ROW, read_packed
from ser_ray.storage.paths import NOT_UTF8, NULL_CHARACTER, as_utf8, filesystem_of

MAX_RECORDING_SECONDS = 3600.0
"""By default, longer files are refused, because they may not fit into a worker's memory."""
UNKNOWN_LENGTH = 0x7FFFF000
"""Programs that write a wav to a pipe declare a length of 0 bytes, or of this many or more."""
W64 = "<4s12xQ"
CHUNKS = {b"RIFF": "<4sI", b"RF64": "<4sI", b"RIFX": ">4sI", b"riff": W64}
"""`struct` format of a chunk's header, its name and size, by the first bytes of a wav. In W64, the
size includes the header."""
VOC = b"Creative Voice File"
PRINTABLE = frozenset(range(32, 127))
"""Bytes that the name of a chunk may contain."""
TAGS = (b"TAG", b"APET", b"ID3")
"""First bytes of the tags that some programs attach to the end of any file."""
MAX_CHUNKS = 100
"""At most this many chunks of a wav are searched for samples. Real files have fewer than ten."""
ASF, ASF_PROPERTIES = b"\x30\x26\xb2\x75", b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11"
EBML, EBML_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""First bytes of ASF and Matroska files, and of the part of each that declares the file's size."""
MAX_JOINED_BYTES = 1 << 28
"""Samples in several chunks are joined in memory if they have at most this many bytes."""
FRAME_COUNTS = {b"Xing": 8, b"Info": 8, b"VBRI": 14}
"""Tables that the first frame of an mp3 may have: {name: position of the number of frames}."""
HEAD_BYTES = 4096
"""This many bytes of an mp3, ASF or Matroska file are searched for its declared length."""
SMALL_FILE = 1 << 21
"""A file in a bucket with up to this many bytes (20 s of 16-bit mono at 48 kHz) is fetched with one
request."""
READ_AHEAD = 1 << 18
"""Number of bytes per request for larger files. It is small, because the first request may already
show that a video has no sound."""


def decode(file: str | BinaryIO, *, max_seconds: float = MAX_RECORDING_SECONDS) -> Sound:
    """Decode a clip.

    Args:
        file: a path or URI, or a seekable binary stream.
        max_seconds: longer clips are `too_long`.

    Returns:
        One channel (`to_mono`): float32 with full scale ±1, or int16 if soundfile reads 16-bit mono
        samples, which then stay unchanged.

    Raises:
        ClipError: `no_audio`, `too_long` or `unreadable`, with the reason.
    """
    try:
        if isinstance(file, str):
            return _decode_location(file, max_seconds)
        return _decode_stream(file, max_seconds)
    except (ClipError, MemoryError):
        raise
    except ConfigError as error:  # no filesystem opens the URI, or it has a password
        raise ClipError("unreadable", str(error), failed="storage") from error
    except FileNotFoundError as error:
        # If the folder is missing too, a disk may not be mounted. Otherwise the clip was deleted.
        is_local = isinstance(file, str) and "://" not in file
        if is_local and not Path(str(file)).expanduser().parent.exists():
            raise ClipError("unreadable", "its folder does not exist", failed="storage") from error
        raise ClipError("unreadable", "the file does not exist", failed="file") from error
    except OSError as error:
        failed: Failure = "storage" if isinstance(file, str) and "://" in file else "file"
        reason = f"reading failed: {error.strerror or error}"
        raise ClipError("unreadable", reason, failed=failed) from error
    except Exception as error:  # libraries raise errors of any kind for damaged files
        reason = f"its content is damaged in a way that stops the decoder ({type(error).__name__})"
        raise ClipError("unreadable", reason) from error


def _decode_location(location: str, max_seconds: float) -> Sound:
    """Decode the file at a path or URI."""
    if as_utf8(location) != location:
        raise ClipError("unreadable", NOT_UTF8, failed="file")
    if "\0" in location:
        raise ClipError("unreadable", NULL_CHARACTER, failed="file")
    if ROW in location:
        return _decode_stream(io.BytesIO(read_packed(location)), max_seconds)
    filesystem, path = filesystem_of(location)
    if isinstance(filesystem, fs.LocalFileSystem):
        status, problem = stat_file(path)
        if status is not None and problem:  # opening a pipe would wait for its writer
            raise ClipError("unreadable", problem, failed="file")
        with Path(path).open("rb") as local:
            return _decode(path, local, max_seconds)  # libraries are fastest with a path
    with filesystem.open_input_file(path) as remote:
        is_small = remote.size() <= SMALL_FILE
        return _decode_stream(io.BytesIO(remote.read()) if is_small else remote, max_seconds)


def _decode_stream(stream: BinaryIO, max_seconds: float) -> Sound:
    buffered = io.BufferedReader(cast(io.RawIOBase, stream), READ_AHEAD)
    try:
        return _decode(buffered, buffered, max_seconds)
    finally:
        buffered.detach()  # otherwise, deleting `buffered` would close the stream


def _decode(source: str | BinaryIO, file: BinaryIO, max_seconds: float) -> Sound:
    """Decode `source`, a path or stream; `file` is a stream of the same bytes."""
    if tag_bytes := _tag_bytes(file):
        source = file = io.BufferedReader(_AfterTag(file, tag_bytes), READ_AHEAD)
    file.seek(0)
    start = file.read(12)
    if not start:
        raise ClipError("unreadable", "the file is empty")
    found, missing_share, has_length = None, 0.0, True
    layout = CHUNKS.get(start[:4]) if start[8:] == b"WAVE" or start[:4] == b"riff" else None
    if layout:
        joined, missing_share, has_length = _sample_chunks(file, layout)
        if joined:
            source = file = joined
        file.seek(0)
        if has_length:
            found = _decode_with_soundfile(source, max_seconds)
    elif start[:4] in (ASF, EBML, VOC[:4]):
        missing_share = _missing_share(file)
    if found is None or found.lost_seconds:  # FFmpeg may find sound after the damage
        found = _decode_with_either(source, file, max_seconds, has_length=has_length)
    return _checked(silence_impossible(found), missing_share)


def _checked(found: Decoded, missing_share: float) -> Sound:
    """Return the sound of a clip with its loss.

    Raises:
        ClipError: the clip has no samples, lost more than half of them, or has impossible samples.
    """
    samples, sample_rate, lost, decoded = found
    if (missing := decoded * missing_share) > MISSING_SECONDS:
        lost = max(lost, missing)
    if samples.size == 0 and not lost:
        raise ClipError("unreadable", "it has no samples")
    if decoded < lost:
        raise ClipError(
            "unreadable",
            f"only {decoded:.2f} s of its {decoded + lost:.2f} s can be decoded: the file is "
            "damaged or incomplete",
        )
    return Sound(to_full_scale(samples), sample_rate, lost)


def _decode_with_either(
    source: str | BinaryIO, file: BinaryIO, max_seconds: float, *, has_length: bool
) -> Decoded:
    """Decode with FFmpeg, or with soundfile if FFmpeg cannot read the file."""
    num_frames = _num_frames(file)
    file.seek(0)
    try:
        return decode_with_ffmpeg(
            source, max_seconds, ignore_length=not has_length, num_frames=num_frames
        )
    except UnsupportedError as error:
        file.seek(0)
        if (found := _decode_with_soundfile(source, max_seconds)) is None:
            raise ClipError("unreadable", str(error)) from error
        return found


def _num_frames(file: BinaryIO) -> int:
    """Return the number of frames that the header of an mp3 declares; 0 if it declares none."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    for name, place in FRAME_COUNTS.items():
        if (first := head.find(name)) >= 0:
            flags = int.from_bytes(head[first + 4 : first + 8])
            if name == b"VBRI" or flags & 1:  # otherwise the table has no number of frames
                return int.from_bytes(head[first + place : first + place + 4])
    return 0


def _tag_bytes(file: BinaryIO) -> int:
    """Return the size of the ID3 tag before the sound; 0 if there is no complete tag."""
    head = file.read(10)
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    # The size has 7 bits in each byte. A flag declares another 10 bytes at the end of the tag.
    size = sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    size += 20 if head[5] & 0x10 else 10
    return size if size < file.seek(0, io.SEEK_END) else 0


class _AfterTag(io.RawIOBase):
    """A view of a file without its tag, because libraries recognise most formats by the first
    bytes."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file, self._start = file, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            offset += self._start
        return self._file.seek(offset, whence) - self._start

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Chunk(NamedTuple):
    """A chunk of a wav that holds samples."""

    start: int
    """Position of the first byte of samples."""
    declared: int
    """Number of bytes that the header declares. If it declares UNKNOWN_LENGTH or more, this is the
    number in the chunk `ds64` or, if greater, the number of bytes up to the end of the file."""
    held: int
    """Number of these bytes that are in the file."""


def _sample_chunks(wav: BinaryIO, layout: str) -> tuple[BinaryIO | None, float, bool]:
    """Find the samples of a wav.

    soundfile does not report missing bytes, so they are counted here. A length of UNKNOWN_LENGTH
    or more means "until the end of the file", and counts as valid. If a recorder was interrupted,
    the length may be invalid: 0, or a length after which no chunk begins.

    Returns:
        joined: a copy of the wav with its samples in one chunk. It is None if the wav has only one
            chunk of samples, the copy would be too large, or the format is W64.
        missing_share: number of declared sample bytes that cannot be read, divided by the number
            that can. Without a copy, libraries read only the first chunk.
        has_length: whether the declared length is valid.
    """
    chunks, has_length = _find_chunks(wav, layout)
    declared = sum(chunk.declared for chunk in chunks)
    held = chunks[0].held if chunks else 0
    joined = None
    if len(chunks) > 1 and layout != W64 and declared <= MAX_JOINED_BYTES:
        joined = _joined(wav, layout, chunks)
        held = sum(chunk.held for chunk in chunks)
    missing_share = declared / held - 1 if held and has_length else 0.0
    return joined, missing_share, has_length


def _find_chunks(wav: BinaryIO, layout: str) -> tuple[list[_Chunk], bool]:
    """Return the chunks that hold samples, and whether their declared length is valid."""
    end, long_size, is_after = wav.seek(0, io.SEEK_END), 0, False
    header_in_size, alignment, place = (24, 8, 40) if layout == W64 else (0, 2, 12)
    length = struct.calcsize(layout)
    found: list[_Chunk] = []
    for _ in range(MAX_CHUNKS):
        wav.seek(place)
        if len(header := wav.read(length)) < length:
            break
        name, size = struct.unpack(layout, header)
        start, size = place + length, max(size - header_in_size, 0)
        if name == b"data":
            held = end - start
            size = max(long_size, held) if size >= UNKNOWN_LENGTH else size
            found.append(_Chunk(start, size, min(size, held)))
            if held and not size:
                return found, False
        elif found and header.startswith(TAGS):
            return found, True
        elif found and not (PRINTABLE.issuperset(name) and start + size <= end):
            return found, is_after  # valid if a chunk followed the samples
        elif name == b"ds64":  # of RF64: the sizes of the file and of the samples
            long_size = int.from_bytes(wav.read(16)[8:], "little")
        is_after = bool(found) and name != b"data"
        place = min(start + size + -size % alignment, end)
    return found, True


def _joined(wav: BinaryIO, layout: str, chunks: list[_Chunk]) -> BinaryIO:
    """Copy a wav with its samples in one chunk, because libraries read only the first chunk."""
    wav.seek(0)
    head = wav.read(chunks[0].start - 4)
    samples = []
    for chunk in chunks:
        wav.seek(chunk.start)
        samples.append(wav.read(chunk.held))
    size = struct.pack(f"{layout[0]}I", sum(map(len, samples)))
    return io.BytesIO(b"".join([head, size, *samples]))


def _missing_share(file: BinaryIO) -> float:
    """Return the ratio of missing to present bytes of a Matroska, ASF or VOC file.

    The result is 0 if the file declares no size, and negative if data is attached to its end. Sizes
    are compared because the declared length in seconds is that of the longest stream, and FFmpeg
    replaces it if bytes are missing.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head, declared = file.read(HEAD_BYTES), 0
    if head.startswith(VOC):
        declared = _end_of_blocks(file, int.from_bytes(head[20:22], "little"))
    if head.startswith(ASF) and (place := head.find(ASF_PROPERTIES)) > 0:
        declared = int.from_bytes(head[place + 40 : place + 48], "little")
    if head.startswith(EBML) and 4 < (place := head.find(EBML_SEGMENT) + 4) < len(head):
        # The position of the first 1 bit of the size is the number of bytes that the size has.
        length = 9 - head[place].bit_length()
        unknown = (1 << 7 * length) - 1  # as in a live recording
        segment = int.from_bytes(head[place : place + length]) & unknown
        declared = place + length + segment if segment != unknown else 0
    return declared / size - 1 if declared else 0.0


def _end_of_blocks(voc: BinaryIO, place: int) -> int:
    """Return where the last block of a VOC file ends, by the sizes that its blocks declare."""
    while True:
        voc.seek(place)
        block = voc.read(4)
        if len(block) < 4 or block[0] not in range(1, 10):  # a block of type 0 is the end
            return place
        place += 4 + int.from_bytes(block[1:], "little")


def _decode_with_soundfile(source: str | BinaryIO, max_seconds: float) -> Decoded | None:
    """Decode with soundfile; return None for a file that it cannot read."""
    try:
        with soundfile.SoundFile(source) as sound:
            if sound.format == "RAW":  # libsndfile chose it by the file's name only
                return None
            seconds = sound.frames / sound.samplerate
            require_shape(sound.channels, sound.samplerate)
            require_length(seconds, max_seconds)
            if sound.channels == 1 and sound.subtype == "PCM_16":
                samples = sound.read(sound.frames, dtype="int16")
            else:
                size = round(MIX_SECONDS * sound.samplerate)
                pieces = [np.empty(0, np.float32)]
                while len(piece := sound.read(size, dtype="float32", always_2d=True)):
                    pieces.append(to_mono(piece.T))
                samples = np.concatenate(pieces)
            decoded = len(samples) / sound.samplerate
            return Decoded(samples, sound.samplerate, max(seconds - decoded, 0.0), decoded)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: the file is named .raw
        return None
