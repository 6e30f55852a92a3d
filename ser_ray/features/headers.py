"""Reads what the headers in a file declare, and repairs headers that libraries misread.

`decode` and `ffmpeg` use this module to find sound that libraries would skip, and to count sound
that is missing. No sound is decoded here.
"""

import io
import re
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

Part = bytes | range
"""Some bytes, or a range of bytes in a file."""

UNKNOWN_LENGTH = 0x7FFFF000
"""Programs that write a wav to a pipe declare a length of 0 bytes, or of this many or more."""


class _Form(NamedTuple):
    """How a wav or AIFF stores its chunks."""

    header: str
    """`struct` format of a chunk's header: its name and size."""
    begin: int = 12
    """Position of the first chunk."""
    alignment: int = 2
    """The position of every chunk is a multiple of this number."""
    extra: int = 0
    """Number of bytes that the size of a chunk has in addition to its content."""


FORMS = {
    b"RIFF": _Form("<4sI"),
    b"RF64": _Form("<4sI"),
    b"RIFX": _Form(">4sI"),
    b"FORM": _Form(">4sI"),
    b"riff": _Form("<4s12xQ", begin=40, alignment=8, extra=24),
}
"""The forms of wavs and AIFFs, by their first bytes. The last one is W64."""
SAMPLES = (b"data", b"SSND")
"""Names of the chunk with the samples of a wav and of an AIFF."""
SSND_HEADER = 8
"""Number of bytes in the chunk of an AIFF before the samples."""
PRINTABLE = frozenset(range(32, 127))
"""Bytes that the name of a chunk may contain."""
TAGS = (b"TAG", b"APET", b"ID3")
"""First bytes of the tags that some programs attach to the end of any file."""
LARGEST_SIZE = 1 << 62
"""Larger sizes are invalid, and read as this one, because `len` of a range is limited."""
MAX_CHUNKS = 100
"""At most this many chunks are searched for samples. Real files have fewer than ten."""
VOC = b"Creative Voice File"
ASF, ASF_PROPERTIES = b"\x30\x26\xb2\x75", b"\xa1\xdc\xab\x8c\x47\xa9\xcf\x11"
EBML, EBML_SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
"""First bytes of ASF and Matroska files, and of the part of each that declares the file's size."""
FRAME_COUNTS = {b"Xing": 8, b"Info": 8, b"VBRI": 14}
"""Tables that the first frame of an mp3 may have: {name: position of the number of frames}."""
READ_AHEAD = 1 << 18
"""Number of bytes that are read at once from a large file. It is small, because the first bytes may
already show that a video has no sound."""
HEAD_BYTES = 4096
"""This many bytes at the beginning of a file are searched for its declared length, and for a wav
that begins after other bytes."""
BEFORE_WAV = re.compile(rb"[^\x01-\x08\x0e-\x1f]*?(?=(?:RIFF|RIFX|RF64).{4}WAVE)", re.DOTALL)
"""Matches zeros and text before a wav, such as the header of an HTTP response. It contains no other
control characters, because FLAC and WavPack files have them before the header of a wav that they
may contain."""
OGG_PAGE_BYTES = 65_307
"""Size of the largest page of an ogg. The last packet is in the last page."""
OGG_HEADER = struct.Struct("<6xq4sI4xB")
"""Time stamp, stream, number and number of segments in the header of an ogg page."""


class _View(io.RawIOBase):
    """A file that consists of parts of another file, and of other bytes."""

    def __init__(self, file: BinaryIO, parts: list[Part]) -> None:
        self._file, self._parts, self._place = file, parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        ends = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: sum(map(len, self._parts))}
        self._place = ends[whence] + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        inside = self._place
        for part in self._parts:
            if inside < len(part):
                data = part[inside : inside + len(buffer)]
                if isinstance(data, range):
                    self._file.seek(data.start)
                    data = self._file.read(len(data))
                buffer[: len(data)] = data
                self._place += len(data)
                return len(data)
            inside -= len(part)
        return 0


