"""Decodes clips: the bytes of a file become mono samples.

The format of a file follows from its first bytes after any ID3 tag, not from its name. `headers`
repairs headers that libraries misread. soundfile reads wavs, and the samples of a 16-bit mono wav
stay unchanged. PyAV reads all other files, and decodes only the audio of videos. If one library
cannot read a file, the other is tried. Files that are too long are refused before or while their
samples are read. Playlists are refused, because they can name other files. Every failure except a
lack of memory is a `ClipError` that says why.

One rule holds for damage in all formats: sound that can be decoded is used, lost sound is counted
in seconds (`Sound.lost_seconds`), and a clip that lost more than half of its sound is refused. If
sound is lost within a clip and its length is known, silence replaces it, so the later sound has the
right times.
"""

import io
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import soundfile
from pyarrow import fs

from ser_ray.errors import ConfigError
from ser_ray.features.errors import ClipError, Failure
from ser_ray.features.ffmpeg import UnsupportedError, decode_with_ffmpeg
from ser_ray.features.headers import READ_AHEAD, repaired
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
SMALL_FILE = 1 << 21
"""A file in a bucket with up to this many bytes (20 s of 16-bit mono at 48 kHz) is fetched with one
request."""


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
    opened, missing_share = repaired(file)
    if opened is not file:
        source = file = opened
    file.seek(0)
    if not (start := file.read(12)):
        raise ClipError("unreadable", "the file is empty")
    file.seek(0)
    found = None
    if start[8:] == b"WAVE" or start[:4] == b"riff":
        found = _decode_with_soundfile(source, max_seconds)
    if found is None or found.lost_seconds:  # FFmpeg may find sound after the damage
        file.seek(0)
        try:
            found = decode_with_ffmpeg(source, max_seconds)
        except UnsupportedError as error:
            file.seek(0)
            if (found := _decode_with_soundfile(source, max_seconds)) is None:
                raise ClipError("unreadable", str(error)) from error
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