def repaired(file: BinaryIO) -> tuple[BinaryIO, float]:
    """Repair the header of a file, and compare the length that it declares with the real one.

    Returns:
        file: the file, or a view of it that libraries can read to the end of the sound.
        missing_share: number of declared bytes that are missing, divided by the number that are
            there. It is 0 if the file declares no length, and negative if data is attached to its
            end.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    head, parts = file.read(HEAD_BYTES), list[Part]()
    if num_before := _num_bytes_before(head, size):
        file, size = _view(file, [range(num_before, size)]), size - num_before
        head = file.read(HEAD_BYTES)
    form = FORMS.get(head[:4])
    if form and (head[8:12] in (b"WAVE", b"AIFF", b"AIFC") or form.extra):
        parts, missing_share = _repair_chunks(file, form, size)
    else:
        declared = _declared_bytes(head, file)
        missing_share = declared / size - 1 if declared else 0.0
        if head.startswith(b".snd") and not any(head[8:12]):  # AU from an interrupted recorder
            parts = [head[:8] + b"\xff" * 4, range(12, size)]
    return _view(file, parts) if parts else file, missing_share


def _view(file: BinaryIO, parts: list[Part]) -> BinaryIO:
    return io.BufferedReader(_View(file, parts), READ_AHEAD)


def _num_bytes_before(head: bytes, size: int) -> int:
    """Return how many bytes are before the sound: an ID3 tag, or zeros or text before a wav."""
    if found := BEFORE_WAV.match(head):
        return found.end()
    if len(head) < 10 or head[:3] != b"ID3":
        return 0
    # The size has 7 bits in each byte. A flag declares another 10 bytes at the end of the tag.
    num_bytes = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
    num_bytes += 20 if head[5] & 0x10 else 10
    return num_bytes if num_bytes < size else 0


def _repair_chunks(file: BinaryIO, form: _Form, end: int) -> tuple[list[Part], float]:
    """Find the chunks of a wav or AIFF.

    Libraries read only the first chunk with samples, and do not report missing bytes. A recorder
    that was interrupted leaves a wrong length in the header: 0, or in a wav a length after which no
    chunk begins. All bytes up to the end of the file are then samples.

    Returns:
        parts: the parts of a repaired file (`_View`); empty if the file needs no repair.
        missing_share: as `repaired` returns it.
    """
    before: list[Part] = [range(form.begin)]
    samples: list[range] = []
    order, code = form.header[0], form.header[-1]  # of the size
    size_bytes, is_valid, previous = struct.calcsize(code), True, b""
    for header, name, content in _find_chunks(file, form, end):
        if samples and header.startswith(TAGS):
            break
        if name in SAMPLES:
            if not samples:
                before.append(header[:-size_bytes])
            samples.append(content)
        elif not samples:
            padding = bytes(-len(content) % form.alignment)
            before += [range(content.start - len(header), content.stop), padding]
        elif not _is_plausible(name, content, end):
            is_empty = previous == b"SSND" and len(samples[-1]) <= SSND_HEADER
            if previous == b"data" or is_empty:
                samples[-1], is_valid = range(samples[-1].start, end), False
            break
        previous = name
    held = [range(content.start, min(content.stop, end)) for content in samples]
    num_declared, num_held = (sum(map(len, ranges)) for ranges in (samples, held))
    missing_share = num_declared / num_held - 1 if num_held else 0.0
    is_padded = samples and sum(map(len, before)) + size_bytes == samples[0].start
    if not num_held or (is_valid and is_padded and len(samples) == 1):
        return [], missing_share
    size = struct.pack(order + code, min(num_held + form.extra, 256**size_bytes - 1))
    return [*before, size, *held], missing_share


def _find_chunks(file: BinaryIO, form: _Form, end: int) -> Iterator[tuple[bytes, bytes, range]]:
    """Yield the header, name and content of the chunks of a file with `end` bytes.

    A length of UNKNOWN_LENGTH or more means "until the end of the file". Some programs omit the
    byte that must follow a chunk of odd size.
    """
    place, long_size = form.begin, 0
    for _ in range(MAX_CHUNKS):
        header, name, content = _chunk_at(file, form, place)
        if not header:
            return
        if name == b"ds64":  # of RF64: the sizes of the file and of the samples
            long_size = min(int.from_bytes(file.read(16)[8:], "little"), LARGEST_SIZE)
        if name in SAMPLES and len(content) >= UNKNOWN_LENGTH:
            content = range(content.start, max(content.start + long_size, end))
        yield header, name, content
        place = content.stop
        if not _is_plausible(*_chunk_at(file, form, place)[1:], end):
            place += -len(content) % form.alignment


def _chunk_at(file: BinaryIO, form: _Form, place: int) -> tuple[bytes, bytes, range]:
    """Return the header, the name and the content of the chunk at a place; empty after the end."""
    file.seek(place)
    length = struct.calcsize(form.header)
    if len(header := file.read(length)) < length:
        return b"", b"", range(place, place)
    name, size = struct.unpack(form.header, header)
    size = min(max(size - form.extra, 0), LARGEST_SIZE)
    return header, name, range(place + length, place + length + size)


def _is_plausible(name: bytes, content: range, end: int) -> bool:
    return name in SAMPLES or (bool(name) and PRINTABLE.issuperset(name) and content.stop <= end)


def _declared_bytes(head: bytes, file: BinaryIO) -> int:
    """Return the size that a Matroska, ASF or VOC file declares; 0 if it declares none.

    Sizes are compared because the declared length in seconds is that of the longest stream, and
    FFmpeg replaces it if bytes are missing.
    """
    if head.startswith(VOC):
        return _end_of_blocks(file, int.from_bytes(head[20:22], "little"))
    if head.startswith(ASF) and (place := head.find(ASF_PROPERTIES)) > 0:
        return int.from_bytes(head[place + 40 : place + 48], "little")
    if head.startswith(EBML) and 4 < (place := head.find(EBML_SEGMENT) + 4) < len(head):
        # The position of the first 1 bit of the size is the number of bytes that the size has.
        length = 9 - head[place].bit_length()
        unknown = (1 << 7 * length) - 1  # as in a live recording
        segment = int.from_bytes(head[place : place + length]) & unknown
        return place + length + segment if segment != unknown else 0
    return 0


def _end_of_blocks(voc: BinaryIO, place: int) -> int:
    """Return where the last block of a VOC file ends, by the sizes that its blocks declare."""
    while True:
        voc.seek(place)
        block = voc.read(4)
        if len(block) < 4 or block[0] not in range(1, 10):  # a block of type 0 is the end
            return place
        place += 4 + int.from_bytes(block[1:], "little")


def num_mp3_frames(source: str | BinaryIO) -> int:
    """Return the number of frames that the header of an mp3 declares; 0 if it declares none."""
    with _opened(source) as file:
        file.seek(0)
        head = file.read(HEAD_BYTES)
    for name, place in FRAME_COUNTS.items():
        if (first := head.find(name)) >= 0:
            flags = int.from_bytes(head[first + 4 : first + 8])
            if name == b"VBRI" or flags & 1:  # otherwise the table has no number of frames
                return int.from_bytes(head[first + place : first + place + 4])
    return 0


def index_bytes(source: str | BinaryIO) -> int:
    """Return the size of the index at the end of an mp4; 0 if there is none."""
    last = _read_end(source, 16)
    return int.from_bytes(last[12:]) if last[4:8] == b"mfro" else 0


def last_timestamp_of_ogg(source: str | BinaryIO) -> int | None:
    """Return the time stamp at the end of the last page, which may be incomplete (RFC 3533, 6).

    The result is None if the last page belongs to another stream, as in a chained ogg.
    """
    with _opened(source) as file:
        file.seek(0)
        first = OGG_HEADER.unpack(file.read(OGG_HEADER.size))
    tail = _read_end(source, 2 * OGG_PAGE_BYTES)
    place = len(tail)
    while (place := tail.rfind(b"OggS", 0, place)) >= 0:
        if place + OGG_HEADER.size > len(tail):
            continue
        timestamp, stream, *_ = OGG_HEADER.unpack_from(tail, place)
        if stream != first[1]:
            return None
        if timestamp >= 0:  # it is -1 if no packet ends in the page
            return int(timestamp)
    return None


def is_part_missing(source: str | BinaryIO) -> bool:
    """Return whether a number is missing among the pages of an ogg, or the fragments of an mp4."""
    place, last = 0, dict[bytes, int]()
    with _opened(source) as file:
        while True:
            file.seek(place)
            head = file.read(OGG_HEADER.size + 255)
            if head.startswith(b"OggS") and len(head) >= OGG_HEADER.size:
                _, stream, number, count = OGG_HEADER.unpack_from(head)
                size = OGG_HEADER.size + count + sum(head[OGG_HEADER.size :][:count])
            else:  # a box of an mp4
                stream, number = head[4:8] + head[12:16], int.from_bytes(head[20:24])
                size = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4])
            if head.startswith(b"OggS") or stream == b"moofmfhd":
                if number > last.get(stream, number) + 1:
                    return True
                last[stream] = number
            if size < 8:  # the end of the file, or damage
                return False
            place += size


def _read_end(source: str | BinaryIO, num_bytes: int) -> bytes:
    """Return the last bytes of a file."""
    with _opened(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(size - num_bytes, 0))
        return file.read()


def _opened(source: str | BinaryIO) -> AbstractContextManager[BinaryIO]:
    return Path(source).open("rb") if isinstance(source, str) else nullcontext(source)
